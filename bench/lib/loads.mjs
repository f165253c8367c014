// The loads: fio on a file or over NBD, the engine's own bench on an open disk, and our vhost-user
// front-end on a server's socket. Each takes
//
//   { rw, bs = 4096, depth = 32, jobs = 1, seconds, ramp, size, offset, readPercent = 70, fdatasync,
//     direct, unit }
//
// and answers { value, mean, p50, p90, p99, p99_9 }: operations a second (reads and writes together)
// or, for blocks of 64 KiB and more or where `unit` says so, MB/s; latencies in microseconds.
import { firstLine } from './processes.mjs';

const MB = 1e6;

const LARGE = 65536;

const figure = ({ bs = 4096, unit = bs >= LARGE ? 'MB/s' : 'IOPS' }, iops) =>
  unit === 'MB/s' ? (iops * bs) / MB : iops;

const ms = (seconds) => `${Math.round(seconds * 1000)}ms`;

/** Latencies of the direction that did more. */
function fioLatency(job) {
  const side = job.read.total_ios >= job.write.total_ios ? job.read : job.write;
  const { mean, percentile = {} } = side.clat_ns;
  const at = (percent) => (percentile[percent.toFixed(6)] ?? Number.NaN) / 1e3;
  return { mean: mean / 1e3, p50: at(50), p90: at(90), p99: at(99), p99_9: at(99.9) };
}

async function fio(bench, load, args) {
  const { rw, bs = 4096, depth = 32, jobs = 1, seconds = bench.seconds } = load;
  const { ramp = bench.rampSeconds, size, offset, readPercent = 70, fdatasync } = load;
  const output = await bench.run('fio', [
    ...['--name=bench', `--rw=${rw}`, `--bs=${bs}`, `--iodepth=${depth}`, `--numjobs=${jobs}`],
    ...['--time_based', `--runtime=${ms(seconds)}`, `--ramp_time=${ms(ramp)}`, '--randrepeat=0'],
    ...['--norandommap', '--thread', '--group_reporting', '--output-format=json'],
    ...(rw === 'randrw' ? [`--rwmixread=${readPercent}`] : []),
    ...(size ? [`--size=${size}`] : []),
    ...(offset ? [`--offset=${offset}`] : []),
    ...(fdatasync ? [`--fdatasync=${fdatasync}`] : []),
    ...args,
  ]);
  const [job] = JSON.parse(output.slice(output.indexOf('{'))).jobs;
  return { value: figure(load, job.read.iops + job.write.iops), ...fioLatency(job) };
}

/** fio on a file, with io_uring unless told otherwise; `fixed`: registered buffers and files. */
export const fioFile = (bench, path, load) =>
  fio(bench, load, [
    ...[`--filename=${path}`, `--direct=${load.direct ? 1 : 0}`],
    `--ioengine=${load.ioengine ?? 'io_uring'}`,
    ...(load.fixed ? ['--fixedbufs', '--registerfiles'] : []),
  ]);

/** fio's own NBD client. */
export const fioNbd = (bench, uri, load) => fio(bench, load, ['--ioengine=nbd', `--uri=${uri}`]);

// Each sample goes to other places of the disk.
let seed = 0;

/** The engine's own load on an open disk, on the disk's queues: what `pqblk bench` runs. */
export async function engine(bench, disk, load) {
  const { rw, bs = 4096, depth = 32, seconds = bench.seconds, ramp = bench.rampSeconds } = load;
  const { size, readPercent = 70, fdatasync } = load;
  seed += 1;
  const spec = {
    ...{ rw, blockSize: bs, iodepth: depth, readPercent, seed },
    ...{ runtimeMs: Math.round(seconds * 1000), rampMs: Math.round(ramp * 1000) },
    ...(size && { size }),
    ...(fdatasync && { flushEvery: fdatasync }),
  };
  bench.loadCommand(disk, spec);
  const { read, write } = await disk.bench(spec, { signal: bench.signal });
  const { mean, p50, p90, p99, p99_9 } = (read.ops >= write.ops ? read : write).latencyMicroseconds;
  return { value: figure(load, read.iops + write.iops), mean, p50, p90, p99, p99_9 };
}

/** A front-end of `rings` rings, each with a thread that polls (`poll`) or sleeps (`call`). */
export async function vhost(bench, program, socket, load) {
  const { rw, bs = 4096, depth = 32, rings = 1, wait = 'poll', size } = load;
  const { seconds = bench.seconds, ramp = bench.rampSeconds } = load;
  const output = await bench.run(
    program,
    [
      ...[socket, 'attach', rw, `rings=${rings}`, `wait=${wait}`, `depth=${depth}`, `bs=${bs}`],
      ...[
        `size=${size}`,
        `ms=${Math.round(seconds * 1000)}`,
        `ramp=${Math.round(ramp * 1000)}`,
        'json',
      ],
    ],
    { timeoutMs: (seconds + ramp + 60) * 1000 },
  );
  const {
    iops,
    mean_us: mean,
    p50_us: p50,
    p90_us: p90,
    p99_us: p99,
    p99_9_us,
  } = JSON.parse(output);
  return { value: figure(load, iops), mean, p50, p90, p99, p99_9: p99_9_us };
}

/** Drives the rings for a moment, then calls `look` while the front-end stays and asks nothing. */
export async function vhostThen(bench, program, socket, { rings, size, stayMs }, look) {
  const words = [`rings=${rings}`, 'wait=call', 'depth=32', 'json', `size=${size}`];
  const args = [socket, 'attach', 'randwrite', ...words, 'ms=700', `stay=${stayMs}`];
  const child = bench.start(program, args);
  try {
    await firstLine(child, 'bench_vhost');
    return await look();
  } finally {
    await bench.stop(child, 'SIGKILL');
  }
}
