// Room cli/: options that several commands share, declared once, and what they mean.
//
// Which key opens a disk, where the key store is, where a passphrase comes from. Secrets are named by
// these options and never given in them: a command line is public.
import { readFile } from 'node:fs/promises';
import { type Command, InvalidArgumentError, Option } from 'commander';
import { fromSystem, PqblkError } from '../errors.js';
import {
  KeyStore,
  type PassphraseSource,
  parseRecipient,
  type Recipient,
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

/** Adds --passphrase-file, -fd and -env; `prefix` tells a second passphrase apart. */
export function addPassphraseOptions(command: Command, prefix = '', what = 'passphrase'): Command {
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

/** The passphrase of a key of the store, or undefined for a key without one. The caller wipes it. */
export async function passphraseOf(
  store: KeyStore,
  reference: string,
  flags: PassphraseFlags,
): Promise<Secret | undefined> {
  const { name, protection } = await store.show(reference);
  if (protection !== 'scrypt') return undefined;
  return await readPassphrase(passphraseSource(flags, `Passphrase of key "${name}"`));
}

export function openStore(flags: StoreFlags): KeyStore {
  return new KeyStore(flags.store);
}

/** `NAME` or fingerprint: a key of the store. Anything with a slash: a file of `pqblk key export`. */
export async function recipientOf(store: KeyStore, reference: string): Promise<Recipient> {
  if (!reference.includes('/')) return await store.recipient(reference);
  try {
    return parseRecipient(await readFile(reference, 'utf8'));
  } catch (error) {
    throw fromSystem(error, { path: reference, operation: 'read key' });
  }
}

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
