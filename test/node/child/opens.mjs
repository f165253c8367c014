// Opens, reads and closes a disk again and again, in a process of its own with --expose-gc; prints
// what it holds after half of them and after all. argv: DIST PATH TIMES
import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

const [dist, path, times] = process.argv.slice(2);
const { openDisk } = await import(dist);
const buffer = Buffer.alloc(4096);

async function held() {
  for (let i = 0; i < 3; i++) {
    globalThis.gc();
    await sleep(20); // finalizers run between turns
  }
  return {
    descriptors: readdirSync('/proc/self/fd').length,
    threads: readdirSync('/proc/self/task').length,
    residentKiB: Number(readFileSync('/proc/self/statm', 'utf8').split(' ')[1]) * 4,
    heapKiB: process.memoryUsage().heapUsed / 1024,
  };
}

async function open(count) {
  for (let i = 0; i < count; i++) {
    const disk = await openDisk(path, { format: 'raw' });
    await disk.read(buffer, 0);
    await disk.close();
  }
}

await open(times / 2);
const half = await held();
await open(times / 2);
console.log(JSON.stringify({ half, whole: await held() }));
