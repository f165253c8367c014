// Room cli/: `pqblk rotate-data-key`: everything on a sealed disk under a new key, in use or not.
import { availableParallelism } from 'node:os';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { PqblkError } from '../errors.js';
import {
  diskInfo,
  openDisk,
  planDataKeyRotation,
  type RotatedDataKey,
  type RotationHost,
  rotateDataKey,
} from '../index.js';
import { addBackingOptions, backingOptions, type OpenFlags } from './opening.js';
import { examples, parseCount, sizeArgument } from './options.js';
import { slotChecker } from './policy.js';
import { addRekeyOptions, type Permit, type RekeyFlags, withPermit } from './rekeying.js';
import { formatSize } from './sizes.js';
import type { Terminal } from './terminal.js';

const SECTOR_BYTES = 4096;
/** Of the time, on a disk that guests use: they keep most of the machine. */
const ONLINE_SHARE = 0.2;
/** Of a disk that nobody else uses: more only wait for the device. */
const QUEUES_MAX = 3;

type BackingFlags = Pick<OpenFlags, 'allowBacking' | 'allowUnauthenticatedBacking'>;

interface Flags extends RekeyFlags, BackingFlags {
  rate?: number;
  share?: number;
  fromEpoch?: number;
  abort?: boolean;
}

export function addRotateDataKey(program: Command, terminal: Terminal): void {
  const command = program
    .command('rotate-data-key <disk>')
    .description(
      'Write everything on a sealed disk again under a new data key, and forget the old.',
    )
    .addOption(
      new Option('--rate <size>', 'bytes a second at most (default: no limit)').argParser(
        sizeArgument,
      ),
    )
    .addOption(
      new Option(
        '--share <percent>',
        `part of the time that the rotation works (default: 100; ${ONLINE_SHARE * 100} where the ` +
          'disk is served)',
      ).argParser(parsePercent),
    )
    .addOption(
      new Option('--from-epoch <n>', 'only if the current epoch is this one').argParser(parseCount),
    )
    .option('--abort', 'go back to the current epoch, before a rotation has ended');
  addBackingOptions(addRekeyOptions(command))
    .addHelpText(
      'after',
      `
A disk that \`pqblk serve\` serves is rotated by that process, under its guests. Ctrl-C stops; the same
command goes on, after a crash as well. With --from-epoch it can be repeated without rotating twice;
with --abort, that gives up the rotation from that epoch and no later one.
Copies and backups that were made before still open with the old key.
${examples(
  'pqblk rotate-data-key vm.sealed --key alice --rate 100M',
  'pqblk rotate-data-key vm.sealed --key alice --abort',
)}`,
    )
    .action(async (path: string, flags: Flags) => {
      const done = await withPermit(path, flags, (permit) => rotate(terminal, path, flags, permit));
      report(terminal, done, flags.json);
    });
}

async function rotate(
  terminal: Terminal,
  path: string,
  flags: Flags,
  { served, options }: Permit,
): Promise<RotatedDataKey> {
  const { rate, fromEpoch, abort } = flags;
  const share = flags.share ?? (served ? ONLINE_SHARE : undefined);
  const how = { bytesPerSecond: rate, share, fromEpoch, abort };
  const with_ = (host: RotationHost) => {
    const bar = terminal.progress(abort ? 'go back' : 'rotate');
    const work = { signal: terminal.signal, onProgress: bar.update };
    return rotateDataKey(host, { ...options, ...how, ...work }).finally(bar.stop);
  };
  if (served) return await with_(served);
  const { identity, pins, allowRollback, confirmVmk, policy, dryRun } = options;
  const onSlot = slotChecker(policy);
  const keys = { identity, pins, allowRollback, confirmVmk, onSlot };
  const backing = backingOptions(flags); // nothing is read from it, and the engine opens both or none
  // The rotation works on every queue's thread and on one more.
  const queues = Math.min(Math.max(availableParallelism() - 1, 1), QUEUES_MAX);
  const open = (readOnly: boolean) =>
    openDisk(path, { format: 'sealed', cache: 'none', queues, readOnly, ...backing, ...keys });
  if (dryRun) {
    await requireBelieved(path);
    await using looked = await open(true);
    await looked.requireWithinSize();
  }
  // A disk that was not closed is changed when it is opened for writing: policy and log are asked before.
  if (dryRun || policy || options.audit) {
    const planned = await planDataKeyRotation(options.place, { ...options, ...how });
    if (dryRun) return planned;
  }
  await using disk = await open(false);
  return await with_(disk);
}

/** What may only be read would not be opened for the rotation. */
async function requireBelieved(path: string): Promise<void> {
  const { qcow2 } = await diskInfo(path, 'sealed');
  if (!qcow2?.corrupt) return;
  throw new PqblkError('corrupt', 'its header was put back, and no check has believed it yet', {
    path,
    operation: 'rotate data key',
    hint: 'run `pqblk header restore` again or `pqblk check --repair`',
  });
}

function report(terminal: Terminal, done: RotatedDataKey, json?: boolean): void {
  const { fromEpoch, toEpoch, changed, dryRun, resumed, aborted, sectors } = done;
  if (json || !changed || dryRun) {
    if (json) terminal.json(done);
    else if (!changed) terminal.line(`nothing to do: the current epoch is ${toEpoch}`);
    else terminal.line(`would move the disk from epoch ${fromEpoch} to ${toEpoch}`);
    return;
  }
  if (resumed && !aborted) terminal.line('a rotation that was cut short is complete now');
  terminal.line(
    `the disk is of epoch ${toEpoch}; ${formatSize(sectors * SECTOR_BYTES)} were written again, and the ` +
      `key of epoch ${fromEpoch} is forgotten`,
  );
}

function parsePercent(text: string): number {
  const percent = Number(text);
  if (percent > 0 && percent <= 100) return percent / 100;
  throw new InvalidArgumentError('expected more than 0 and at most 100.');
}
