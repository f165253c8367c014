// The cases that every writer of sealed images must satisfy, over the builder of these tests: a writer
// that logs everything inline and writes home when it closes. It shows that the cases run at all.
import { ImageBuilder, record, zeroEntry } from './builder.js';
import { type WriterOptions, type WrittenDisk, writerCases } from './engine-cases.js';
import { SECTOR } from './fixture.js';

/** Every sector as the guest sees it, and the builder that makes a file of it. */
class BuiltDisk implements WrittenDisk {
  readonly #path: string;
  readonly #options: WriterOptions;
  readonly #content: Buffer;
  readonly #touched: Set<number>;

  constructor(path: string, options: WriterOptions, before?: BuiltDisk) {
    this.#path = path;
    this.#options = options;
    this.#content = before ? before.#content : Buffer.alloc(options.size);
    this.#touched = before ? before.#touched : new Set();
  }

  async write(offset: number, bytes: Uint8Array): Promise<void> {
    this.#content.set(bytes, offset);
    for (let at = offset - (offset % SECTOR); at < offset + bytes.length; at += SECTOR) {
      this.#touched.add(at / SECTOR);
    }
  }

  async zero(offset: number, length: number): Promise<void> {
    await this.write(offset, Buffer.alloc(length));
  }

  async flush(): Promise<void> {
    const builder = this.#builder(4096);
    builder.features = 1n;
    builder.writeLogHeader({ sessionId: 1, page: builder.ringPages - 20 });
    for (const sector of this.#touched) {
      if (builder.ringPages - builder.logState.page < 3) builder.block({ skip: true });
      const plain = this.#sector(sector);
      if (plain.equals(Buffer.alloc(SECTOR))) {
        builder.block({ records: [record.z(sector, 1)] });
        continue;
      }
      const { entry, ciphertext } = builder.seal(sector, plain);
      builder.block({ records: [record.wd(0, sector, entry)], payload: [ciphertext] });
    }
    builder.save(this.#path);
  }

  async close(): Promise<void> {
    const builder = this.#builder(64);
    for (const sector of this.#touched) {
      const plain = this.#sector(sector);
      if (plain.equals(Buffer.alloc(SECTOR))) builder.setEntry(sector, zeroEntry());
      else builder.writeHome(sector, plain);
    }
    builder.save(this.#path);
  }

  #builder(logPages: number): ImageBuilder {
    const { size, clusterBits, suite, encapsulationKey } = this.#options;
    const recipients = [encapsulationKey];
    const builder = new ImageBuilder({ size, clusterBits, suite, recipients, logPages });
    builder.addSession(1);
    return builder;
  }

  #sector(sector: number): Buffer {
    const padded = Buffer.alloc(SECTOR);
    this.#content.copy(padded, 0, sector * SECTOR, (sector + 1) * SECTOR);
    return padded;
  }
}

const closed = new Map<string, BuiltDisk>();

writerCases({
  async create(path, options) {
    const disk = new BuiltDisk(path, options);
    closed.set(path, disk);
    return disk;
  },
  async open(path, options) {
    return new BuiltDisk(path, options, closed.get(path));
  },
});
