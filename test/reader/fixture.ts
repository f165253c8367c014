// What the tests of the second reader share: scratch files, contents, and flipping bytes.
import { closeSync, mkdtempSync, openSync, readSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';
import type { ImageBuilder } from './builder.js';
import { type Fault, ReaderError } from './bytes.js';
import { openSealed, type ReaderOptions, type SealedImage } from './reader.js';

export const SECTOR = 4096;

/** A directory of the test file's own, removed after it. */
export function scratch(): (name: string) => string {
  const dir = mkdtempSync(join(tmpdir(), 'pqblk-reader-'));
  afterAll(() => rmSync(dir, { recursive: true, force: true }));
  return (name) => join(dir, name);
}

/** 4096 bytes that no other sector or version has. */
export function content(sector: number, version = 1): Buffer {
  const bytes = Buffer.alloc(SECTOR);
  for (let at = 0; at < SECTOR; at += 16) {
    bytes.writeUInt32BE(sector, at);
    bytes.writeUInt32BE(version, at + 4);
    bytes.writeUInt32BE(at, at + 8);
    bytes.writeUInt32BE(Math.imul(sector * 31 + version + at, 0x9e37_79b1) >>> 0, at + 12);
  }
  return bytes;
}

/** Saves what was built, opens it, and closes it after `look`. */
export function withImage<T>(
  builder: ImageBuilder,
  path: string,
  look: (image: SealedImage) => T,
  options: ReaderOptions = {},
): T {
  builder.save(path);
  return withSaved(builder, path, look, options);
}

export function withSaved<T>(
  builder: ImageBuilder,
  path: string,
  look: (image: SealedImage) => T,
  options: ReaderOptions = {},
): T {
  const image = openSealed(path, builder.keys, options);
  try {
    return look(image);
  } finally {
    image.close();
  }
}

export function faultOf(action: () => unknown): Fault | undefined {
  try {
    action();
    return undefined;
  } catch (error) {
    if (error instanceof ReaderError) return error.fault;
    throw error;
  }
}

/** Flips bits of these bytes while `during` runs. */
export function flipped<T>(
  path: string,
  offsets: readonly number[],
  mask: number,
  during: () => T,
): T {
  const flip = () => {
    const fd = openSync(path, 'r+');
    for (const offset of offsets) {
      const byte = Buffer.alloc(1);
      readSync(fd, byte, 0, 1, offset);
      byte[0] = (byte[0] ?? 0) ^ mask;
      writeSync(fd, byte, 0, 1, offset);
    }
    closeSync(fd);
  };
  flip();
  try {
    return during();
  } finally {
    flip();
  }
}
