// The servers that are compared, each over NBD and vhost-user: pqblk, and QEMU's storage daemon with
// io_uring.
import { existsSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { start, startPqblk } from '../../scripts/demo/processes.mjs';

const TICKS_PER_SECOND = 100;

/** `pqblk serve DISK`; `sockets`: where its NBD and vhost-user sockets go. */
export async function servePqblk(disk, sockets, { queues, direct, args = [], env }) {
  const words = ['serve', disk, '--queues', `${queues}`, ...args];
  for (const [way, path] of Object.entries(sockets)) words.push(`--${way}`, path);
  return await startPqblk([...words, '--cache', direct ? 'none' : 'writeback'], env);
}

/**
 * `format`: raw, qcow2 or luks (QCOW2 with LUKS inside, passphrase in the file `secret`). A process for
 * each of `sockets`: QEMU 7.2 aborts when an NBD client leaves an export that has an I/O thread.
 */
export async function serveQemu(disk, format, sockets, options) {
  for (const [way, path] of Object.entries(sockets)) {
    await serveQemuOver(way, disk, format, path, options);
  }
}

async function serveQemuOver(way, disk, format, socket, { queues, direct, secret }) {
  const file = `driver=file,node-name=file,filename=${disk},aio=io_uring,locking=off`;
  const crypt = format === 'luks' ? ',encrypt.format=luks,encrypt.key-secret=key' : '';
  const driver = format === 'raw' ? 'raw' : `qcow2${crypt}`;
  const addr = `addr.type=unix,addr.path=${socket}`;
  const exported = 'id=export,node-name=disk,writable=on';
  const child = start('qemu-storage-daemon', [
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
  for (let tries = 0; !existsSync(socket); tries++) {
    if (child.exitCode !== null || tries > 200) {
      throw new Error(`qemu-storage-daemon did not start: ${child.complaint}`);
    }
    await sleep(50);
  }
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
