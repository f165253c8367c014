// Set flush: what a database does. One 4 KiB write, a flush, and only then the next.

import { makeDisk, sizeOf } from '../lib/disks.mjs';
import { engine, fioFile } from '../lib/loads.mjs';

const LOAD = { rw: 'randwrite', bs: 4096, depth: 1, fdatasync: 1 };

async function compare(bench, place) {
  const size = sizeOf(bench) / 4;
  const direct = bench.direct[place];
  bench.say(`disks in ${place === 'ram' ? 'memory' : 'a file system'}`);
  const disks = {};
  for (const format of ['raw', 'qcow2', 'sealed']) {
    disks[format] = await makeDisk(bench, bench[place], format, { size, cache: 'none' });
  }
  const ours = (format) => ({
    name: `pqblk ${format}`,
    run: () => engine(bench, disks[format], LOAD),
  });
  await bench.compare({
    group: `4 KiB write + flush, depth 1, ${place === 'ram' ? 'RAM' : 'disk'}`,
    about: `Writes a second, each durable before the next. ${disks.sealed.facts.durabilityClass}.`,
    unit: 'IOPS',
    base: 'fio, fdatasync',
    contenders: [
      {
        name: 'fio, fdatasync',
        missing: bench.needs('fio'),
        run: () => fioFile(bench, disks.raw.facts.path, { ...LOAD, direct }),
      },
      {
        name: 'fio, pwrite and fdatasync',
        missing: bench.needs('fio'),
        run: () => fioFile(bench, disks.raw.facts.path, { ...LOAD, direct, ioengine: 'psync' }),
      },
      ...['raw', 'qcow2', 'sealed'].map(ours),
    ],
    targets: [{ name: 'pqblk sealed', to: 'fio, fdatasync', atLeast: 0.9 }],
  });
  for (const disk of Object.values(disks)) await disk.close();
}

export default {
  name: 'flush',
  about: 'write + flush at depth 1: the database case',
  async run(bench) {
    for (const place of ['ram', 'disk']) await compare(bench, place);
  },
};
