// Room cli/: `pqblk bench`: fio-like load, driven by the engine on its own queues.
import { type Command, InvalidArgumentError, Option } from 'commander';
import type { BenchDirection, BenchPattern, BenchResult, BenchSpec, Disk } from '../index.js';
import {
  addEngineOptions,
  addOpenOptions,
  type EngineFlags,
  engineOptions,
  keyOption,
  type OpenFlags,
  withDisk,
} from './opening.js';
import { examples, jsonOption, parseCount, parsePercent, sizeArgument } from './options.js';
import { formatSize } from './sizes.js';
import type { Terminal } from './terminal.js';

const PATTERNS: readonly BenchPattern[] = ['read', 'write', 'randread', 'randwrite', 'randrw'];
const DEFAULT_SECONDS = 10;

interface Flags extends OpenFlags, EngineFlags {
  rw: BenchPattern;
  bs: number;
  stride?: number;
  iodepth: number;
  size?: number;
  runtime?: number;
  ramp?: number;
  seed?: number;
  rwmixread: number;
  fdatasync?: number;
  json?: boolean;
}

export function addBench(program: Command, terminal: Terminal): void {
  const command = program
    .command('bench <disk>')
    .description('Measure a disk. The patterns that write DESTROY what is in it.')
    .addOption(new Option('--rw <pattern>', 'load').choices(PATTERNS).default('randread'))
    .addOption(
      new Option('--bs <size>', 'bytes of a request').argParser(sizeArgument).default(4096),
    )
    .addOption(
      new Option(
        '--stride <size>',
        'from one place to the next (default: --bs); more spreads a small working set',
      ).argParser(sizeArgument),
    )
    .addOption(
      new Option('--iodepth <n>', 'requests in flight on each queue')
        .argParser(parseCount)
        .default(32),
    )
    .addOption(
      new Option(
        '--size <size>',
        'how much of the disk, from its start (default: all of it)',
      ).argParser(sizeArgument),
    )
    .addOption(
      new Option(
        '--runtime <seconds>',
        `how long (default: ${DEFAULT_SECONDS}, or until --size was moved once)`,
      ).argParser(parseSeconds),
    )
    .addOption(
      new Option('--ramp <seconds>', 'run so long before counting').argParser(parseSeconds),
    )
    .addOption(
      new Option('--rwmixread <percent>', 'randrw: share of reads')
        .argParser(parsePercent)
        .default(50),
    )
    .addOption(
      new Option('--fdatasync <n>', 'flush after so many writes of a queue').argParser(parseCount),
    )
    .addOption(new Option('--seed <n>', 'of the random offsets').argParser(parseCount))
    .addOption(keyOption());
  addOpenOptions(addEngineOptions(command))
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk bench vm.sealed --key alice --rw randread --iodepth 32 --runtime 5',
        'pqblk bench vm.qcow2 --rw read --bs 1M --iodepth 8 --queues 2 --json',
        'pqblk bench vm.sealed --key alice --rw randwrite --iodepth 1 --fdatasync 1 --runtime 5',
      ),
    )
    .action(async (path: string, flags: Flags) => {
      const how = engineOptions(flags);
      const { cache } = how;
      const readOnly = flags.rw === 'read' || flags.rw === 'randread';
      await withDisk(path, flags, { ...how, readOnly }, async (disk) => {
        const spec = specOf(flags);
        const result = await measure(terminal, disk, spec);
        if (flags.json) terminal.json({ path, disk: disk.facts, cache, spec, ...result });
        else show(terminal, disk, flags, result);
      });
    });
}

function parseSeconds(text: string): number {
  if (/^\d+(\.\d+)?s?$/.test(text)) return Number.parseFloat(text);
  throw new InvalidArgumentError('expected seconds.');
}

function specOf(flags: Flags): BenchSpec {
  const { rw, bs, stride, iodepth, size, runtime, ramp, seed, rwmixread, fdatasync } = flags;
  const seconds = runtime ?? (size === undefined ? DEFAULT_SECONDS : 0);
  return {
    rw,
    blockSize: bs,
    iodepth,
    readPercent: rwmixread,
    runtimeMs: Math.round(seconds * 1000),
    ...(stride !== undefined && { stride }),
    ...(ramp !== undefined && { rampMs: Math.round(ramp * 1000) }),
    ...(size !== undefined && { size }),
    ...(seed !== undefined && { seed }),
    ...(fdatasync !== undefined && { flushEvery: fdatasync }),
  };
}

async function measure(terminal: Terminal, disk: Disk, spec: BenchSpec): Promise<BenchResult> {
  const bar = terminal.progress('bench', 'steps');
  try {
    return await disk.bench(spec, { onProgress: bar.update, signal: terminal.signal });
  } finally {
    bar.stop();
  }
}

function show(terminal: Terminal, disk: Disk, flags: Flags, result: BenchResult): void {
  const { facts } = disk;
  const cipher = facts.suite ? `, ${facts.suite} by ${facts.aead}` : '';
  const access = facts.direct ? 'O_DIRECT' : 'buffered';
  terminal.line(
    `${facts.format}${cipher}; ${facts.engine}, ${access}; ${flags.rw}, ${formatSize(flags.bs)}, ` +
      `depth ${flags.iodepth}, ${result.queues} queue(s), ${result.seconds.toFixed(1)} s`,
  );
  const directions = [
    ['read', result.read],
    ['write', result.write],
    ['flush', result.flush],
  ] as const;
  terminal.table(
    ['', 'IOPS', 'MB/s', 'MEAN µs', 'P50', 'P99', 'P99.9', 'MAX'],
    directions.filter(([, side]) => side.ops > 0).map(([name, side]) => row(name, side)),
  );
}

function row(name: string, side: BenchDirection): string[] {
  const { mean, p50, p99, p99_9: p999, max } = side.latencyMicroseconds;
  const megabytes = (side.bytesPerSecond / 1e6).toFixed(1);
  const latencies = [mean, p50, p99, p999, max].map((value) => value.toFixed(1));
  return [name, side.iops.toFixed(0), megabytes, ...latencies];
}
