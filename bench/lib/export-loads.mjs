// The loads: fio on a file or over NBD, and our own vhost-user front-end on a server's socket. Each
// returns IOPS of 4 KiB requests, 32 in flight.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';

export const BLOCK = '4k';
export const DEPTH = 32;
const RAMP_SECONDS = 0.3;

function fio(args, rw, seconds) {
  const { status, stdout, stderr } = spawnSync(
    'fio',
    [
      ...['--name=bench', `--rw=${rw}`, `--bs=${BLOCK}`, `--iodepth=${DEPTH}`, '--time_based'],
      ...[`--runtime=${seconds}`, `--ramp_time=${RAMP_SECONDS}`, '--randrepeat=0'],
      ...['--norandommap', '--thread', '--group_reporting', '--output-format=json', ...args],
    ],
    { encoding: 'utf8' },
  );
  if (status !== 0) throw new Error(`fio ${args.join(' ')}: exit ${status}\n${stderr}`);
  const [job] = JSON.parse(stdout.slice(stdout.indexOf('{'))).jobs;
  return rw.endsWith('write') ? job.write.iops : job.read.iops;
}

export const fioFile = (path, direct, rw, seconds) =>
  fio([`--filename=${path}`, '--ioengine=io_uring', `--direct=${direct ? 1 : 0}`], rw, seconds);

export const fioNbd = (uri, rw, seconds) => fio(['--ioengine=nbd', `--uri=${uri}`], rw, seconds);

/** A front-end of `rings` rings, each with a thread that polls (`poll`) or sleeps (`call`). */
export function vhost(program, socket, { rings = 1, wait = 'poll', size, rw, seconds }) {
  const { status, stdout, stderr } = spawnSync(
    program,
    [
      ...[socket, 'attach', rw, `rings=${rings}`, `wait=${wait}`, `depth=${DEPTH}`, 'json'],
      ...[`size=${size}`, `ms=${seconds * 1000}`],
    ],
    { encoding: 'utf8', timeout: (seconds + 30) * 1000 },
  );
  if (status !== 0) throw new Error(`bench_vhost ${socket}: exit ${status}\n${stderr}`);
  return JSON.parse(stdout).iops;
}

/** Drives `rings` rings for a moment, then calls `look` while the front-end stays and asks nothing. */
export async function vhostThen(program, socket, { rings, size, stayMs }, look) {
  const words = [`rings=${rings}`, 'wait=call', `depth=${DEPTH}`, 'json', `size=${size}`];
  const args = [socket, 'attach', 'randwrite', ...words, 'ms=700', `stay=${stayMs}`];
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(child, 'close');
  try {
    const line = await Promise.race([
      once(createInterface({ input: child.stdout }), 'line'),
      ended,
    ]);
    if (typeof line[0] !== 'string') throw new Error(`bench_vhost ${socket}: exit ${line[0]}`);
    return await look();
  } finally {
    child.kill('SIGKILL');
    await ended;
  }
}
