// A rotation that another host, or another person's key store, has to hear of: the serving process follows by
// itself, other hosts take over the pins of the one that rotated.
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { exitCode, pqblk, pqblkJson, scratch } from './helpers.js';
import { serve } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const HOSTS = ['server', 'operator', 'third'] as const;
const on = (host: (typeof HOSTS)[number]) => ['--key', 'alice', '--store', at(host)];
const disk = at('vm.sealed');

/** All hosts have alice's key, and have opened the disk. */
beforeAll(async () => {
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', '--store', at('server'));
  await pqblkJson('create', disk, '8M', '--key', 'alice', '--store', at('server'));
  const key = readFileSync(at('server/alice.key'));
  for (const host of HOSTS.slice(1)) {
    await pqblkJson('key', 'gen', 'other', '--no-passphrase', '--store', at(host));
    writeFileSync(at(`${host}/alice.key`), key, { mode: 0o600 });
  }
  for (const host of HOSTS) expect((await pqblk('check', disk, ...on(host))).code).toBe(0);
});

const test = (host: (typeof HOSTS)[number]) => pqblk('slot', 'test', disk, ...on(host));

describe('a master key that an operator with a key store of his own rotates', () => {
  it('does not shut out the process that serves the disk', async () => {
    const first = await serve(disk, '--nbd', at('s.sock'), ...on('server'));
    await pqblkJson('rotate-master-key', disk, ...on('operator'));
    const own = await pqblkJson('rotate-master-key', disk, ...on('server')); // and his own goes on
    expect(own.changed).toBe(true);
    expect(await first.end()).toBe(0);
    const again = await serve(disk, '--nbd', at('s.sock'), ...on('server'));
    expect(await again.end()).toBe(0);
    const stranger = await test('third');
    expect([stranger.code, stranger.stderr]).toEqual([
      exitCode('vmk_changed'),
      expect.stringContaining('--confirm-vmk'),
    ]);
  });

  it('is known to other hosts by its pin', async () => {
    const old = at('old.pins');
    await pqblkJson('slot', 'test', disk, ...on('server'));
    expect((await pqblk('pin', 'export', '-o', old, '--store', at('third'))).code).toBe(0);
    const file = at('rotated.pins');
    expect((await pqblk('pin', 'export', '-o', file, '--store', at('server'))).code).toBe(0);
    expect((await pqblk('pin', 'export', '-o', file, '--store', at('server'))).code).toBe(
      exitCode('exists'),
    );
    const taken = await pqblkJson('pin', 'import', file, '--store', at('third'));
    expect(taken).toMatchObject({ changed: [expect.any(String)], unchanged: 0 });
    expect(await pqblkJson('pin', 'import', file, '--store', at('third'))).toMatchObject({
      changed: [],
      unchanged: 1,
    });
    expect((await test('third')).code).toBe(0);

    // What is older is not believed again, and keeps nothing else from being believed.
    const both = JSON.parse(readFileSync(old, 'utf8')) as { pins: { volumeUuid: string }[] };
    const volumeUuid = 'ffffffff-0000-4000-8000-000000000000';
    both.pins.push({ ...(both.pins[0] as object), volumeUuid });
    writeFileSync(at('both.pins'), JSON.stringify(both));
    const back = await pqblk('pin', 'import', at('both.pins'), '--store', at('third'));
    expect(back.code).toBe(exitCode('rollback'));
    expect(back.stdout).toContain('1 pins taken over');
    expect((await test('third')).code).toBe(0);
    const listed = await pqblkJson<{ pins: object[] }>('pin', 'list', '--store', at('third'));
    const given = JSON.parse(readFileSync(file, 'utf8')) as { pins: object[] };
    expect(listed.pins).toMatchObject([...given.pins, { volumeUuid }]);
  });

  it('is believed of no file that is damaged', async () => {
    const kept = JSON.stringify(await pqblkJson('pin', 'list', '--store', at('third')));
    const text = readFileSync(at('rotated.pins'), 'utf8');
    for (const [damage, kind] of [
      [text.slice(1), 'corrupt'],
      [text.replace('pqblk-pins', 'pqblk'), 'corrupt'],
      [text.replace(/"vmkCheck": "./, '"vmkCheck": "x'), 'corrupt'],
      [text.replace(/"generation": /, '"generation": -'), 'corrupt'],
      [text.replace(/"vmkCheck": ("[0-9a-f]*")/, '"vmkCheck": [$1]'), 'corrupt'],
      [text.replace('"version": 1', '"version": 2'), 'newer_version'],
    ] as const) {
      writeFileSync(at('damaged.pins'), damage);
      const { code } = await pqblk('pin', 'import', at('damaged.pins'), '--store', at('third'));
      expect([damage, code]).toEqual([damage, exitCode(kind)]);
    }
    expect(JSON.stringify(await pqblkJson('pin', 'list', '--store', at('third')))).toBe(kept);
  });
});

it('a served disk and a key store that nobody can write: the change is refused, the disk as it was', async () => {
  const copy = at('copy.sealed');
  copyFileSync(disk, copy);
  const running = await serve(copy, '--nbd', at('c.sock'), ...on('server'));
  const before = readFileSync(copy);
  const { volumeUuid } = (
    await pqblkJson<{ pins: { volumeUuid: string }[] }>('pin', 'list', '--store', at('server'))
  ).pins[0] as { volumeUuid: string };
  const pin = at(`server/pins/${volumeUuid}.json`);
  const kept = readFileSync(pin);
  writeFileSync(pin, 'damaged', { mode: 0o600 });
  const refused = await pqblk('rotate-master-key', copy, ...on('third'));
  expect([refused.code, refused.stderr]).toEqual([
    exitCode('bad_key'),
    expect.stringContaining('the process that serves the disk: '),
  ]);
  writeFileSync(pin, kept, { mode: 0o600 });
  expect(readFileSync(copy).equals(before)).toBe(true);
  expect(await running.end()).toBe(0);
});
