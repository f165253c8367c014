// The servers that are compared: pqblk, QEMU's storage daemon with io_uring, nbdkit with its LUKS
// filter; and gocryptfs, which serves files. All of them run until the set ends.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { commandLine } from './commands.mjs';

const TICKS_PER_SECOND = 100;
const READY_MS = 30_000;

/** Waits until `ready()`; throws what a server complained of that ends before. */
async function whenReady(bench, child, what, ready) {
  for (let waited = 0; !ready(); waited += 50) {
    bench.check();
    const ended = child.exitCode !== null || child.signalCode !== null;
    if (ended || waited > READY_MS) throw new Error(`${what} did not start: ${child.complaint}`);
    await sleep(50);
  }
}

/** `pqblk serve DISK`; `sockets`: where its nbd and vhost-user sockets go. */
export async function servePqblk(bench, disk, sockets, { queues, direct, args = [] }) {
  const ways = Object.entries(sockets).flatMap(([way, path]) => [`--${way}`, path]);
  const cache = direct ? 'none' : 'writeback';
  const words = [disk, '--queues', `${queues}`, '--cache', cache, ...ways, ...args];
  return await bench.startPqblk('serve', ...words);
}

/**
 * `format`: raw, qcow2 or luks (QCOW2 with LUKS inside, passphrase in the file `secret`). A process for
 * each of `sockets`: QEMU 7.2 aborts when an NBD client leaves an export that has an I/O thread.
 */
export async function serveQemu(bench, disk, format, sockets, options) {
  const children = [];
  for (const [way, path] of Object.entries(sockets)) {
    children.push(await serveQemuOver(bench, way, disk, format, path, options));
  }
  return children;
}

async function serveQemuOver(bench, way, disk, format, socket, { queues, direct, secret }) {
  // Without locks on a file that others have open as well; it is asked by one at a time.
  const file = `driver=file,node-name=file,filename=${disk},aio=io_uring,locking=off`;
  const crypt = format === 'luks' ? ',encrypt.format=luks,encrypt.key-secret=key' : '';
  const driver = format === 'raw' ? 'raw' : `qcow2${crypt}`;
  const addr = `addr.type=unix,addr.path=${socket}`;
  const exported = 'id=export,node-name=disk,writable=on';
  const child = bench.start('qemu-storage-daemon', [
    ...(format === 'luks' ? ['--object', `secret,id=key,file=${secret}`] : []),
    ...['--blockdev', `${file},cache.direct=${direct ? 'on' : 'off'}`],
    ...['--blockdev', `driver=${driver},node-name=disk,file=file,discard=unmap`],
    ...(way === 'nbd'
      ? ['--nbd-server', addr, '--export', `nbd,name=disk,${exported}`]
      : [
          ...['--object', 'iothread,id=io', '--export'],
          `vhost-user-blk,${addr},num-queues=${queues},iothread=io,${exported}`,
        ]),
  ]);
  await whenReady(bench, child, 'qemu-storage-daemon', () => existsSync(socket));
  return child;
}

/** A LUKS file, decrypted by nbdkit's filter over its file plugin. */
export async function serveNbdkit(bench, disk, socket, secret) {
  const filter = ['--filter=luks', 'file', disk, `passphrase=+${secret}`];
  const child = bench.start('nbdkit', ['--foreground', '--unix', socket, ...filter]);
  await whenReady(bench, child, 'nbdkit', () => existsSync(socket));
  return child;
}

/** A new gocryptfs file system (AES-256-GCM, blocks of 4 KiB), mounted at `DIRECTORY/plain`. */
export async function mountGocryptfs(bench, directory, secret) {
  const [cipher, plain] = [`${directory}/cipher`, `${directory}/plain`];
  for (const path of [cipher, plain]) mkdirSync(path, { recursive: true });
  // A passphrase is stretched for long; -scryptn 10 is the least, and changes nothing of the load.
  await bench.run('gocryptfs', ['-init', '-q', '-scryptn', '10', '-passfile', secret, cipher]);
  const child = bench.start('gocryptfs', ['-fg', '-q', '-passfile', secret, cipher, plain]);
  bench.defer(() => spawnSync('fusermount', ['-u', '-z', plain]));
  const mounted = () => readFileSync('/proc/mounts', 'utf8').includes(` ${plain} `);
  await whenReady(bench, child, 'gocryptfs', mounted);
  return plain;
}

/** The command lines of servers that run (one, or several), for the report. */
export const serverLines = (server) =>
  [server ?? []].flat().map(({ spawnargs }) => commandLine(spawnargs));

export function writeSecret(path) {
  writeFileSync(path, 'correct horse battery staple', { mode: 0o600 });
  return path;
}

/** Processor time that a process has had so far, in seconds. */
function cpuSeconds(pid) {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8')
    .replace(/^.*\) /s, '')
    .split(' ');
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

/** Percent of one core over `ms`. */
export async function cpuPercent(pid, ms) {
  const before = cpuSeconds(pid);
  await sleep(ms);
  return ((cpuSeconds(pid) - before) / (ms / 1000)) * 100;
}

/** Bytes of memory a process has, and has had at most. */
export function memoryOf(pid) {
  const text = readFileSync(`/proc/${pid}/status`, 'utf8');
  const of = (name) => Number(new RegExp(`^${name}:\\s+(\\d+) kB`, 'm').exec(text)?.[1]) * 1024;
  return { now: of('VmRSS'), most: of('VmHWM') };
}
