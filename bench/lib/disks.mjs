// Disks to measure: the same noise in each, all of it allocated, none of it compressible.
import { randomFillSync } from 'node:crypto';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { createDisk } from '../../dist/index.js';

const MiB = 2 ** 20;
export const GiB = 2 ** 30;

/** How much disk a set works on: small enough that its entries fit the caches. */
export const sizeOf = (bench) => (bench.quick ? 256 * MiB : GiB);

/** Writes `size` bytes of noise. */
export async function makeNoise(bench, path, size) {
  const file = await open(path, 'w', 0o600);
  try {
    const chunk = Buffer.alloc(4 * MiB);
    for (let at = 0; at < size; at += chunk.length) {
      bench.check();
      randomFillSync(chunk);
      await file.write(chunk, 0, Math.min(chunk.length, size - at));
    }
    await file.datasync();
  } finally {
    await file.close();
  }
  return path;
}

/**
 * A new disk of `format` in `directory`, every sector of it written once through the engine; open,
 * with `options`.
 */
export async function makeDisk(bench, directory, format, { size, name, ...options }) {
  const suffix = { raw: 'raw', qcow2: 'qcow2', sealed: 'sealed' }[format];
  const file = join(directory, `${name ?? format}.${suffix}`);
  const sealed = format === 'sealed' ? { recipients: [await bench.recipient()] } : {};
  await createDisk(file, { format, size, ...sealed });
  const disk = await bench.open(file, format, options);
  await fill(bench, disk);
  return disk;
}

/** Writes the whole disk once, in order. */
export async function fill(bench, disk) {
  const queues = disk.facts.queues;
  const spec = { rw: 'write', blockSize: MiB, iodepth: Math.max(1, 8 / queues), size: disk.size };
  await disk.bench(spec, { signal: bench.signal });
  await disk.flush();
}

/**
 * A disk as it is when it has been at rest for a while (sealed: its log written home), and was read as a
 * whole. `disk` is closed; the result is the same one, open.
 */
export async function rested(bench, disk, options) {
  const { path, format } = disk.facts;
  await disk.close();
  const again = await bench.open(path, format, options);
  const all = { rw: 'read', blockSize: MiB, iodepth: 8, size: again.size };
  await again.bench(all, { signal: bench.signal });
  return again;
}

/** Overwrites at random until the log went around `wraps` times: from then on it has to be emptied. */
export async function wrapLog(bench, disk, wraps = 3) {
  const { logBytes: begun } = disk.stats().backend;
  const spec = { rw: 'randwrite', iodepth: 32, runtimeMs: 300 };
  for (;;) {
    const { logBytes, logCapacity } = disk.stats().backend;
    if (logBytes - begun >= wraps * logCapacity) return;
    await disk.bench({ ...spec, seed: logBytes % 2 ** 31 }, { signal: bench.signal });
  }
}
