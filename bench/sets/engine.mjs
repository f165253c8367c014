// Set engine: the engine on its own queues, against fio with io_uring on a bare file, the limit.
//
// fio has a file of its own, as large and as full as the raw disk: on one file, whoever came second
// would find in the device's or its host's cache what the other had just read.
//
// Full: the rows that carry targets, then slices through the rest (depth, block size, queues), which
// are many and therefore shorter. Quick: the rows that carry targets.
import { statSync } from 'node:fs';
import { join } from 'node:path';
import { makeDisk, rested, sizeOf, wrapLog } from '../lib/disks.mjs';
import { engine, fioFile } from '../lib/loads.mjs';
import { fileSystemOf4kSectors } from '../lib/loop.mjs';

const KiB = 1024;
const MiB = 1024 * KiB;
const FIO = 'fio io_uring';
const FORMATS = ['raw', 'qcow2', 'sealed'];
const SLICE_ROUNDS = 3;
const SLICE_SECONDS = 0.5;
const COLD_CACHE_BYTES = MiB;

const PLACES = {
  ram: { cachedRead: 0.78, overwrite: 0.6 },
  disk: { cachedRead: 0.97, overwrite: 0.45 },
};

const name = (format) => `pqblk ${format}`;

const ours = (bench, disks, format, load) => ({
  name: name(format),
  run: () => engine(bench, disks[format], load),
});

function withFio(bench, disks, place, load, more = []) {
  const all = { ...load, direct: bench.direct[place] };
  return [
    {
      name: FIO,
      missing: bench.needs('fio'),
      run: () => fioFile(bench, disks.bare.facts.path, all),
    },
    ...more,
    ...FORMATS.map((format) => ours(bench, disks, format, load)),
  ];
}

const engineTargets = (sealed) => [
  { name: name('raw'), to: FIO, atLeast: 1 },
  { name: name('qcow2'), to: name('raw'), atLeast: 0.97 },
  { name: name('sealed'), to: name('raw'), atLeast: sealed },
];

async function small(bench, disks, place) {
  const { cachedRead, overwrite } = PLACES[place];
  // What a target stands on, also at its best: not the base, which is what one would run. On a file in
  // memory that is no ring at all, as for the engine's own requests there.
  const { best, ...how } =
    place === 'ram'
      ? { best: 'fio pread, pwrite, depth 1', ioengine: 'psync', depth: 1 }
      : { best: `${FIO}, fixed buffers and files`, fixed: true };
  const atBest = (load) => ({
    name: best,
    missing: bench.needs('fio'),
    run: () =>
      fioFile(bench, disks.bare.facts.path, { ...load, ...how, direct: bench.direct[place] }),
  });
  const contenders = (load, ...more) =>
    withFio(bench, disks, place, load, [...(bench.quick ? [] : [atBest(load)]), ...more]);
  const read = { rw: 'randread' };
  await bench.compare({
    group: `4 KiB random read, depth 32, ${bench.where[place]}`,
    about:
      'All disks were opened anew and read once. The sealed one is small enough that the entries of its ' +
      'sectors are in memory, and its log is empty.',
    ...{ unit: 'IOPS', base: FIO },
    contenders:
      place === 'disk'
        ? contenders(read, sealedFile(bench, disks.sealed, place, read))
        : contenders(read),
    targets: engineTargets(cachedRead),
  });
  bench.say('overwriting until the log went around three times');
  await wrapLog(bench, disks.sealed);
  await bench.compare({
    group: `4 KiB random overwrite, depth 32, ${bench.where[place]}`,
    about: `Past three wraps of the log. Sealed: ${disks.sealed.facts.durabilityClass}.`,
    ...{ unit: 'IOPS', base: FIO },
    contenders: contenders({ rw: 'randwrite' }),
    targets: engineTargets(overwrite),
  });
  if (bench.quick) return;
  await bench.compare({
    group: `4 KiB random, 70 % reads, depth 32, ${bench.where[place]}`,
    ...{ unit: 'IOPS', base: FIO },
    contenders: withFio(bench, disks, place, { rw: 'randrw' }),
  });
}

/**
 * The bytes of the sealed image itself, past the engine: files on one virtual disk differ in how fast
 * it gives them out, and this tells that from what the engine costs.
 */
function sealedFile(bench, disk, place, load) {
  const { path } = disk.facts;
  // The disk was made and then filled: its data are the last blocks of the file, before the hole where
  // the next clusters will be.
  const where = () => ({ offset: statSync(path).blocks * 512 - disk.size, size: disk.size });
  return {
    name: `${FIO} on the sealed image`,
    missing: bench.needs('fio'),
    run: () => fioFile(bench, path, { ...load, direct: bench.direct[place], ...where() }),
  };
}

async function large(bench, disks, place) {
  for (const rw of ['read', 'write']) {
    const load = { rw, bs: MiB, depth: 8 };
    const wanted = { name: name('sealed'), to: name('raw'), atLeast: 0.92 };
    const control = rw === 'read' && place === 'disk';
    const more = control ? [sealedFile(bench, disks.sealed, place, load)] : [];
    await bench.compare({
      group: `1 MiB sequential ${rw}, depth 8, ${bench.where[place]}`,
      ...{ unit: 'MB/s', base: bench.quick ? name('raw') : FIO },
      contenders: bench.quick
        ? ['raw', 'sealed'].map((format) => ours(bench, disks, format, load))
        : withFio(bench, disks, place, load, more),
      targets: place === 'disk' ? [wanted] : [],
    });
  }
}

/** Random reads of a disk whose newest versions the log has, in part: they are looked up there. */
async function justWritten(bench, disks, place) {
  const { logUsed } = disks.sealed.stats().backend;
  const sector = Buffer.alloc(4 * KiB);
  const notAtRest = () => disks.sealed.write(sector, 0); // or the log would go home meanwhile
  await bench.compare({
    group: `4 KiB random read, depth 32, just written, ${bench.where[place]}`,
    about: `${Math.round(logUsed / MiB)} MiB of the sealed disk's log have not gone home.`,
    ...{ unit: 'IOPS', base: name('raw') },
    contenders: ['raw', 'sealed'].map((format) => ({
      name: name(format),
      run: async () => {
        await notAtRest();
        return await engine(bench, disks[format], { rw: 'randread' });
      },
    })),
  });
}

/** Random reads that find no entry of theirs in memory: what a disk costs that outgrew the cache. */
async function cold(bench, disks, place) {
  const options = { cache: 'none', entryCacheBytes: COLD_CACHE_BYTES };
  const size = disks.raw.size;
  const sealed = await makeDisk(bench, bench[place], 'sealed', { name: 'cold', size, ...options });
  const load = { rw: 'randread' };
  await bench.compare({
    group: `4 KiB random read, depth 32, entries not in memory, ${bench.where[place]}`,
    about: `A cache of ${COLD_CACHE_BYTES / MiB} MiB for the entries of ${size / MiB} MiB.`,
    ...{ unit: 'IOPS', base: name('raw') },
    contenders: [
      { name: name('raw'), run: () => engine(bench, disks.raw, load) },
      { name: name('sealed'), run: () => engine(bench, disks.sealed, load) },
      { name: 'pqblk sealed, cold', run: () => engine(bench, sealed, load) },
    ],
  });
  await sealed.close();
}

async function slices(bench, disks, place) {
  const short = { seconds: Math.min(SLICE_SECONDS, bench.seconds), ramp: 0.1 };
  const slice = (x, group, unit, loadAt) =>
    bench.compare({
      ...{ group: `${group}, ${bench.where[place]}`, unit, base: FIO, x, rounds: SLICE_ROUNDS },
      contenders: withFio(bench, disks, place, {}).map(({ name: who, missing }, i) => ({
        ...{ name: who, missing },
        run: (at) => withFio(bench, disks, place, { ...short, ...loadAt(at) })[i].run(),
      })),
    });
  const depths = { name: 'queue depth', values: [1, 2, 4, 8, 16, 32, 64, 128] };
  const blocks = {
    name: 'block size',
    values: [4, 16, 64, 256, 1024].map((size) => size * KiB),
    labels: ['4 KiB', '16 KiB', '64 KiB', '256 KiB', '1 MiB'],
  };
  for (const rw of ['randread', 'randwrite']) {
    await slice(depths, `4 KiB ${rw} over depth`, 'IOPS', (depth) => ({ rw, depth }));
    await slice(blocks, `${rw} over block size, depth 8`, 'MB/s', (bs) => ({
      ...{ rw, bs, depth: 8, unit: 'MB/s' },
    }));
  }
  const few = { ...depths, values: [1, 8, 32, 128] };
  for (const rw of ['randrw', 'read', 'write']) {
    const what = {
      randrw: 'randrw, 70 % reads,',
      read: 'sequential read',
      write: 'sequential write',
    };
    await slice(few, `4 KiB ${what[rw]} over depth`, 'IOPS', (depth) => ({ rw, depth }));
  }
}

/** Each queue is a thread with a ring; the disks are opened anew for each number of them. */
async function queues(bench, paths, place) {
  const short = { seconds: Math.min(SLICE_SECONDS, bench.seconds), ramp: 0.1 };
  for (const rw of ['randread', 'randwrite']) {
    const load = { rw, ...short, direct: bench.direct[place] };
    const opened = async (format, count) => {
      const disk = await bench.open(paths[format], format, { cache: 'none', queues: count });
      try {
        return await engine(bench, disk, load);
      } finally {
        await disk.close();
      }
    };
    await bench.compare({
      group: `4 KiB ${rw} over queues, depth 32 each, ${bench.where[place]}`,
      ...{ unit: 'IOPS', base: FIO, rounds: SLICE_ROUNDS },
      x: { name: 'queues', values: [1, 2, 3, 4] },
      contenders: [
        {
          name: FIO,
          missing: bench.needs('fio'),
          run: (count) => fioFile(bench, paths.bare, { ...load, jobs: count }),
        },
        ...FORMATS.map((format) => ({ name: name(format), run: (at) => opened(format, at) })),
      ],
    });
  }
}

/**
 * Overwrites in place, one I/O and its record: class O1, which a device allows whose cache is not
 * volatile and that writes 4096 bytes at once. A loop device over a file has such sectors; that its
 * cache is not volatile is declared.
 */
async function inPlace(bench) {
  const size = sizeOf(bench);
  const room = 2 * size + size / 4 + 256 * MiB;
  const place = await fileSystemOf4kSectors(bench, join(bench.disk, 'sectors'), room);
  const disks = {};
  if (!place.missing) {
    bench.say('overwriting in place until the log went around three times');
    const options = { size, cache: 'none', assumeNonVolatile: true };
    for (const format of ['raw', 'sealed']) {
      disks[format] = await makeDisk(bench, place.path, format, options);
    }
    await wrapLog(bench, disks.sealed);
  }
  const contender = (format) => ({
    ...{ name: name(format), missing: place.missing },
    run: () => engine(bench, disks[format], { rw: 'randwrite' }),
  });
  await bench.compare({
    group: `4 KiB random overwrite, depth 32, ${bench.where.disk}, declared non-volatile`,
    about:
      `On ext4 over a loop device with sectors of 4096 bytes, itself a file on the disk. ` +
      `Sealed: ${disks.sealed?.facts.durabilityClass ?? 'not measured'}.`,
    ...{ unit: 'IOPS', base: name('raw'), contenders: ['raw', 'sealed'].map(contender) },
    targets: [{ name: name('sealed'), to: name('raw'), atLeast: 0.85 }],
  });
  for (const disk of Object.values(disks)) await disk.close();
  place.release?.();
}

/** The engine alone: every system call and the device taken away. See hotpath_bench.cc. */
async function overNothing(bench) {
  const program = await bench.build('bench_hotpath');
  const wanted = { raw: 2e6, qcow2: 2e6, sealed: 1e6 };
  const run = async (format) => {
    const words = ['null', format, `dir=${bench.disk}`, 'rounds=1', 'json'];
    const { iops, ns } = JSON.parse(await bench.run(program, words));
    return { value: iops, ns };
  };
  await bench.compare({
    group: '4 KiB random read over a null back end, one core',
    about:
      "Of the processor time of a queue's thread. A sealed read is opened for real; the copy that " +
      'stands for the device is taken off.',
    unit: 'IOPS',
    contenders: FORMATS.map((format) => ({ name: name(format), run: () => run(format) })),
    targets: FORMATS.map((format) => ({ name: name(format), atLeast: wanted[format] })),
  });
}

async function inOnePlace(bench, place) {
  bench.say(`disks of ${sizeOf(bench) / MiB} MiB, ${bench.where[place]}`);
  const disks = {};
  const options = { size: sizeOf(bench), cache: 'none' };
  for (const format of FORMATS) {
    disks[format] = await makeDisk(bench, bench[place], format, options);
  }
  disks.bare = await makeDisk(bench, bench[place], 'raw', { ...options, name: 'bare' });
  if (!bench.quick) await justWritten(bench, disks, place);
  for (const key of Object.keys(disks)) {
    disks[key] = await rested(bench, disks[key], { cache: 'none' });
  }
  await small(bench, disks, place);
  if (!bench.quick || place === 'disk') await large(bench, disks, place);
  if (!bench.quick) {
    await cold(bench, disks, place);
    await slices(bench, disks, place);
  }
  const paths = Object.fromEntries(Object.keys(disks).map((key) => [key, disks[key].facts.path]));
  for (const disk of Object.values(disks)) await disk.close();
  if (!bench.quick) await queues(bench, paths, place);
}

export default {
  name: 'engine',
  about: 'raw, qcow2 and sealed disks on the engine, beside fio on the bare file',
  async run(bench) {
    await overNothing(bench);
    await inOnePlace(bench, 'ram');
    await inOnePlace(bench, 'disk');
    await inPlace(bench);
  },
};
