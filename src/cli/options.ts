// Room cli/: options that several commands share, declared once, and what they mean.
//
// Which key opens a disk, where the key store is, where a passphrase comes from. Secrets are named by
// these options and never given in them: a command line is public.
import { type Command, InvalidArgumentError, Option } from 'commander';
import { fromSystem, PqblkError } from '../errors.js';
import { noCoreFiles } from '../index.js';
import {
  type Identity,
  type KeyInfo,
  KeyStore,
  type PassphraseSource,
  parseRecipient,
  type Recipient,
  readInputText,
  readPassphrase,
  type Secret,
} from '../keys/index.js';
import { parseSize } from './sizes.js';

export interface StoreFlags {
  store?: string;
}

export interface PassphraseFlags {
  passphraseFile?: string;
  passphraseFd?: number;
  passphraseEnv?: string;
  pinFile?: string;
  pinFd?: number;
}

/** The options of another key than the one that opens the disk: `approvePinFile` and so on. */
export type SecondFlags<Prefix extends string> = {
  [Name in keyof PassphraseFlags as `${Prefix}${Capitalize<Name>}`]?: PassphraseFlags[Name];
};

/** Where the passphrase or PIN of that key comes from; what was not given is left out. */
export function secondFlags<Prefix extends string>(
  flags: SecondFlags<Prefix>,
  prefix: Prefix,
): PassphraseFlags {
  const given = new Map(Object.entries(flags));
  const found = PASSPHRASE_FLAGS.map((name) => {
    const own = `${prefix}${name[0]?.toUpperCase()}${name.slice(1)}`;
    return [name, given.get(own)] as const;
  });
  return Object.fromEntries(found.filter(([, value]) => value !== undefined));
}

const PASSPHRASE_FLAGS = [
  'passphraseFile',
  'passphraseFd',
  'passphraseEnv',
  'pinFile',
  'pinFd',
] as const satisfies readonly (keyof PassphraseFlags)[];

/** Adds the options of a second key, for SecondFlags: its passphrase, or its PIN on a token. */
export function addSecondKeyOptions(command: Command, prefix: string, whose: string): Command {
  addPassphraseOptions(command, `${prefix}-`, `passphrase of ${whose}`);
  return addPinOptions(command, `${prefix}-`, `PIN of ${whose}, on a token`);
}

export function jsonOption(): Option {
  return new Option('--json', 'report as JSON');
}

export function storeOption(): Option {
  return new Option(
    '--store <dir>',
    'key store (default: $PQBLK_KEYS or ~/.local/share/pqblk/keys)',
  );
}

/**
 * Adds --passphrase-file, -fd and -env; `prefix` tells a second passphrase apart. Without one, the
 * PIN options come along: whoever opens a key may find it on a token.
 */
export function addPassphraseOptions(command: Command, prefix = '', what = 'passphrase'): Command {
  if (prefix === '') addPinOptions(command);
  const flag = (source: string) => `--${prefix}passphrase-${source}`;
  const names = ['File', 'Fd', 'Env'].map((source) => attribute(`${prefix}passphrase${source}`));
  const others = (own: number) => names.filter((_, index) => index !== own);
  return command
    .addOption(
      new Option(`${flag('file')} <path>`, `read the ${what} from a file`).conflicts(others(0)),
    )
    .addOption(
      new Option(`${flag('fd')} <number>`, `read the ${what} from an open descriptor`)
        .argParser((text) => parseCount(text))
        .conflicts(others(1)),
    )
    .addOption(
      new Option(
        `${flag('env')} <name>`,
        `read the ${what} from an environment variable`,
      ).conflicts(others(2)),
    );
}

/**
 * For each command that handles keys: before there are any, no core file will hold them, with the pages of
 * V8 that they passed through. `--no-sandbox` of `serve` is for debuggers.
 */
export function forbidCoreFiles(command: Command): Command {
  return command.hook('preAction', (_, action) => {
    if (action.opts<{ sandbox?: boolean }>().sandbox === false || noCoreFiles()) return;
    throw new PqblkError('permission', 'core dumps of this process cannot be forbidden', {
      hint: 'ulimit -c 0',
    });
  });
}

/** Adds --pin-file and --pin-fd. There is no --pin and no --pin-env: both would be public. */
export function addPinOptions(command: Command, prefix = '', what = "PIN of a token's key") {
  return forbidCoreFiles(command)
    .addOption(
      new Option(`--${prefix}pin-file <path>`, `read the ${what} from a file`).conflicts(
        attribute(`${prefix}pinFd`),
      ),
    )
    .addOption(
      new Option(
        `--${prefix}pin-fd <number>`,
        `read the ${what} from an open descriptor`,
      ).argParser((text) => parseCount(text)),
    );
}

function attribute(name: string): string {
  return name.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase());
}

/** Where the passphrase comes from: the option that was given, else a prompt on the terminal. */
export function passphraseSource(
  flags: PassphraseFlags,
  prompt: string,
  confirm = false,
): PassphraseSource {
  if (flags.passphraseFile !== undefined) return { from: 'file', path: flags.passphraseFile };
  if (flags.passphraseFd !== undefined) return { from: 'fd', fd: flags.passphraseFd };
  if (flags.passphraseEnv !== undefined) return { from: 'env', name: flags.passphraseEnv };
  return { from: 'prompt', prompt, confirm };
}

/** The PIN of a token: the option that was given, else `known`, else a prompt. */
export async function readPin(
  flags: Pick<PassphraseFlags, 'pinFile' | 'pinFd'>,
  known: string | undefined,
  prompt: string,
  confirm = false,
): Promise<Secret> {
  const { pinFile = known, pinFd } = flags;
  if (pinFd !== undefined) return await readPassphrase({ from: 'fd', fd: pinFd }, 'PIN');
  if (pinFile !== undefined) return await readPassphrase({ from: 'file', path: pinFile }, 'PIN');
  return await readPassphrase({ from: 'prompt', prompt, confirm }, 'PIN');
}

/**
 * What opens a key of the store: its passphrase, of a key on a token the PIN; undefined for a key
 * that needs none. The caller wipes it.
 */
export async function passphraseFor(
  { name, protection, token }: KeyInfo,
  flags: PassphraseFlags,
): Promise<Secret | undefined> {
  if (token?.login === 'pin') return await readPin(flags, token.pinFile, `PIN of key "${name}"`);
  if (protection !== 'scrypt') return undefined;
  return await readPassphrase(passphraseSource(flags, `Passphrase of key "${name}"`));
}

/** A key of the store, unlocked with what the flags say, or with what is typed. */
export async function unlockIn(
  store: KeyStore,
  reference: string,
  flags: PassphraseFlags,
): Promise<Identity> {
  return await store.unlock(reference, (key) => passphraseFor(key, flags));
}

export function openStore(flags: StoreFlags): KeyStore {
  return new KeyStore(flags.store);
}

/** `NAME` or fingerprint: a key of the store. Anything with a slash: a file of `pqblk key export`. */
export async function recipientOf(store: KeyStore, reference: string): Promise<Recipient> {
  if (!reference.includes('/')) return await store.recipient(reference);
  return await recipientIn(reference);
}

/** The key in a file of `pqblk key export`. */
export async function recipientIn(path: string): Promise<Recipient> {
  try {
    return parseRecipient(await readInputText(path, KEY_TEXT));
  } catch (error) {
    throw fromSystem(error, { path, operation: KEY_TEXT.operation });
  }
}

/** Of an exported key; base64 makes it longer than the file of the key. */
export const KEY_TEXT = { operation: 'read key', bytesMax: 65_536, tooLong: 'bad_key' } as const;

/** Collects an option that may be given several times. */
export function collect(value: string, previous: readonly string[] = []): string[] {
  return [...previous, value];
}

/** For commander: a size, with the complaint of parseSize. */
export function sizeArgument(text: string): number {
  return parseSize(text);
}

/** A natural number or 0. */
export function parseCount(text: string): number {
  if (/^\d{1,10}$/.test(text)) return Number(text);
  throw new InvalidArgumentError('expected a number.');
}

export function parsePositiveCount(text: string): number {
  const count = parseCount(text);
  if (count > 0) return count;
  throw new InvalidArgumentError('expected a number from 1 on; leave the option out for none.');
}

export function positiveSizeArgument(text: string): number {
  const size = parseSize(text);
  if (size > 0) return size;
  throw new InvalidArgumentError(
    'expected a size of 1 byte or more; leave the option out for none, or for its default.',
  );
}

export function parsePercent(text: string): number {
  if (/^\d{1,3}$/.test(text) && Number(text) <= 100) return Number(text);
  throw new InvalidArgumentError('expected a number from 0 to 100.');
}

/** Kind `policy`: something that cannot be undone was asked for without its confirmation. */
export function refuse(message: string, hint: string): PqblkError {
  return new PqblkError('policy', message, { hint });
}

/** For the end of a command's --help. */
export function examples(...lines: readonly string[]): string {
  return `\nExamples:\n${lines.map((line) => `  $ ${line}`).join('\n')}`;
}
