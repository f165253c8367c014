// Room cli/: `pqblk create`: a new, empty disk.
import { existsSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { type Command, Option } from 'commander';
import { PqblkError } from '../errors.js';
import { type CreateDiskOptions, createDisk, type DiskFormat, diskInfo } from '../index.js';
import { showInfo } from './info.js';
import { addMakeOptions, type MakeFlags, makeOptions } from './making.js';
import { FORMATS } from './opening.js';
import {
  examples,
  forbidCoreFiles,
  jsonOption,
  parseCount,
  sizeArgument,
  storeOption,
} from './options.js';
import { policyOf, policyOption } from './policy.js';
import type { Terminal } from './terminal.js';

const VERSIONS = { '0.10': 2, '1.1': 3, '2': 2, '3': 3 } as const;

interface Flags extends MakeFlags {
  format: DiskFormat;
  backing?: string;
  backingFormat?: 'raw' | 'qcow2';
  refcountBits?: number;
  extendedL2?: boolean;
  compat?: keyof typeof VERSIONS;
  json?: boolean;
}

export function addCreate(program: Command, terminal: Terminal): void {
  const command = program
    .command('create <path> <size>')
    .description('Make a new, empty disk, sealed unless another format is asked for.')
    .addOption(new Option('--format <format>', 'what to make').choices(FORMATS).default('sealed'));
  addMakeOptions(forbidCoreFiles(command))
    .option('--backing <file>', 'what lies below, read where nothing was written yet')
    .addOption(
      new Option('--backing-format <format>', 'format of that file').choices(['raw', 'qcow2']),
    )
    .addOption(
      new Option('--refcount-bits <n>', 'qcow2: 1, 2, 4 … 64 (default: 16)').argParser(parseCount),
    )
    .option('--extended-l2', 'qcow2: allocate in 32nds of a cluster')
    .addOption(
      new Option('--compat <version>', 'qcow2: 0.10 or 2, 1.1 or 3 (default: 3)').choices(
        Object.keys(VERSIONS),
      ),
    )
    .option('--force', 'replace a file that is there; allow directories of the system')
    .addOption(storeOption())
    .addOption(policyOption())
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk create vm.sealed 20G --key alice --key ./bob.pub',
        'pqblk create vm.qcow2 20G --format qcow2 --preallocation metadata',
        'pqblk create top.qcow2 20G --format qcow2 --backing base.qcow2 --backing-format qcow2',
      ),
    )
    .action(async (path: string, size: string, flags: Flags) => {
      requireBacking(path, flags);
      if (flags.force) await requireReplaceable(path, flags);
      const options = await makeOptions(flags.format, sizeArgument(size), flags);
      const bar = terminal.progress('preallocate');
      try {
        await createDisk(path, {
          ...options,
          ...qcow2Options(flags),
          onProgress: bar.update,
          signal: terminal.signal,
        });
      } finally {
        bar.stop();
      }
      await showInfo(terminal, await diskInfo(path, flags.format), flags.json);
    });
}

/**
 * Another disk in the place of a sealed one ends every key of that, which nobody approves here. Kind `policy`
 * where two persons are demanded for it.
 */
async function requireReplaceable(path: string, flags: Flags): Promise<void> {
  const policy = await policyOf(flags);
  if (!policy?.twoPersons.includes('slot-revoke') || !existsSync(path)) return;
  const { format } = await diskInfo(path);
  if (format !== 'sealed') return;
  throw new PqblkError('policy', 'there is a sealed disk, and all of its keys would be revoked', {
    path,
    operation: 'replace disk',
    hint: 'the policy demands two persons for that: move the disk away instead',
  });
}

/** A relative name is looked for beside the new image, as it will be when that is opened. */
function requireBacking(path: string, flags: Flags): void {
  const { backing, backingFormat } = flags;
  if (backing === undefined) {
    if (backingFormat === undefined) return;
    throw new PqblkError('usage', '--backing-format means nothing without --backing');
  }
  const file = resolve(dirname(path), backing);
  if (existsSync(file)) return;
  throw new PqblkError('not_found', 'there is no such file to lie below', {
    path: file,
    hint: 'a relative --backing is taken from the directory of the new disk',
  });
}

function qcow2Options(flags: Flags): Partial<CreateDiskOptions> {
  const { backing, backingFormat, refcountBits, extendedL2, compat } = flags;
  return {
    ...(backing !== undefined && { backingName: backing }),
    ...(backingFormat !== undefined && { backingFormat }),
    ...(refcountBits !== undefined && { refcountBits }),
    ...(extendedL2 && { extendedL2 }),
    ...(compat !== undefined && { version: VERSIONS[compat] }),
  };
}
