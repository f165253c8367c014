// Room cli/: which disks a command over many of them is about: files, patterns, directories, lists.
//
// A directory means every sealed disk below it, by the first bytes of each file; a named file is meant
// whatever it holds, so that what cannot be read is reported and not passed over.
import { open, readdir, readFile, stat } from 'node:fs/promises';
import { dirname, join, resolve, sep } from 'node:path';
import { text as readAll } from 'node:stream/consumers';
import { fromSystem } from '../errors.js';

const QCOW2_MAGIC = 0x514649fb;
const VERSION = 3;
/** docs/format.md, section 1: incompatible feature bit 56, in the first byte of the field. */
const FEATURES_AT = 72;
const SEALED_MASK = 0x01;

export interface InventoryFlags {
  list?: string;
}

/** Absolute paths, each once, in order. Kind `not_found` for a name that is not there. */
export async function inventory(
  names: readonly string[],
  { list }: InventoryFlags,
): Promise<string[]> {
  const listed = list === undefined ? [] : await readList(list);
  const found = new Set<string>();
  for (const name of [...names, ...listed]) {
    for (const path of await disksOf(name)) found.add(path);
  }
  return [...found];
}

/** One name on each line; `#` begins a remark. '-': stdin. */
async function readList(file: string): Promise<string[]> {
  try {
    const text = file === '-' ? await readAll(process.stdin) : await readFile(file, 'utf8');
    return text
      .split('\n')
      .map((line) => line.trim())
      .filter((line) => line !== '' && !line.startsWith('#'));
  } catch (error) {
    throw fromSystem(error, { path: file, operation: 'read inventory' });
  }
}

async function disksOf(name: string): Promise<string[]> {
  if (/[*?]/.test(name)) return await matching(name);
  const path = resolve(name);
  try {
    if (!(await stat(path)).isDirectory()) return [path];
  } catch {
    return [path]; // whoever opens it says what is wrong
  }
  const disks: string[] = [];
  for await (const file of filesBelow(path)) if (await isSealed(file)) disks.push(file);
  return disks;
}

async function* filesBelow(directory: string): AsyncGenerator<string> {
  let entries: Awaited<ReturnType<typeof readEntries>>;
  try {
    entries = await readEntries(directory);
  } catch (error) {
    throw fromSystem(error, { path: directory, operation: 'list directory' });
  }
  for (const entry of entries) {
    const path = join(directory, entry.name);
    if (entry.isDirectory()) yield* filesBelow(path);
    else if (entry.isFile()) yield path;
  }
}

const readEntries = async (directory: string) =>
  (await readdir(directory, { withFileTypes: true })).sort((a, b) => (a.name < b.name ? -1 : 1));

/** `*` and `?` within a name, `**` for any directories; a pattern means files, whatever they hold. */
async function matching(pattern: string): Promise<string[]> {
  const whole = resolve(pattern);
  const fixed = whole.slice(0, whole.search(/[*?]/));
  const expression = whole
    .replaceAll(/[.+^${}()|[\]\\]/g, '\\$&')
    .replaceAll('**/', '\u0000')
    .replaceAll('*', '[^/]*')
    .replaceAll('?', '[^/]')
    .replaceAll('\u0000', '(?:.*/)?');
  const fits = new RegExp(`^${expression}$`);
  const paths: string[] = [];
  const top = fixed.endsWith(sep) ? fixed : dirname(fixed);
  for await (const path of filesBelow(top)) if (fits.test(path)) paths.push(path);
  return paths;
}

/** By its first bytes, which decide what is reported and never what is opened. */
async function isSealed(path: string): Promise<boolean> {
  let file: Awaited<ReturnType<typeof open>>;
  try {
    file = await open(path, 'r');
  } catch {
    return false;
  }
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
