// The set `scale`: what an I/O costs, and what memory a disk needs, as the disk grows from 1 GiB to
// 16 TiB and as its working set outgrows the caches.
//
// The disks are sparse. A working set is one block of 4 KiB in each of so many places, a *stride*
// apart: few bytes that touch many tables. A page of entries (4 KiB) is of 512 KiB of disk, so the
// entry cache's 64 MiB are of 8 GiB; a page of an L2 table (4 KiB) is of 32 MiB, so the L2 cache's
// 32 MiB are of 256 GiB.
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { createDisk } from '../../dist/index.js';
import { KEY } from '../lib/bench.mjs';
import { commandLine } from '../lib/commands.mjs';

const KiB = 1024;
const MiB = 1024 * KiB;
const GiB = 1024 * MiB;
const TiB = 1024 * GiB;

const SIZES = [GiB, 16 * GiB, 256 * GiB, TiB, 16 * TiB];
const QUICK_SIZES = [GiB, TiB, 16 * TiB];
const PLACES = 512;
const DEPTH = 32;
/** The same for each size, so that only the size differs. */
const LOG_BYTES = 32 * MiB;

const ENTRY_PAGE_COVERS = 512 * KiB;
const L2_PAGE_COVERS = 32 * MiB;
const PAGE = 4 * KiB;
const SMALL_CACHE = { entryCacheBytes: 16 * MiB, l2CacheBytes: 2 * MiB };
const FRACTIONS = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4];

const sizeName = (bytes) =>
  bytes >= TiB ? `${bytes / TiB} TiB` : bytes >= GiB ? `${bytes / GiB} GiB` : `${bytes / MiB} MiB`;
const axis = (sizes) => ({
  ...{ name: 'disk size', values: sizes, log: true },
  labels: sizes.map(sizeName),
});
const fractionName = (fraction) => (fraction < 1 ? `1/${1 / fraction}` : `${fraction}`);
const secondsOf = (bench) => Math.min(bench.seconds, 0.5);

/** Writes one block of each place and closes the disk, so that everything is home. */
async function prepared(bench, path, format, { size, visits, ...make }) {
  const sealed = format === 'sealed' ? { recipients: [await bench.recipient()], ...make } : {};
  await createDisk(path, { format, size, ...sealed });
  const disk = await bench.open(path, format);
  for (const visit of visits) {
    await disk.bench({ rw: 'write', iodepth: DEPTH, ...visit }, { signal: bench.signal });
  }
  await disk.close();
  return path;
}

/** Microseconds that one of many requests costs (the reciprocal of IOPS), and what missed a cache. */
async function cost(bench, disk, spec) {
  const before = disk.stats().backend;
  const runtimeMs = secondsOf(bench) * 1000;
  const load = { iodepth: DEPTH, rampMs: runtimeMs / 2, runtimeMs, seed: 7 };
  const whole = { ...load, ...spec };
  bench.loadCommand(disk, whole);
  const result = await disk.bench(whole, { signal: bench.signal });
  const after = disk.stats().backend;
  const missed = (hits, misses) => {
    const [hit, miss] = [hits, misses].map((name) => after[name] - before[name]);
    return hit + miss > 0 ? miss / (hit + miss) : 0;
  };
  const side = result.read.ops > 0 ? result.read : result.write;
  return {
    value: 1e6 / side.iops,
    entriesMissed: missed('entryHits', 'entryMisses'),
    l2Missed: missed('l2Hits', 'l2Misses'),
  };
}

/** Overwrites until the log was emptied once: from then on every write pays for that as well. */
async function warmLog(bench, disk, spec) {
  const runtimeMs = secondsOf(bench) * 1000;
  const { checkpoints } = disk.stats().backend;
  for (let runs = 0; runs < 10 && disk.stats().backend.checkpoints === checkpoints; runs++) {
    bench.check();
    await disk.bench({ rw: 'randwrite', iodepth: DEPTH, runtimeMs, ...spec });
  }
}

// ---- over the size of the disk ---------------------------------------------------------------------

async function overSize(bench) {
  const sizes = bench.quick ? QUICK_SIZES : SIZES;
  const formats = bench.quick ? ['raw', 'sealed'] : ['raw', 'qcow2', 'sealed'];
  const disks = new Map();
  for (const size of sizes) {
    bench.say(`disks of ${sizeName(size)}`);
    const visits = [{ stride: size / PLACES, size }];
    for (const format of formats) {
      const path = join(bench.ram, `${size}.${format}`);
      await prepared(bench, path, format, { size, visits, logBytes: LOG_BYTES });
      disks.set(`${format} ${size}`, await bench.open(path, format));
    }
  }
  for (const [what, rw] of Object.entries({ read: 'randread', overwrite: 'randwrite' })) {
    if (rw === 'randwrite') {
      for (const [name, disk] of disks) {
        if (name.startsWith('sealed')) await warmLog(bench, disk, { stride: disk.size / PLACES });
      }
    }
    await bench.compare({
      group: `${what}, 4 KiB, over disk size, RAM`,
      about:
        `What one ${what} of 4 KiB costs, ${DEPTH} in flight on one queue: ${PLACES} places, evenly ` +
        'over the whole sparse disk. Flat is good.',
      unit: 'µs',
      better: 'less',
      base: 'raw',
      x: axis(sizes),
      contenders: formats.map((name) => ({
        name,
        run: (size) =>
          cost(bench, disks.get(`${name} ${size}`), { rw, stride: size / PLACES, size }),
      })),
    });
  }
  for (const disk of disks.values()) {
    await disk.close();
    await rm(disk.facts.path);
  }
}

// ---- a working set that outgrows a cache -----------------------------------------------------------

/** `covers`: bytes of disk for one page of the cache, which is also the stride. */
async function outgrowing(bench, place, { cache, about, cacheBytes, covers }) {
  const covered = (cacheBytes / PAGE) * covers;
  const largest = FRACTIONS.at(-1) * covered;
  bench.say(`a disk of ${sizeName(largest)}, ${bench.where[place]}`);
  const path = join(bench[place], 'outgrown.sealed');
  const visits = [{ stride: covers, size: largest }];
  await prepared(bench, path, 'sealed', { size: largest, visits, logBytes: LOG_BYTES });
  const disk = await bench.open(path, 'sealed', SMALL_CACHE);
  await warmLog(bench, disk, { stride: covers });
  const kinds = { read: 'randread', overwrite: 'randwrite' };
  await bench.compare({
    group: `a working set outgrows the ${cache}, ${bench.where[place]}`,
    about,
    unit: 'µs',
    better: 'less',
    x: {
      ...{ name: 'working set / what the cache covers', values: FRACTIONS, log: true },
      labels: FRACTIONS.map(fractionName),
    },
    contenders: Object.entries(kinds).map(([name, rw]) => ({
      name,
      run: (fraction) => cost(bench, disk, { rw, stride: covers, size: fraction * covered }),
    })),
  });
  await disk.close();
  await rm(path);
}

async function outgrowingCaches(bench) {
  const { entryCacheBytes, l2CacheBytes } = SMALL_CACHE;
  const entries = {
    cache: 'entry cache',
    about:
      `What a 4 KiB I/O costs on a sealed disk whose entry cache is ${sizeName(entryCacheBytes)} and ` +
      'covers 2 GiB (the default, 64 MiB, covers 8 GiB). Beyond 1 a share of the reads fetches a ' +
      'page of entries as well; an overwrite only when its entry goes home.',
    cacheBytes: entryCacheBytes,
    covers: ENTRY_PAGE_COVERS,
  };
  const tables = {
    cache: 'L2 cache',
    about:
      `The same with ${sizeName(l2CacheBytes)} of L2 cache, which cover 16 GiB (the default, 32 MiB, ` +
      'covers 256 GiB).',
    cacheBytes: l2CacheBytes,
    covers: L2_PAGE_COVERS,
  };
  await outgrowing(bench, 'ram', entries);
  await outgrowing(bench, 'disk', entries);
  await outgrowing(bench, 'ram', tables);
}

// ---- memory ----------------------------------------------------------------------------------------

/** Half as much again as either cache covers, where the disk is that large. */
const visitsOf = (size) =>
  [
    { stride: L2_PAGE_COVERS, size: Math.min(size, 384 * GiB) },
    { stride: ENTRY_PAGE_COVERS, size: Math.min(size, 4 * GiB) },
  ].filter(({ stride, size: bytes }) => bytes >= stride);

const memoryDisk = (bench, place) => join(bench[place], 'memory.sealed');

/** The program that looks at its own memory, and its arguments. */
function memoryWords(bench, place, size) {
  const program = join(bench.root, 'bench', 'lib', 'scale-memory.mjs');
  const visits = visitsOf(size).map(({ stride, size: bytes }) => `${stride}:${bytes}`);
  return [program, memoryDisk(bench, place), bench.env.PQBLK_KEYS, KEY, ...visits];
}

async function memoryOf(bench, place, size) {
  const path = memoryDisk(bench, place);
  try {
    await prepared(bench, path, 'sealed', { size, visits: visitsOf(size) });
    const output = await bench.run(process.execPath, memoryWords(bench, place, size));
    const { node, opened, most } = JSON.parse(output);
    return { node, opened, most, disk: most - node };
  } finally {
    await rm(path, { force: true });
  }
}

/** On a real disk ciphertext waits in memory until it is written home; in RAM there is no need to. */
async function memory(bench, place, sizes) {
  const found = new Map();
  const of = async (name, size) => {
    bench.command(commandLine([process.execPath, ...memoryWords(bench, place, size)]));
    if (!found.has(size)) found.set(size, memoryOf(bench, place, size));
    return (await found.get(size))[name] / MiB;
  };
  const disk = 'the disk: at most, less Node';
  const [only] = sizes.length === 1 ? sizes : [];
  const x = only ? {} : { x: axis(sizes) };
  const row = (name, what) => ({ name, run: (size = only) => of(what, size) });
  const target = { name: disk, atMost: 160, about: 'memory, 1 TiB disk, default caches' };
  await bench.compare({
    group: only
      ? `memory, ${sizeName(only)}, ${bench.where[place]}`
      : `memory, ${bench.where[place]}`,
    about:
      'Resident memory of a Node process with one sealed disk, default caches: before it is opened, ' +
      'just opened, and at most while its working set is half as large again as what the caches ' +
      'cover and 256 writes are in flight.',
    unit: 'MiB',
    better: 'less',
    rounds: 1,
    ...x,
    contenders: [
      row('Node with pqblk loaded', 'node'),
      row('disk just opened', 'opened'),
      row('caches full, at most', 'most'),
      row(disk, 'disk'),
    ],
    targets: [{ ...target, ...(only ? {} : { x: TiB }) }],
  });
}

export default {
  name: 'scale',
  about: 'cost of an I/O and memory, disks of 1 GiB to 16 TiB, working sets beyond the caches',
  async run(bench) {
    await memory(bench, 'ram', bench.quick ? [TiB] : SIZES);
    if (!bench.quick) await memory(bench, 'disk', [TiB]);
    await overSize(bench);
    if (!bench.quick) await outgrowingCaches(bench);
  },
};
