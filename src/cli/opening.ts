// Room cli/: options that say how a disk is opened (its format, its key, its cache and engine), and
// opening it with them.
//
// A format is what the user says, by option or by the file's name, and never what the file's content
// says: the guest writes that. Without either a disk is sealed, and its keys prove it.
import { extname } from 'node:path';
import { type Command, InvalidArgumentError, Option } from 'commander';
import {
  type CacheMode,
  chooseKey,
  type Disk,
  type DiskFormat,
  describeKeyArea,
  type EngineName,
  type Identity,
  type KeyStore,
  keyAreaOf,
  keysAreLocked,
  type OpenDiskOptions,
  openDisk,
  parseRecoveryCode,
  readPassphrase,
  recoveryIdentity,
  type SlotDescription,
} from '../index.js';
import {
  addPassphraseOptions,
  collect,
  openStore,
  type PassphraseFlags,
  parseCount,
  positiveSizeArgument,
  type StoreFlags,
  storeOption,
  unlockIn,
} from './options.js';
import { type PolicyFlags, policyOf, policyOption, slotChecker } from './policy.js';
import type { Terminal } from './terminal.js';

export const FORMATS: readonly DiskFormat[] = ['raw', 'qcow2', 'sealed'];
export const CACHES: readonly CacheMode[] = ['none', 'writeback', 'writethrough', 'unsafe'];
export const ENGINES: readonly EngineName[] = ['auto', 'io_uring', 'aio', 'threads'];
const ANY_BACKING = 'any';

/** Which key unlocks a sealed disk, and what of its key area is accepted. */
export interface KeyUseFlags extends StoreFlags, PassphraseFlags, PolicyFlags {
  key?: string | string[];
  recoveryCode?: string;
  allowRollback?: boolean;
  confirmVmk?: string;
}

export interface OpenFlags extends KeyUseFlags {
  format?: DiskFormat;
  allowBacking?: string[];
  allowUnauthenticatedBacking?: boolean;
}

export interface EngineFlags {
  cache?: CacheMode;
  engine?: EngineName;
  queues?: number;
  l2CacheSize?: number;
  entryCacheSize?: number;
  pendingDataSize?: number;
  assumeNonVolatile?: boolean;
}

export function formatOption(): Option {
  return new Option(
    '--format <format>',
    'what the disk is (default: by its name, .raw, .img or .qcow2; else sealed)',
  ).choices(FORMATS);
}

export function keyOption(): Option {
  return new Option(
    '--key <name>',
    'key that opens a sealed disk (default: one of the store that it is sealed to)',
  ).argParser((key: string, former: string | undefined) => {
    if (former === undefined) return key;
    throw new InvalidArgumentError('one key opens a disk, and another was named before.');
  });
}

/** What a command needs that unlocks a sealed disk without opening it. */
export function addKeyUse(command: Command): Command {
  return addAcceptance(command.addOption(keyOption()).addOption(storeOption()));
}

function addAcceptance(command: Command): Command {
  return addPassphraseOptions(command.addOption(policyOption()))
    .option('--recovery-code <file>', "open it with the code of a recovery kit; '-' asks for it")
    .option('--allow-rollback', 'open a key area older than this host has seen')
    .option('--confirm-vmk <hex>', 'open a disk whose master key was changed, by its check value');
}

/** What every command needs to open a disk, but for the key: one opens, several may be sealed to. */
export function addOpenOptions(command: Command): Command {
  return addBackingOptions(
    addAcceptance(command.addOption(formatOption()).addOption(storeOption())),
  );
}

/** Which backing file may be opened with a disk. */
export function addBackingOptions(command: Command): Command {
  return command
    .addOption(
      new Option('--allow-backing <file>', `backing file the disk may name; '${ANY_BACKING}': any`)
        .argParser(collect)
        .default(undefined),
    )
    .option('--allow-unauthenticated-backing', 'sealed: trust a backing file that has no keys');
}

export function addEngineOptions(command: Command): Command {
  return command
    .addOption(new Option('--cache <mode>', 'as QEMU means them').choices(CACHES).default('none'))
    .addOption(new Option('--engine <name>', 'I/O engine').choices(ENGINES).default('auto'))
    .addOption(
      new Option('--queues <n>', 'request queues, each a thread and a ring (1 to 64)')
        .argParser(parseCount)
        .default(1),
    )
    .addOption(
      new Option(
        '--l2-cache-size <size>',
        'qcow2, sealed: memory for L2 tables (default: 32M)',
      ).argParser(positiveSizeArgument),
    )
    .addOption(
      new Option(
        '--entry-cache-size <size>',
        'sealed: memory for entries, 1M for 128M of the disk (default: 64M)',
      ).argParser(positiveSizeArgument),
    )
    .addOption(
      new Option(
        '--pending-data-size <size>',
        'sealed: memory for ciphertext that waits to be written home (default: 28M)',
      ).argParser(positiveSizeArgument),
    )
    .option(
      '--assume-non-volatile',
      'the device loses nothing that it has acknowledged, whatever it says of its cache; if that is ' +
        'wrong, a power loss DAMAGES a sealed disk',
    )
    .option('--no-assume-non-volatile', 'it does lose it, whatever it says');
}

/** How the engine opens a disk, as it was said. */
export function engineOptions(flags: EngineFlags): EngineOptions {
  const { cache = 'none', engine = 'auto', queues = 1 } = flags;
  const { l2CacheSize, entryCacheSize, pendingDataSize, assumeNonVolatile } = flags;
  return {
    ...{ cache, engine, queues },
    ...(l2CacheSize !== undefined && { l2CacheBytes: l2CacheSize }),
    ...(entryCacheSize !== undefined && { entryCacheBytes: entryCacheSize }),
    ...(pendingDataSize !== undefined && { pendingDataBytes: pendingDataSize }),
    ...(assumeNonVolatile !== undefined && { assumeNonVolatile }),
  };
}

/** The format the file's name stands for. */
export function formatByName(path: string): DiskFormat | undefined {
  const formats: Readonly<Record<string, DiskFormat>> = {
    '.raw': 'raw',
    '.img': 'raw',
    '.qcow2': 'qcow2',
  };
  return formats[extname(path).toLowerCase()];
}

/** What the user called it, else what its name says. Naming a key names a sealed disk. */
export function formatOf(path: string, flags: OpenFlags): DiskFormat {
  if (flags.format !== undefined) return flags.format;
  if (flags.key !== undefined) return 'sealed';
  return formatByName(path) ?? 'sealed';
}

/** How the backing files of an image may be opened. */
export function backingOptions(
  flags: OpenFlags,
): Pick<OpenDiskOptions, 'allowBacking' | 'allowUnauthenticatedBacking'> {
  const { allowBacking: files } = flags;
  return {
    ...(files !== undefined && { allowBacking: files.includes(ANY_BACKING) || files }),
    ...(flags.allowUnauthenticatedBacking && { allowUnauthenticatedBacking: true }),
  };
}

export type EngineOptions = Pick<
  OpenDiskOptions,
  | 'queues'
  | 'engine'
  | 'cache'
  | 'l2CacheBytes'
  | 'entryCacheBytes'
  | 'pendingDataBytes'
  | 'assumeNonVolatile'
>;

export type Unlocking = Omit<OpenDiskOptions, keyof EngineOptions | 'readOnly' | 'toResize'>;

/** The options that open `path`, with its key unlocked. Dispose of it once the disk is open. */
export async function unlocking(
  path: string,
  flags: OpenFlags,
): Promise<{ options: Unlocking } & Disposable> {
  const format = formatOf(path, flags);
  const backing = backingOptions(flags);
  if (format !== 'sealed') {
    return { options: { format, ...backing }, [Symbol.dispose]: () => {} };
  }
  const store = openStore(flags);
  const identity = await unlockKey(store, path, flags);
  const options: Unlocking = {
    format,
    ...backing,
    identity,
    pins: store.pins,
    allowRollback: flags.allowRollback,
    confirmVmk: flags.confirmVmk,
    onSlot: slotChecker(await policyOf(flags)),
  };
  return { options, [Symbol.dispose]: () => identity[Symbol.dispose]() };
}

/** The key that opens the disk: the one that was named, else one of the store. */
export async function unlockKey(
  store: KeyStore,
  path: string,
  flags: OpenFlags,
): Promise<Identity> {
  if (flags.recoveryCode !== undefined) {
    return await recoveryKey(await slotsOf(path), flags.recoveryCode);
  }
  const reference = [flags.key ?? []].flat()[0] ?? (await keyFor(store, path));
  return await unlockIn(store, reference, flags);
}

/** The key of a recovery code, which is for one of these slots; '-' asks for the code. */
export async function recoveryKey(
  slots: readonly SlotDescription[],
  file: string,
): Promise<Identity> {
  using typed = await readPassphrase(
    file === '-' ? { from: 'prompt', prompt: 'Recovery code' } : { from: 'file', path: file },
    'recovery code',
  );
  using secret = parseRecoveryCode(typed);
  return await recoveryIdentity(secret, slots);
}

/**
 * Whom the disk is sealed to, as far as no key tells: the slots of both copies of the key area, those of
 * the one that says it is the newest first. It may be false, and hide those who open its sister.
 */
export async function slotsOf(path: string): Promise<readonly SlotDescription[]> {
  const { copies, order } = await keyAreaOf(path).read();
  const slots = order.flatMap((index) => slotsIn(copies[index].blob));
  const first = new Map(slots.toReversed().map((slot) => [slot.fingerprint, slot]));
  return slots.filter((slot) => first.get(slot.fingerprint) === slot);
}

/** None in a key area of a later version: opening it says so. */
function slotsIn(blob: Uint8Array): readonly SlotDescription[] {
  try {
    return describeKeyArea(blob).slots;
  } catch {
    return [];
  }
}

async function keyFor(store: KeyStore, path: string): Promise<string> {
  return (await chooseKey(store, await slotsOf(path))).fingerprint;
}

type OpenHow = EngineOptions & Pick<OpenDiskOptions, 'readOnly' | 'toResize'>;

/** Opens the disk, calls `use`, and closes it whatever happens. The first failure is thrown. */
export async function withDisk<T>(
  path: string,
  flags: OpenFlags,
  how: OpenHow,
  use: (disk: Disk) => Promise<T>,
): Promise<T> {
  const disk = await openFor(path, flags, how);
  let result: T;
  try {
    result = await use(disk);
  } catch (error) {
    await disk.close().catch(() => {}); // a disk that failed fails to close for the same reason
    throw error;
  }
  await disk.close();
  return result;
}

async function openFor(path: string, flags: OpenFlags, how: OpenHow): Promise<Disk> {
  using unlocked = await unlocking(path, flags);
  return await openDisk(path, { ...unlocked.options, ...how });
}

/** For whoever keeps keys for long, once they are there. */
export function warnOfSwap(terminal: Terminal): void {
  if (keysAreLocked()) return;
  terminal.remark(
    'pqblk: warning: keys are not in locked memory and may reach swap: RLIMIT_MEMLOCK leaves no room (`ulimit -l`)',
  );
}
