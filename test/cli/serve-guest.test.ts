// `pqblk serve --vhost-user` with a small guest of our own (test/native/export/vhost_peer.cc), and what a
// server costs that nobody uses. The bounds are loose: a machine under test does other things too;
// docs/serve.md has what was measured.
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it, type TestContext, vi } from 'vitest';
import { type Family, parseExposition, total } from './exposition.js';
import { pqblkJson, scratch } from './helpers.js';
import { httpGet, running, serve } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const store = ['--store', at('keys')];
const PEER = fileURLToPath(new URL('../../build/release/tests/vhost_peer', import.meta.url));
const PATIENCE = { timeout: 120_000, interval: 20 };
const TICKS_PER_SECOND = 100; // of /proc/PID/stat, on every Linux that Node runs on
const IDLE_SECONDS = 5;
const RINGS = 64;

beforeAll(async () => {
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', ...store);
});

async function sealedDisk(name: string): Promise<string> {
  await pqblkJson('create', at(name), '64G', '--key', 'alice', ...store);
  return at(name);
}

/** A guest that has used its rings and is idle now. */
async function guest(
  context: TestContext,
  socket: string,
  rings: number,
): Promise<{ leave(): Promise<void> }> {
  if (!existsSync(PEER)) {
    console.log(`SKIP: ${PEER} is not built; the native suite makes it`);
    context.skip();
  }
  const child: ChildProcessWithoutNullStreams = spawn(PEER, [socket, String(rings)]);
  running.add(child);
  let said = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (text) => {
      said += text;
    });
  }
  const ended = once(child, 'close');
  await vi.waitFor(() => expect(said).toBe('done\n'), PATIENCE);
  return {
    leave: async () => {
      child.stdin.end();
      expect((await ended)[0]).toBe(0);
      running.delete(child);
    },
  };
}

const metrics = async (): Promise<Map<string, Family>> =>
  parseExposition((await httpGet(at('m.sock'), '/metrics')).body);

function cpuSeconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? [];
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

describe('serve --vhost-user', () => {
  it('counts its guests and what they asked for, one after the other', async (context) => {
    const ways = ['--vhost-user', at('v.sock'), '--stats', at('m.sock'), '--queues', '2'];
    const server = await serve(await sealedDisk('count.sealed'), ...ways, ...store);
    const of = async (name: string) => total(await metrics(), `pqblk_vhost_user_${name}`);
    expect([await of('connected'), await of('rings'), await of('running_rings')]).toEqual([
      0, 2, 0,
    ]);
    for (const visit of [1, 2]) {
      const visitor = await guest(context, at('v.sock'), 2);
      expect([await of('connected'), await of('running_rings')]).toEqual([1, 2]);
      expect(await of('connections_total')).toBe(visit);
      // A write, a flush and a read on each ring, and a read of what is not there.
      expect(await of('requests_total')).toBe(7 * visit);
      expect(await of('request_errors_total')).toBe(visit);
      const families = await metrics();
      const done = (type: string) =>
        total(families, 'pqblk_request_duration_seconds_count', { type });
      expect([done('write'), done('flush'), done('read')]).toEqual([2, 2, 2].map((n) => n * visit));
      await visitor.leave();
      await vi.waitFor(async () => expect(await of('connected')).toBe(0), PATIENCE);
      expect(await of('running_rings')).toBe(0);
    }
    expect(await server.end()).toBe(0);
  });

  it('costs little with 64 queues and a guest that is idle on all', async (context) => {
    const ways = ['--vhost-user', at('v.sock'), '--nbd', at('n.sock'), '--stats', at('m.sock')];
    const disk = await sealedDisk('idle.sealed');
    const server = await serve(disk, ...ways, '--queues', String(RINGS), ...store);
    const pid = Number(server.child.pid);
    const visitor = await guest(context, at('v.sock'), RINGS);
    await new Promise((go) => setTimeout(go, 1000)); // looking at the rings has become sleeping
    const before = cpuSeconds(pid);
    await new Promise((go) => setTimeout(go, IDLE_SECONDS * 1000));
    const share = (cpuSeconds(pid) - before) / IDLE_SECONDS;
    const status = readFileSync(`/proc/${pid}/status`, 'utf8');
    const resident = Number(/^VmRSS:\s+(\d+) kB/m.exec(status)?.[1]) / 1024;
    const used = `${resident.toFixed(0)} MiB resident, ${(share * 100).toFixed(2)} % of a core`;
    console.log(`NOTE: 64 queues, idle: ${used}`);
    expect(resident).toBeLessThan(256);
    expect(share).toBeLessThan(0.05);
    await visitor.leave();
    expect(await server.end()).toBe(0);
  });
});
