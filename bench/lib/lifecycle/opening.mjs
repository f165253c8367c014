// Lifecycle: opening disks through the API, clean, unclean, small and huge.
import { copyFile, constants as fsConstants, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { createDisk, openDisk, openKeyArea, readKeyArea } from '../../../dist/index.js';
import { timeCalls, timeOnce } from '../api-time.mjs';
import { makeDisk } from '../disks.mjs';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const TiB = 2 ** 40;

/** A disk that was never written: sparse, whatever its size. */
async function emptyDisk(bench, format, size, name) {
  const path = join(bench.ram, `${name}.${format}`);
  const sealed = format === 'sealed' ? { recipients: [await bench.recipient()] } : {};
  await createDisk(path, { format, size, ...sealed });
  bench.defer(() => rm(path, { force: true }));
  return path;
}

/** Opens and closes. `unlock alone`: from the key area to the keys, without the engine. */
async function compareOpen(bench) {
  const identity = await bench.identity();
  const seconds = Math.min(bench.seconds, 1);
  const opening = async (name, format, size) => {
    const path = await emptyDisk(bench, format, size, `open-${size}`);
    const keys = format === 'sealed' ? { identity } : {};
    const call = async () => await (await openDisk(path, { format, ...keys })).close();
    const words =
      format === 'sealed' ? `{ format: 'sealed', identity }` : `{ format: '${format}' }`;
    return {
      ...{ name, call: `await (await openDisk('${path}', ${words})).close()` },
      run: () => timeCalls(call, seconds),
    };
  };
  const area = await emptyDisk(bench, 'sealed', GiB, 'area');
  const unlock = async () => {
    (await openKeyArea(await readKeyArea(area), identity))[Symbol.dispose]();
  };
  await bench.compare({
    group: 'open and close, API',
    about:
      'openDisk() and close() on sparse disks in memory, software key at hand; ms, median of calls.',
    unit: 'ms',
    better: 'less',
    base: 'raw, 1 TiB',
    contenders: [
      await opening('raw, 1 TiB', 'raw', TiB),
      await opening('qcow2, 1 TiB', 'qcow2', TiB),
      await opening('sealed, 1 GiB', 'sealed', GiB),
      await opening('sealed, 1 TiB', 'sealed', TiB),
      {
        name: 'unlock alone (ML-KEM-768)',
        call: `await openKeyArea(await readKeyArea('${area}'), identity)`,
        run: () => timeCalls(unlock, seconds),
      },
    ],
  });
}

const openCall = (path) => `await openDisk('${path}', { format: 'sealed', identity })`;

/** Milliseconds until the disk is open. */
async function openOnce(path, identity) {
  let disk;
  const value = await timeOnce(async () => {
    disk = await openDisk(path, { format: 'sealed', identity });
  });
  await disk.close();
  return value;
}

/**
 * The log of a disk in use as a crash leaves it: a copy of the file, taken while nothing is in flight
 * and nobody has closed it.
 */
async function compareRecovery(bench) {
  const size = bench.quick ? 128 * MiB : GiB;
  const disk = await makeDisk(bench, bench.ram, 'sealed', { size, name: 'crash' });
  await disk.bench({ rw: 'randwrite', iodepth: 32, runtimeMs: 500 });
  await disk.flush();
  const { logUsed } = disk.stats().backend;
  const copy = join(bench.ram, 'crashed.sealed');
  const identity = await bench.identity();
  const crashed = async () => {
    await copyFile(disk.facts.path, copy, fsConstants.COPYFILE_EXCL);
    try {
      return await openOnce(copy, identity);
    } finally {
      await rm(copy, { force: true });
    }
  };
  const clean = await emptyDisk(bench, 'sealed', size, 'clean');
  await bench.compare({
    group: 'open after a crash, API',
    about:
      `openDisk() of a sealed disk of ${size / MiB} MiB in memory whose log holds ` +
      `${(logUsed / MiB).toFixed(0)} MiB that were never written home.`,
    unit: 'ms',
    better: 'less',
    base: 'closed cleanly',
    contenders: [
      {
        ...{ name: 'closed cleanly', call: openCall(clean) },
        run: () => openOnce(clean, identity),
      },
      {
        name: 'killed under random writes',
        call: [`cp ${disk.facts.path} ${copy}  # while it is open`, openCall(copy)],
        run: crashed,
      },
    ],
  });
  await disk.close();
  await rm(disk.facts.path);
}

export async function opening(bench) {
  await compareOpen(bench);
  await compareRecovery(bench);
}
