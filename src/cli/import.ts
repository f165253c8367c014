// Room cli/: `pqblk import`: the content of a raw or qcow2 file into a new or empty disk.
import { existsSync } from 'node:fs';
import { type Command, Option } from 'commander';
import { PqblkError } from '../errors.js';
import {
  type CopyResult,
  copyDisk,
  copyToNewDisk,
  type Disk,
  type LongWork,
  type OpenDiskOptions,
  openDisk,
} from '../index.js';
import { copying, showCopy } from './copying.js';
import { addMakeOptions, type MakeFlags, makeOptions } from './making.js';
import { addOpenOptions, formatByName, formatOf, type OpenFlags, withDisk } from './opening.js';
import { collect, examples, jsonOption, sizeArgument } from './options.js';
import type { Terminal } from './terminal.js';

type SourceFormat = 'raw' | 'qcow2';

interface Flags extends Omit<MakeFlags, 'store'>, Omit<OpenFlags, 'key'> {
  sourceFormat?: SourceFormat;
  sourceBacking?: string[];
  size?: number;
  key?: string[];
  json?: boolean;
}

export function addImport(program: Command, terminal: Terminal): void {
  const command = program
    .command('import <source> <disk>')
    .description('Copy a raw or qcow2 file into a disk; the disk is made where there is none.')
    .addOption(
      new Option('--source-format <format>', 'what the source is (default: by its name)').choices([
        'raw',
        'qcow2',
      ]),
    )
    .addOption(
      new Option('--source-backing <file>', "backing file the source may name; 'any': any")
        .argParser(collect)
        .default(undefined),
    );
  addOpenOptions(addMakeOptions(command))
    .addOption(
      new Option('--size <size>', 'of a new disk (default: that of the source)').argParser(
        sizeArgument,
      ),
    )
    .option('--force', 'write over a disk that holds data; allow directories of the system')
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk import old.qcow2 vm.sealed --key alice',
        'pqblk import /dev/vg/old vm.sealed --source-format raw --key alice --key ./bob.pub',
        'pqblk import vm.raw vm.qcow2 --format qcow2',
      ),
    )
    .action(async (source: string, path: string, flags: Flags) => {
      const result = await copying(terminal, 'import', (work) => copy(source, path, flags, work));
      showCopy(terminal, source, path, result, flags.json);
    });
}

async function copy(
  path: string,
  target: string,
  flags: Flags,
  work: LongWork,
): Promise<CopyResult> {
  await using source = await openDisk(path, sourceOptions(path, flags));
  if (!existsSync(target)) {
    const size = flags.size ?? source.size;
    const make = await makeOptions(formatOf(target, flags), size, flags);
    return await copyToNewDisk(source, target, make, work);
  }
  requireNoMakeFlags(target, flags);
  return await withDisk(target, flags, {}, async (disk) => {
    if (!flags.force) await requireEmpty(disk, target);
    return await copyDisk(source, disk, work);
  });
}

/** Copying over a disk destroys what is in it; only an empty one needs no word for that. */
async function requireEmpty(disk: Disk, path: string): Promise<void> {
  for await (const { kind } of disk.extents()) {
    if (kind !== 'data') continue;
    throw new PqblkError('exists', 'the disk holds data already', {
      path,
      operation: 'import',
      hint: '--force writes over it',
    });
  }
}

function requireNoMakeFlags(path: string, flags: Flags): void {
  const given = (['size', 'suite', 'clusterSize', 'logSize', 'preallocation'] as const).find(
    (name) => flags[name] !== undefined,
  );
  if (!given) return;
  throw new PqblkError('exists', `the disk is there already; its ${given} was chosen with it`, {
    path,
    operation: 'import',
  });
}

function sourceOptions(path: string, flags: Flags): OpenDiskOptions {
  const format = flags.sourceFormat ?? formatByName(path);
  if (format === undefined) {
    throw new PqblkError('usage', `the name '${path}' does not say what the source is`, {
      hint: 'say --source-format raw or qcow2; it is not probed, since its guest wrote the content',
    });
  }
  const { sourceBacking: backing } = flags;
  return {
    format,
    readOnly: true,
    cache: 'writeback',
    ...(backing !== undefined && { allowBacking: backing.includes('any') || backing }),
  };
}
