// A process that has a sealed disk open, for the set `scale`: what memory it needs.
//
//   node scale-memory.mjs DISK STORE KEY STRIDE:SIZE …     one line of JSON
//
// Visits the places that each STRIDE:SIZE (bytes) names, so many that entry cache and L2 cache are
// full, keeps many writes in flight, and says what the kernel counts as this process's on the way.
import { readFileSync } from 'node:fs';
import { KeyStore, openDisk } from '../../dist/index.js';

/** Bytes, now and at most. */
function memory() {
  const text = readFileSync('/proc/self/status', 'utf8');
  const of = (name) => Number(new RegExp(`^${name}:\\s+(\\d+) kB`, 'm').exec(text)?.[1]) * 1024;
  return { now: of('VmRSS'), most: of('VmHWM') };
}

const [path, storePath, key, ...visits] = process.argv.slice(2);
const identity = await new KeyStore(storePath).unlock(key);
const node = memory().now;
const disk = await openDisk(path, { format: 'sealed', identity });
const opened = memory().now;
for (const visit of visits) {
  const [stride, size] = visit.split(':').map(Number);
  const places = { stride, size, iodepth: 32 };
  await disk.bench({ ...places, rw: 'read' });
  await disk.bench({ ...places, rw: 'randrw', runtimeMs: 500 });
}
await disk.bench({ rw: 'randwrite', stride: 2 ** 20, iodepth: 256, runtimeMs: 500, size: 2 ** 30 });
const { backend } = disk.stats();
const { most } = memory();
await disk.close();
console.log(JSON.stringify({ node, opened, most, backend }));
