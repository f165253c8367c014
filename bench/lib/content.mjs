// What the disks of a benchmark hold: noise, so that neither a file system nor an image finds zeros
// or repetitions in it, and the same noise in every format that is compared.
import { randomBytes } from 'node:crypto';
import { open } from 'node:fs/promises';
import { copyToNewDisk, openDisk } from '../../dist/index.js';

const MiB = 2 ** 20;

/** A file full of noise, on the medium when the promise resolves. */
export async function noise(path, size) {
  const file = await open(path, 'wx', 0o600);
  try {
    for (let at = 0; at < size; at += MiB) {
      await file.write(randomBytes(Math.min(MiB, size - at)), 0, undefined, at);
    }
    await file.sync();
  } finally {
    await file.close();
  }
}

/** A new disk with the content of a raw file; `make` as CreateDiskOptions, without the size. */
export async function sameContent(raw, path, { format, recipients, ...make }) {
  const source = await openDisk(raw, { format: 'raw', readOnly: true, cache: 'writeback' });
  try {
    const sealed = format === 'sealed' ? { recipients } : {};
    await copyToNewDisk(source, path, { format, size: source.size, ...sealed, ...make });
  } finally {
    await source.close();
  }
}
