// Set flush: what a database does. One 4 KiB write, a flush, and only then the next.
import { makeDisk, sizeOf } from '../lib/disks.mjs';
import { engine, fioFile } from '../lib/loads.mjs';

const LOAD = { rw: 'randwrite', bs: 4096, depth: 1, fdatasync: 1 };
const FIO = 'fio io_uring, fdatasync';
const PWRITE = 'fio pwrite, fdatasync';
const FORMATS = ['raw', 'qcow2', 'sealed'];

async function compare(bench, place) {
  const size = sizeOf(bench) / 4;
  bench.say(`disks in ${bench.where[place]}`);
  const disks = {};
  for (const format of FORMATS) {
    disks[format] = await makeDisk(bench, bench[place], format, { size, cache: 'none' });
  }
  const ours = (format) => ({
    name: `pqblk ${format}`,
    run: () => engine(bench, disks[format], LOAD),
  });
  const fio = (name, ioengine) => ({
    ...{ name, missing: bench.needs('fio') },
    run: () =>
      fioFile(bench, disks.raw.facts.path, { ...LOAD, direct: bench.direct[place], ioengine }),
  });
  await bench.compare({
    group: `4 KiB write + flush, depth 1, ${bench.where[place]}`,
    about: `Writes a second, each durable before the next; latencies are the writes' alone. Sealed: ${disks.sealed.facts.durabilityClass}.`,
    ...{ unit: 'IOPS', base: FIO },
    contenders: [
      fio(FIO, 'io_uring'),
      fio(PWRITE, 'psync'),
      ...(bench.quick ? ['sealed'] : FORMATS).map(ours),
    ],
    // In memory a flush is nothing, and a plain pwrite a copy: to be seen, and no target.
    targets: (place === 'ram' ? [FIO] : [FIO, PWRITE]).map((to) => ({
      ...{ name: 'pqblk sealed', to, atLeast: 0.9 },
    })),
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
