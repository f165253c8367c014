// What a server costs that nobody uses, with as many queues as there may be. Loose bounds: a machine
// under test does other things too. docs/serve.md has what was measured.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { pqblkJson, scratch } from './helpers.js';
import { serve } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const TICKS_PER_SECOND = 100; // of /proc/PID/stat, on every Linux that Node runs on
const SECONDS = 5;

function cpuSeconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? [];
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

it('64 queues are little memory and no work', async () => {
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', '--store', at('keys'));
  await pqblkJson('create', at('vm.sealed'), '64G', '--key', 'alice', '--store', at('keys'));
  const ways = ['--vhost-user', at('v.sock'), '--nbd', at('n.sock'), '--stats', at('m.sock')];
  const server = await serve(at('vm.sealed'), ...ways, '--queues', '64', '--store', at('keys'));
  const pid = Number(server.child.pid);
  await new Promise((go) => setTimeout(go, 1000)); // what follows the start
  const before = cpuSeconds(pid);
  await new Promise((go) => setTimeout(go, SECONDS * 1000));
  const share = (cpuSeconds(pid) - before) / SECONDS;
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  const resident = Number(/^VmRSS:\s+(\d+) kB/m.exec(status)?.[1]) / 1024;
  console.log(
    `NOTE: 64 queues: ${resident.toFixed(0)} MiB resident, ${(share * 100).toFixed(2)} % of a core`,
  );
  expect(resident).toBeLessThan(256);
  expect(share).toBeLessThan(0.05);
  expect(await server.end()).toBe(0);
});
