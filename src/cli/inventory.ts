// Room cli/: which disks a command over many of them is about: files, patterns, directories, lists.
//
// A directory means every sealed disk below it, by the first bytes of each file or by its name; a file
// that is named, or that fits a pattern, is meant whatever it holds. Links are followed, and a file that
// has several names counts once. What cannot be looked at is listed with its error and never passed
// over: a disk that is missing from a report looks like one that is fine.
import { isUtf8 } from 'node:buffer';
import type { Stats } from 'node:fs';
import { open, readdir, stat } from 'node:fs/promises';
import { join, resolve, sep } from 'node:path';
import { text as readAll } from 'node:stream/consumers';
import { fromSystem, PqblkError } from '../errors.js';
import { readInputText, waitingFor } from '../keys/index.js';

const QCOW2_MAGIC = 0x514649fb;
const VERSION = 3;
/** docs/format.md, section 1: incompatible feature bit 56, in the first byte of the field. */
const FEATURES_AT = 72;
const SEALED_MASK = 0x01;
/** A disk whose header is damaged is one by its name. */
const SEALED_NAME = /\.sealed$/i;
const WILDCARD = /[*?]/;
const LIST_BYTES_MAX = 2 ** 26;

export interface InventoryFlags {
  list?: string;
}

/** A disk, or something that may be or hold one and could not be looked at. */
export interface Candidate {
  /** Absolute. */
  readonly path: string;
  readonly error?: PqblkError;
}

interface Found extends Candidate {
  /** Of the file: the same for all its names. */
  readonly stats?: Stats | undefined;
  /** The path as it is, where `path` cannot say it. */
  readonly raw?: Buffer | undefined;
}

/** In order, each once. Kind `usage` where nothing is named; a name that stands for nothing has an error. */
export async function inventory(
  names: readonly string[],
  { list }: InventoryFlags,
): Promise<Candidate[]> {
  const listed = list === undefined ? [] : await readList(list);
  const found = new Map<string, Candidate>();
  for (const name of [...names, ...listed]) {
    let none = true;
    for await (const { path, error, stats } of disksOf(name)) {
      none = false;
      const identity = identityOf({ path, stats });
      const known = found.get(identity);
      if (!known || (known.error && !error)) found.set(identity, { path, ...(error && { error }) });
    }
    if (none) found.set(name, nothingAt(name));
  }
  if (found.size === 0) throw new PqblkError('usage', 'no disks: name some, or give a --list');
  return [...found.values()];
}

function nothingAt(name: string): Candidate {
  const path = resolve(name);
  const what = WILDCARD.test(name) ? 'no file fits this pattern' : 'no sealed disk below';
  return { path, error: new PqblkError('not_found', what, { path }) };
}

/** One name on each line; `#` begins a remark. '-': stdin. */
async function readList(file: string): Promise<string[]> {
  try {
    const limits = { operation: 'read inventory', bytesMax: LIST_BYTES_MAX };
    const text =
      file === '-' ? await waitingFor(readAll(process.stdin)) : await readInputText(file, limits);
    return text
      .split('\n')
      .map((line) => line.trim())
      .filter((line) => line !== '' && !line.startsWith('#'));
  } catch (error) {
    throw fromSystem(error, { path: file, operation: 'read inventory' });
  }
}

async function* disksOf(name: string): AsyncGenerator<Found> {
  const path = resolve(name);
  if (WILDCARD.test(name)) {
    const parts = path.split(sep).slice(1);
    yield* matching({ path: sep }, parts, []);
    return;
  }
  const found = await lookAt(path);
  if (found.stats?.isDirectory()) yield* disksBelow(found, new Set());
  else yield found.error ? { path } : found; // whoever opens it says what is wrong
}

async function lookAt(path: string, raw?: Buffer): Promise<Found> {
  try {
    const stats = await stat(raw ?? path);
    return { path, stats, raw };
  } catch (error) {
    return { path, error: fromSystem(error, { path, operation: 'look at' }) };
  }
}

/** Not UTF-8 in it, or in that of a directory on the way: nothing here can open what is meant. */
function meant(file: Found): Found {
  const { path, raw } = file;
  if (raw === undefined) return file;
  const hint = 'rename it, or make a link to it';
  const message = 'its name is not UTF-8, and nothing here can open it';
  return { ...file, error: new PqblkError('unsupported', message, { path, hint }) };
}

const identityOf = ({ path, stats }: Found) => (stats ? `${stats.dev}:${stats.ino}` : path);

/** What a directory holds, links followed, in order of the names. */
async function* entriesOf(
  directory: Found,
  fits: (name: string) => boolean,
): AsyncGenerator<Found> {
  let entries: Awaited<ReturnType<typeof readEntries>>;
  try {
    entries = await readEntries(directory);
  } catch (error) {
    const { path } = directory;
    yield { path, error: fromSystem(error, { path, operation: 'list' }) };
    return;
  }
  for (const entry of entries) {
    const name = entry.name.toString();
    if (!fits(name)) continue;
    const found = await lookAt(join(directory.path, name), below(directory, entry.name));
    const vanished = found.error?.kind === 'not_found' && !entry.isSymbolicLink();
    if (!vanished) yield found;
  }
}

/** Names as they are: what is not UTF-8 would be another name, of nothing. */
const readEntries = async ({ path, raw }: Found) =>
  (await readdir(raw ?? path, { withFileTypes: true, encoding: 'buffer' })).sort((a, b) =>
    Buffer.compare(a.name, b.name),
  );

/** The path of an entry, where text cannot say it. */
function below({ path, raw }: Found, name: Buffer): Buffer | undefined {
  if (raw === undefined && isUtf8(name)) return undefined;
  return Buffer.concat([raw ?? Buffer.from(path), Buffer.from(sep), name]);
}

/** Each directory once: links may lead round in circles. */
async function* disksBelow(directory: Found, seen: Set<string>): AsyncGenerator<Found> {
  if (seen.has(identityOf(directory))) return;
  seen.add(identityOf(directory));
  for await (const entry of entriesOf(directory, () => true)) {
    if (entry.stats?.isDirectory()) yield* disksBelow(entry, seen);
    else if (entry.stats?.isFile()) yield* ifSealed(entry);
    else if (entry.error && !leadsNowhere(entry)) yield entry;
  }
}

/** A link to what is not there, which by its name is no disk. */
const leadsNowhere = ({ path, error }: Found) =>
  error?.kind === 'not_found' && !SEALED_NAME.test(path);

async function* ifSealed(file: Found): AsyncGenerator<Found> {
  const { path, raw } = file;
  try {
    if (SEALED_NAME.test(path) || (await isSealed(raw ?? path))) yield meant(file);
  } catch (error) {
    yield { ...file, error: fromSystem(error, { path, operation: 'look at' }) };
  }
}

/**
 * `*` and `?` within a name, `**` for any directories; a pattern means files, whatever they hold. Only
 * directories on the way are looked into. `above`: those that lead here, which links may lead back to.
 */
async function* matching(
  directory: Found,
  [part = '', ...rest]: readonly string[],
  above: readonly string[],
): AsyncGenerator<Found> {
  const last = rest.length === 0;
  const anyDepth = part === '**' && !last;
  if (anyDepth) yield* matching(directory, rest, above);
  const entries = WILDCARD.test(part)
    ? entriesOf(directory, nameFits(part))
    : [await lookAt(join(directory.path, part), below(directory, Buffer.from(part)))];
  for await (const entry of entries) {
    const isWanted = last && WILDCARD.test(part);
    if (entry.error && (isWanted || entry.error.kind !== 'not_found')) yield entry;
    else if (last && entry.stats?.isFile()) yield meant(entry);
    else if (!last && entry.stats?.isDirectory() && !above.includes(identityOf(entry))) {
      const parts = anyDepth ? [part, ...rest] : rest;
      yield* matching(entry, parts, [...above, identityOf(entry)]);
    }
  }
}

function nameFits(pattern: string): (name: string) => boolean {
  const expression = pattern
    .replaceAll(/[.+^${}()|[\]\\]/g, '\\$&')
    .replaceAll('*', '.*')
    .replaceAll('?', '.');
  const fits = new RegExp(`^${expression}$`, 's');
  return (name) => fits.test(name);
}

/** By its first bytes, which decide what is reported and never what is opened. */
async function isSealed(path: string | Buffer): Promise<boolean> {
  const file = await open(path, 'r');
  try {
    const start = Buffer.alloc(FEATURES_AT + 8);
    const { bytesRead } = await file.read(start, 0, start.length, 0);
    if (bytesRead < start.length) return false;
    const isQcow2 = start.readUInt32BE(0) === QCOW2_MAGIC && start.readUInt32BE(4) === VERSION;
    return isQcow2 && ((start[FEATURES_AT] ?? 0) & SEALED_MASK) !== 0;
  } finally {
    await file.close();
  }
}
