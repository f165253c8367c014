// The demo's last table: what fio gets from a file, and what pqblk gets from a disk in such a file.
import { spawnSync } from 'node:child_process';
import { closeSync, constants, openSync } from 'node:fs';

const SECONDS = 2;
const RAMP_SECONDS = 0.5;

/** The loads: 4 KiB at random with 32 in flight, and 1 MiB in order with 8. */
export const LOADS = [
  { heading: '4K randread IOPS', rw: 'randread', bs: '4k', iodepth: 32, unit: 'iops' },
  { heading: '4K randwrite IOPS', rw: 'randwrite', bs: '4k', iodepth: 32, unit: 'iops' },
  { heading: '1M read MB/s', rw: 'read', bs: '1m', iodepth: 8, unit: 'bytes' },
];

export function directIoWorks(path) {
  try {
    closeSync(openSync(path, constants.O_RDONLY | constants.O_DIRECT));
    return true;
  } catch {
    return false;
  }
}

/** fio with io_uring on a plain file: the yardstick. */
export function fio(path, load) {
  const { status, stdout, stderr } = spawnSync(
    'fio',
    [
      ...['--name=demo', `--filename=${path}`, '--ioengine=io_uring', '--output-format=json'],
      ...[`--rw=${load.rw}`, `--bs=${load.bs}`, `--iodepth=${load.iodepth}`, '--time_based'],
      ...[`--runtime=${SECONDS}`, `--ramp_time=${RAMP_SECONDS}`, '--randrepeat=0', '--norandommap'],
      `--direct=${directIoWorks(path) ? 1 : 0}`,
    ],
    { encoding: 'utf8' },
  );
  if (status !== 0) throw new Error(`fio: exit ${status}\n${stderr}`);
  const [job] = JSON.parse(stdout.slice(stdout.indexOf('{'))).jobs;
  const side = load.rw.endsWith('write') ? job.write : job.read;
  return load.unit === 'iops' ? side.iops : side.bw_bytes;
}

/** The same load through `pqblk bench`; `options` say how the disk is opened. */
export function pqblkBench(pqblk, path, options, load) {
  const result = pqblk.json([
    ...['bench', path, ...options, '--rw', load.rw, '--bs', load.bs],
    ...['--iodepth', `${load.iodepth}`, '--runtime', `${SECONDS}`, '--ramp', `${RAMP_SECONDS}`],
  ]);
  const side = load.rw.endsWith('write') ? result.write : result.read;
  return load.unit === 'iops' ? side.iops : side.bytesPerSecond;
}

/** 123456 → `123.5k`; 7 500 000 000 bytes/s → `7500`. */
export function show(value, load) {
  if (load.unit === 'bytes') return (value / 1e6).toFixed(0);
  return value >= 1e6 ? `${(value / 1e6).toFixed(2)}M` : `${(value / 1e3).toFixed(1)}k`;
}
