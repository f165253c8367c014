// A command that holds private keys and is made to dump core leaves none, whatever the limits it was
// started with. What shows that this system dumps core at all is a process that does not mind.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { MAIN, program, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);

/** Runs a command line with no limit on core files, and aborts it once it says something. */
async function aborted(name: string, argv: readonly string[]) {
  mkdirSync(at(name));
  const script = 'ulimit -c unlimited; "$@" & echo "pid $!" >&3; wait $!';
  const shell = spawn('bash', ['-c', script, 'bash', process.execPath, ...argv], {
    cwd: at(name),
    stdio: ['ignore', 'pipe', 'pipe', 'pipe'],
  });
  const said = (stream: number) => once(shell.stdio[stream] as NodeJS.ReadableStream, 'data');
  const works = said(1);
  const pid = Number(/pid (\d+)/.exec(String(((await said(3)) as [Buffer])[0]))?.[1]);
  await works;
  const limits = readFileSync(`/proc/${pid}/limits`, 'utf8');
  process.kill(pid, 'SIGABRT');
  await once(shell, 'exit');
  const limit = /^Max core file size +(\S+) +(\S+)/m.exec(limits)?.slice(1);
  return { limit, cores: readdirSync(at(name)).filter((file) => file.startsWith('core')) };
}

const store = ['--store', at('keys')];

it('a command that holds a private key leaves no core', async () => {
  const careless = await aborted('careless', ['-e', 'console.log(1); setInterval(() => {}, 1000)']);
  if (careless.cores.length === 0) console.warn('SKIP: this system writes no core files at all');
  else expect(careless.cores).toHaveLength(1);

  // As programs: a process that has once forbidden core files hands that on.
  for (const argv of [
    ['key', 'gen', 'alice', '--no-passphrase', ...store],
    ['create', at('vm.sealed'), '64M', '--key', 'alice', ...store],
  ]) {
    expect(program(...argv)).toMatchObject({ code: 0, stderr: '' });
  }
  const socket = ['--socket', at('agent.sock')];
  const agent = [MAIN, 'agent', at('vm.sealed'), '--key', 'alice', ...socket, ...store];
  const { limit, cores } = await aborted('agent', agent);
  // 1, and not 0: the one limit that also holds where dumps go to a program (core(5)). A limit of 0 that
  // was there before can be raised by root alone.
  expect(['0', '1']).toContain(limit?.[1]);
  expect(cores).toEqual([]);
});
