// The second reader: a file read at offsets. What lies beyond its end reads as zeros, as a hole does;
// structures that must be there whole are checked against the file's length by their own readers.
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { fail } from './bytes.js';

export class ImageFile {
  readonly bytes: number;
  readonly #fd: number;

  constructor(path: string) {
    try {
      this.#fd = openSync(path, 'r');
    } catch (error) {
      fail('io', String(error));
    }
    this.bytes = fstatSync(this.#fd).size;
  }

  read(offset: number, length: number): Uint8Array {
    const out = new Uint8Array(length);
    let done = 0;
    while (done < length) {
      const count = readSync(this.#fd, out, done, length - done, offset + done);
      if (count === 0) break;
      done += count;
    }
    return out;
  }

  close(): void {
    closeSync(this.#fd);
  }
}
