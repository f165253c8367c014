// The set `node`: what a Node program gets from a disk, beside what it gets from the bare file.
//
// Reads at random offsets, closed loop, in this process: pqblk's promises (`disk.read`) and batched
// queue (`disk.queue`) on raw, qcow2 and sealed disks, against FileHandle.read of
// fs.promises and fs.read of node:fs (which run on libuv's four threads). All are opened for O_DIRECT
// where the file system has it, and read into memory that is aligned for it.
import fs from 'node:fs';
import { join } from 'node:path';
import { makeDisk, makeNoise } from '../lib/disks.mjs';
import { batched, calledBack, promised } from '../lib/node-loads.mjs';

const KiB = 1024;
const MiB = 1024 * KiB;
const FORMATS = ['raw', 'qcow2', 'sealed'];

/** `inQuick`: also in a short run. */
const LOADS = [
  { place: 'ram', bytes: 4 * KiB, depth: 1, inQuick: true },
  { place: 'ram', bytes: 4 * KiB, depth: 32, inQuick: true },
  { place: 'ram', bytes: 64 * KiB, depth: 8 },
  { place: 'ram', bytes: MiB, depth: 4 },
  { place: 'disk', bytes: 4 * KiB, depth: 1 },
  { place: 'disk', bytes: 4 * KiB, depth: 32, inQuick: true },
  { place: 'disk', bytes: MiB, depth: 4 },
];
const DEPTHS = [1, 2, 4, 8, 16, 32, 64, 128];

const sizeName = (bytes) => (bytes < MiB ? `${bytes / KiB} KiB` : `${bytes / MiB} MiB`);
const placeName = (bench, place) =>
  place === 'ram' ? 'RAM' : `disk, ${bench.direct.disk ? 'O_DIRECT' : 'page cache'}`;

/** A disk of noise in each of these formats, and a bare file, all open. */
async function openAll(bench, place, size, formats) {
  bench.say(`${sizeName(size)} of noise in each format, ${placeName(bench, place)}`);
  const disks = {};
  for (const format of formats)
    disks[format] = await makeDisk(bench, bench[place], format, { size });
  const file = await makeNoise(bench, join(bench[place], 'bare'), size);
  const { O_RDONLY, O_DIRECT } = fs.constants;
  const handle = await fs.promises.open(file, O_RDONLY | (bench.direct[place] ? O_DIRECT : 0));
  bench.defer(() => handle.close());
  return { disks, formats, handle, size };
}

/** Memory for `depth` requests of `bytes`, aligned as O_DIRECT wants it: the arena of a queue. */
function alignedBuffers(disk, bytes, depth) {
  const { arena } = disk.queue(depth, { arenaBytes: depth * bytes });
  return Array.from({ length: depth }, (_, i) => arena.subarray(i * bytes, (i + 1) * bytes));
}

/** Contender → what measures it once; IOPS and latencies, or bytes a second. */
function contendersOf(opened, { bytes, depth, seconds, formats = opened.formats }) {
  const { disks, handle, size } = opened;
  const how = { buffers: alignedBuffers(disks.raw, bytes, depth), bytes, size, seconds };
  const byPromise = (buffer, offset) => handle.read(buffer, 0, bytes, offset);
  const byCallback = (buffer, offset, done) =>
    fs.read(handle.fd, buffer, 0, bytes, offset, (error, count) =>
      done(error ?? (count === bytes ? null : new Error(`a short read: ${count}`))),
    );
  // The functions of lib/node-loads.mjs that go on asking.
  const words = `{ bytes: ${bytes}, size: ${size}, seconds: ${seconds}`;
  const spec = `${words}, buffers })  // ${depth} of them`;
  const contenders = [
    {
      name: 'fs.promises',
      call: `promised((buffer, at) => handle.read(buffer, 0, ${bytes}, at), ${spec}`,
      run: () => promised(byPromise, how),
    },
    {
      name: 'node:fs',
      call: `calledBack((buffer, at, done) => fs.read(fd, buffer, 0, ${bytes}, at, done), ${spec}`,
      run: () => calledBack(byCallback, how),
    },
  ];
  for (const format of formats) {
    const disk = disks[format];
    const queue = disk.queue(depth, { arenaBytes: depth * bytes });
    contenders.push(
      {
        name: `${format}, read()`,
        call: `promised((buffer, at) => disk.read(buffer, at), ${spec}`,
        run: () => promised((b, at) => disk.read(b, at), how),
      },
      {
        name: `${format}, queue()`,
        call: `batched(disk.queue(${depth}, { arenaBytes: ${depth * bytes} }), ${words} })`,
        run: () => batched(queue, how),
      },
    );
  }
  return contenders;
}

/** One way to count: operations for small requests, bytes for large ones. */
function counted(contender, bytes) {
  const run = async (x) => {
    const { iops, p50, p90, p99, p99_9 } = await contender.run(x);
    return { value: bytes < 64 * KiB ? iops : (iops * bytes) / 1e6, p50, p90, p99, p99_9 };
  };
  return { ...contender, run };
}

const TARGETS = [
  { name: 'raw, read()', to: 'fs.promises', atLeast: 1 },
  { name: 'raw, queue()', to: 'node:fs', atLeast: 1 },
];

async function compareLoad(bench, opened, { place, bytes, depth }) {
  const contenders = contendersOf(opened, { bytes, depth, seconds: bench.seconds });
  await bench.compare({
    group: `random read, ${sizeName(bytes)}, depth ${depth}, ${placeName(bench, place)}`,
    about: 'One Node process, one disk queue; libuv with its four threads.',
    unit: bytes < 64 * KiB ? 'IOPS' : 'MB/s',
    base: 'fs.promises',
    contenders: contenders.map((contender) => counted(contender, bytes)),
    targets: bytes < 64 * KiB ? TARGETS : [],
  });
}

/** What a Node program gains by asking for more at once. */
async function compareDepths(bench, opened) {
  const bytes = 4 * KiB;
  const seconds = Math.min(1, bench.seconds);
  const formats = ['raw', 'sealed'];
  const byDepth = new Map(
    DEPTHS.map((depth) => [depth, contendersOf(opened, { bytes, depth, seconds, formats })]),
  );
  const names = byDepth.get(DEPTHS[0]).map(({ name }) => name);
  const callsOf = (i) => DEPTHS.map((depth) => byDepth.get(depth)[i].call);
  await bench.compare({
    group: 'random read over depth, 4 KiB, RAM',
    about: 'How many 4 KiB reads a second one Node process gets, by how many it asks for at once.',
    unit: 'IOPS',
    base: 'fs.promises',
    x: { name: 'requests in flight', values: DEPTHS, log: true },
    contenders: names.map((name, i) => {
      return counted(
        { name, call: callsOf(i), run: (depth) => byDepth.get(depth)[i].run() },
        bytes,
      );
    }),
  });
}

export default {
  name: 'node',
  about: 'the Node API, promises and batches, against fs.promises and node:fs on the bare file',
  async run(bench) {
    const loads = LOADS.filter(({ inQuick }) => inQuick || !bench.quick);
    const formats = bench.quick ? ['raw', 'sealed'] : FORMATS;
    const size = bench.quick ? 64 * MiB : 256 * MiB;
    for (const place of ['ram', 'disk']) {
      const opened = await openAll(bench, place, size, formats);
      for (const load of loads.filter((each) => each.place === place)) {
        await compareLoad(bench, opened, load);
      }
      if (place === 'ram' && !bench.quick) await compareDepths(bench, opened);
    }
  },
};
