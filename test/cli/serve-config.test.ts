// `pqblk serve --config`: several disks in one process, a file that is taken literally or refused with
// the place of its first mistake, and nothing left behind when a disk does not open.
import { once } from 'node:events';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { parseExposition, total } from './exposition.js';
import { exitCode, peer, pqblk, pqblkJson, scratch } from './helpers.js';
import { httpGet, serve } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const MiB = 2 ** 20;
const PATIENCE = { timeout: 120_000, interval: 20 };
const GUIDE = fileURLToPath(new URL('../../docs/serve.md', import.meta.url));

beforeAll(async () => {
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', '--store', at('keys'));
  await pqblkJson('create', at('vm.sealed'), '16M', '--key', 'alice', '--store', at('keys'));
  await pqblkJson('create', at('data.qcow2'), '32M', '--format', 'qcow2');
});

/** Writes a configuration and returns its path. */
function config(text: string): string {
  writeFileSync(at('serve.yaml'), text);
  return at('serve.yaml');
}

describe('serve --config', () => {
  it('serves the disks of the guide, counts for each, and closes all', async () => {
    const example = /```yaml\n([\s\S]*?)```/.exec(readFileSync(GUIDE, 'utf8'))?.[1];
    const server = await serve('--config', config(String(example)));
    expect(server.uris).toEqual([
      `vhost-user-blk:${at('vm.sock')}`,
      `nbd+unix:///?socket=${at('vm-nbd.sock')}`,
      `nbd+unix:///data?socket=${at('data.sock')}`,
    ]);
    expect(Number(peer('nbdinfo', '--size', String(server.uris[1])))).toBe(16 * MiB);
    expect(peer('nbdinfo', String(server.uris[2]))).toMatch(/is_read_only: true/);
    const { body } = await httpGet(at('metrics.sock'), '/metrics');
    const families = parseExposition(body);
    const of = (name: string, disk: string) => total(families, name, { disk });
    expect(of('pqblk_size_bytes', 'vm')).toBe(16 * MiB);
    expect(of('pqblk_size_bytes', 'data.qcow2')).toBe(32 * MiB);
    expect(of('pqblk_limit_iops', 'vm')).toBe(2000);
    expect(of('pqblk_limit_bytes_per_second', 'vm')).toBe(200 * MiB);
    expect(of('pqblk_limit_iops', 'data.qcow2')).toBe(0);
    expect(of('pqblk_vhost_user_rings', 'vm')).toBe(2);
    expect(of('pqblk_vhost_user_connected', 'data.qcow2')).toBeUndefined();
    expect(of('pqblk_nbd_connections_total', 'vm')).toBeGreaterThan(0);
    expect(await server.end()).toBe(0);
    expect(server.stderr()).toBe('');
    const left = ['vm.sock', 'vm-nbd.sock', 'data.sock', 'metrics.sock'].map(at).filter(existsSync);
    expect(left).toEqual([]);
  });

  it.each([
    ['disks: 7\n', '1:8', 'disks: expected a list of at least one disk, not 7'],
    ['disks: []\n', '1:8', 'expected a list of at least one disk'],
    ['', '1:1', 'expected a mapping with `disks`, not nothing'],
    ['- a\n', '1:1', 'expected a mapping with `disks`'],
    ['disks: [\n', '2:1', ''],
    ['disc: 1\n', '1:1', "unknown key 'disc': expected one of disks, stats"],
    ['disks:\n  - vm\n', '2:5', 'expected a disk: a mapping with `path`, not "vm"'],
    ['disks:\n  - nbd: a\n', '2:5', 'path: expected a path, not nothing'],
    ['disks:\n  - path: a\n', '2:5', 'expected a way in to this disk: one of vhost-user, nbd'],
    ['disks:\n  - path: a\n    nbd: s\n    quues: 2\n', '4:5', "unknown key 'quues'"],
    ['disks:\n  - path: a\n    nbd: s\n    nbd: t\n', '4:5', 'unique'],
    [
      'disks:\n  - path: a\n    nbd: s\n    queues: 65\n',
      '4:13',
      'a whole number from 1 to 64, not 65',
    ],
    ['disks:\n  - path: a\n    nbd: s\n    queues: "2"\n', '4:13', 'a whole number from 1 to 64'],
    ['disks:\n  - path: a\n    nbd: s\n    bps-max: 10X\n', '4:14', 'a size such as'],
    ['disks:\n  - path: a\n    nbd: s\n    read-only: yes\n', '4:16', 'true or false, not "yes"'],
    ['disks:\n  - path: a\n    nbd-tcp: here\n', '3:14', 'expected HOST:PORT, not "here"'],
    ['disks:\n  - path: a\n    nbd: s\n    cache: all\n', '4:12', 'one of none, writeback'],
    ['disks:\n  - path: a\n    nbd: s\n    format:\n', '4:', 'one of raw, qcow2, sealed'],
    ['disks:\n  - path: a\n    nbd: s\n  - path: b\n    nbd: s\n', '5:10', 'one of its own'],
    ['disks:\n  - &d { path: a, nbd: !x s }\n', '2:', 'x'],
    ['disks:\n  - { path: a, vhost-user: s }\n  - { path: b, nbd: s }\n', '3:21', 'one of its own'],
    ['disks:\n  - { path: a, vhost-user: s, nbd: s }\n', '2:36', 'one of its own'],
    ['stats: s\ndisks:\n  - { path: a, nbd: s }\n', '3:21', 'one of its own'],
    [
      'disks:\n  - { path: a/d, nbd: s }\n  - { path: b/d, nbd: t }\n',
      '3:5',
      "name: expected one of its own, 'd'",
    ],
    [
      'disks:\n  - { path: a, nbd: s }\n  - { path: b, name: a, nbd: t }\n',
      '3:22',
      'one of its own',
    ],
    [
      'disks:\n  - { path: a, nbd-tcp: "h:1" }\n  - { path: b, nbd-tcp: "h:1" }\n',
      '3:25',
      "'h:1' is named already",
    ],
    ['disks:\n  - { path: a, nbd: s, iops-burst: 5 }\n', '2:36', 'iops-burst: expected iops-max'],
    ['disks:\n  - { path: a, nbd: s, iops-max: 5, bps-burst: 5 }\n', '2:48', 'expected bps-max'],
    ['disks:\n  - { path: a, nbd: fd:3 }\n', '2:21', 'the path of a socket to make'],
    ['stats: fd:3\ndisks:\n  - { path: a, nbd: s }\n', '1:8', 'the path of a socket to make'],
    ['disks: &all [*all]\n', '1:14', 'a mapping with `path`, not what contains itself'],
    [
      'disks:\n  - { path: a, nbd: s, allow-backing: &b [*b] }\n',
      '2:42',
      "a list of files, or 'any', not what contains itself",
    ],
  ])('refuses %j with the place and what was expected', async (text, place, why) => {
    const file = config(text);
    const { code, stderr } = await pqblk('serve', '--config', file);
    expect(code).toBe(exitCode('invalid_argument'));
    expect(stderr).toContain(`${file}:${place}`);
    expect(stderr).toContain(why);
  });

  it('serves the disks that it can, says which it cannot, and ends with that exit code', async () => {
    writeFileSync(at('taken'), '');
    const file = config(`
stats: metrics.sock
disks:
  - { path: missing.raw, nbd: missing.sock }
  - { path: data.qcow2, nbd: taken, name: data }
  - { path: vm.sealed, store: keys, nbd: vm-nbd.sock }
`);
    const server = await serve('--config', file);
    expect(server.uris).toEqual([`nbd+unix:///?socket=${at('vm-nbd.sock')}`]);
    expect(Number(peer('nbdinfo', '--size', String(server.uris[0])))).toBe(16 * MiB);
    await vi.waitFor(() => expect(server.stderr()).toMatch(/data: not served: .*\n/), PATIENCE);
    expect(server.stderr()).toMatch(/missing.raw: not served: .*missing.raw: .*No such file/i);
    // Nothing of what failed is left: no lock, no line in the metrics.
    expect((await pqblk('check', at('data.qcow2'))).code).toBe(0);
    const families = parseExposition((await httpGet(at('metrics.sock'), '/metrics')).body);
    expect(total(families, 'pqblk_size_bytes')).toBe(16 * MiB);
    expect(await server.end()).toBe(exitCode('not_found'));
    expect(server.stderr()).toContain('2 of 3 disks were not');
  });

  it('starts nothing when no disk opens, and ends with the first one’s exit code', async () => {
    writeFileSync(at('taken'), '');
    const missing = config(`
stats: metrics.sock
disks:
  - { path: data.qcow2, nbd: taken }
  - { path: missing.raw, nbd: missing.sock }
`);
    const refused = await pqblk('serve', '--config', missing);
    expect(refused.code).toBe(exitCode('exists'));
    expect(refused.stderr).toContain('missing.raw: not served: ');
    expect(existsSync(at('metrics.sock'))).toBe(false);
    expect((await pqblk('check', at('data.qcow2'))).code).toBe(0);
  });

  it('takes no disk and no option of one besides', async () => {
    const file = config('disks: [{ path: data.qcow2, nbd: data.sock }]\n');
    for (const more of [[at('vm.sealed')], ['--nbd', at('x.sock')], ['--queues', '1']]) {
      const { code, stderr } = await pqblk('serve', '--config', file, ...more);
      expect(code).toBe(exitCode('usage'));
      expect(stderr).toContain('besides --config');
    }
    expect((await pqblk('serve')).code).toBe(exitCode('usage'));
    expect((await pqblk('serve', '--config', at('none.yaml'))).code).toBe(exitCode('not_found'));
  });

  it('turns a second front-end away, and names the disk that reports it', async () => {
    const file = config(`
stats: metrics.sock
disks:
  - { path: vm.sealed, store: keys, vhost-user: vm.sock, name: first }
  - { path: data.qcow2, nbd: data.sock }
`);
    const server = await serve('--config', file);
    const first = connect(at('vm.sock'));
    await once(first, 'connect');
    const second = connect(at('vm.sock'));
    await once(second.resume(), 'close');
    const line = 'pqblk: first: vhost-user: a second front-end was turned away';
    await vi.waitFor(() => expect(server.stderr()).toContain(line), PATIENCE);
    const families = parseExposition((await httpGet(at('metrics.sock'), '/metrics')).body);
    expect(total(families, 'pqblk_vhost_user_connected')).toBe(1);
    expect(total(families, 'pqblk_vhost_user_refused_connections_total')).toBe(1);
    expect(first.destroyed).toBe(false);
    first.destroy();
    expect(await server.end()).toBe(0);
  });
});
