// Room disk/: moving the content of one disk to another, sparse parts kept sparse.
//
// Import and export are a copy between an open disk and a raw or qcow2 file. Several requests are in
// flight; what the source says is a hole, and what turns out to be zeros, is not written as data.
import { lstat, rename } from 'node:fs/promises';
import { PqblkError } from '../errors.js';
import { type LongWork, throwIfAborted } from '../native.js';
import { type CreateDiskOptions, createAndUse } from './create.js';
import { type Disk, openDisk, openNewDisk } from './disk.js';
import { diskInfo } from './info.js';
import type { OpenDiskOptions } from './types.js';

const CHUNK_BYTES = 1024 * 1024;
const IN_FLIGHT = 8;
const ZERO_UNIT = 64 * 1024;

export interface CopyOptions extends LongWork {
  /** The target reads as zeros (it is new): zeros need not be written at all. */
  targetIsZero?: boolean;
}

export interface CopyResult {
  /** Bytes that were written as data. */
  readonly copiedBytes: number;
  /** Bytes that read as zeros and take no space. */
  readonly zeroBytes: number;
}

/** Copies all of `source` to the beginning of `target` and flushes. Kind `out_of_range`: too small. */
export async function copyDisk(
  source: Disk,
  target: Disk,
  options: CopyOptions = {},
): Promise<CopyResult> {
  if (source.size > target.size) {
    throw new PqblkError(
      'out_of_range',
      `the source has ${source.size} bytes, the target only ${target.size}`,
    );
  }
  const copy = new Copy(source, target, options);
  await Promise.all(Array.from({ length: IN_FLIGHT }, () => copy.worker()));
  throwIfAborted(options.signal);
  await target.flush();
  return { copiedBytes: copy.copied, zeroBytes: source.size - copy.copied };
}

class Copy {
  copied = 0;
  #done = 0;
  #failed = false;
  readonly #chunks: AsyncGenerator<{ offset: number; length: number }, void, void>;

  constructor(
    readonly source: Disk,
    readonly target: Disk,
    readonly options: CopyOptions,
  ) {
    this.#chunks = this.#split();
  }

  /** Takes chunks until there are none; a failure of one worker ends them all. */
  async worker(): Promise<void> {
    const buffer = Buffer.alloc(CHUNK_BYTES);
    try {
      for (;;) {
        const next = await this.#chunks.next();
        if (next.done || this.#failed || this.options.signal?.aborted) return;
        await this.#copyChunk(buffer, next.value.offset, next.value.length);
      }
    } catch (error) {
      this.#failed = true;
      throw error;
    }
  }

  /** Chunks of data; holes are dealt with on the way. */
  async *#split(): AsyncGenerator<{ offset: number; length: number }, void, void> {
    for await (const extent of this.source.extents()) {
      if (extent.kind !== 'data') {
        await this.#zero(extent.offset, extent.length);
        this.#progress(extent.length);
        continue;
      }
      const end = extent.offset + extent.length;
      for (let offset = extent.offset; offset < end; ) {
        const cut = Math.min(end, (Math.floor(offset / CHUNK_BYTES) + 1) * CHUNK_BYTES);
        yield { offset, length: cut - offset };
        offset = cut;
      }
    }
  }

  async #copyChunk(buffer: Buffer, offset: number, length: number): Promise<void> {
    const chunk = buffer.subarray(0, length);
    await this.source.read(chunk, offset);
    const writes: Promise<void>[] = [];
    for (const run of runsOf(chunk)) {
      const at = offset + run.begin;
      const bytes = run.end - run.begin;
      if (run.zero) {
        writes.push(this.#zero(at, bytes));
      } else {
        writes.push(this.target.write(chunk.subarray(run.begin, run.end), at));
        this.copied += bytes;
      }
    }
    // Settled, not only failed: the buffer is still read by those that go on.
    for (const result of await Promise.allSettled(writes)) {
      if (result.status === 'rejected') throw result.reason;
    }
    this.#progress(length);
  }

  async #zero(offset: number, length: number): Promise<void> {
    if (!this.options.targetIsZero) await this.target.writeZeroes(offset, length, { unmap: true });
  }

  #progress(bytes: number): void {
    this.#done += bytes;
    this.options.onProgress?.(this.#done, this.source.size);
  }
}

const ZEROS = Buffer.alloc(ZERO_UNIT);

/** Cuts a chunk into runs of data and of zeros, in units of 64 KiB. */
function* runsOf(chunk: Buffer): Generator<{ begin: number; end: number; zero: boolean }> {
  let begin = 0;
  let zero: boolean | undefined;
  for (let at = 0; at < chunk.length; at += ZERO_UNIT) {
    const end = Math.min(at + ZERO_UNIT, chunk.length);
    const isZero = chunk.compare(ZEROS, 0, end - at, at, end) === 0;
    if (zero !== undefined && isZero !== zero) {
      yield { begin, end: at, zero };
      begin = at;
    }
    zero = isZero;
  }
  if (zero !== undefined) yield { begin, end: chunk.length, zero };
}

export interface ImportOptions extends CopyOptions {
  /** Of the source file; never probed. */
  format: 'raw' | 'qcow2';
  /** Files the source may name as its backing. */
  allowBacking?: boolean | string[];
  backingFormat?: 'raw' | 'qcow2';
}

/** Copies a raw or qcow2 file into an open disk. */
export async function importFile(
  path: string,
  disk: Disk,
  options: ImportOptions,
): Promise<CopyResult> {
  const { format, allowBacking, backingFormat } = options;
  const open: OpenDiskOptions = {
    format,
    readOnly: true,
    cache: 'writeback',
    ...(allowBacking !== undefined && { allowBacking }),
    ...(backingFormat !== undefined && { backingFormat }),
  };
  await using source = await openDisk(path, open);
  return await copyDisk(source, disk, options);
}

/**
 * Copies an open disk into a new one, which is removed again when that was not finished. A file that
 * it replaces (`overwrite`) is there until then. Kinds `locked` (somebody has that file open), …
 */
export async function copyToNewDisk(
  source: Disk,
  path: string,
  create: Omit<CreateDiskOptions, keyof LongWork>,
  work: LongWork = {},
): Promise<CopyResult> {
  throwIfAborted(work.signal);
  const replaced = create.overwrite === true && (await isRegularFile(path));
  const made = replaced ? `${path}.new-${process.pid}` : path;
  if (replaced) await requireUnlocked(path);
  return await createAndUse(made, create, async (keys) => {
    const open = { format: create.format, cache: 'writeback' } as const;
    const target = await openNewDisk(made, open, keys);
    try {
      const result = await copyDisk(source, target, { ...work, targetIsZero: true });
      await target.close();
      if (replaced) await rename(made, path);
      return result;
    } catch (error) {
      await target.close().catch(() => undefined); // the first failure is the one to tell
      throw error;
    }
  });
}

async function isRegularFile(path: string): Promise<boolean> {
  return (await lstat(path).catch(() => undefined))?.isFile() ?? false;
}

async function requireUnlocked(path: string): Promise<void> {
  const { lockHolder } = await diskInfo(path, 'raw');
  if (!lockHolder) return;
  const { pid, command } = lockHolder;
  throw new PqblkError('locked', `the file is in use by process ${pid} (${command})`, { path });
}

export interface ExportOptions
  extends LongWork,
    Pick<
      CreateDiskOptions,
      'overwrite' | 'allowSystemDirectory' | 'clusterSize' | 'version' | 'refcountBits'
    > {
  format: 'raw' | 'qcow2';
}

/** Copies an open disk into a new raw or qcow2 file. A file that was not finished is removed. */
export async function exportFile(
  disk: Disk,
  path: string,
  options: ExportOptions,
): Promise<CopyResult> {
  const { onProgress, signal, ...create } = options;
  return await copyToNewDisk(disk, path, { ...create, size: disk.size }, { onProgress, signal });
}
