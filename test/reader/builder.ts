// A minimal writer of sealed images and logs, from docs/format.md, for the tests of the second reader.
//
// It knows no rules about *when* something may be written: a test says which cluster, entry, record
// and mapping is where, also what no engine would do. Primitives are node:crypto's (see builder-keys).
import { createCipheriv, hkdfSync, randomBytes } from 'node:crypto';
import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs';
import { buildKeyBlob, hmac, sha3 } from './builder-keys.js';

const COPIED = 1n << 63n;
const PAGE = 4096;

export interface BuildOptions {
  readonly clusterBits?: number;
  readonly size: number;
  readonly suite?: 1 | 2;
  readonly dataKeys?: ReadonlyMap<number, Uint8Array>;
  /** ML-KEM encapsulation keys; the blob has no slot when left out. */
  readonly recipients?: readonly Uint8Array[];
  readonly backing?: { readonly name: string; readonly uuid?: Uint8Array };
  readonly logPages?: number;
}

export interface Sealed {
  readonly entry: Buffer;
  readonly ciphertext: Buffer;
}

export interface BlockOptions {
  readonly covered?: number;
  readonly headerPages?: number;
  readonly records?: readonly Buffer[];
  /** Ciphertexts of the WD records, by payload page. */
  readonly payload?: readonly Buffer[];
  readonly skip?: boolean;
  /** What a block of another history would have here. */
  readonly before?: Buffer;
  readonly generation?: number;
}

interface LogState {
  sessionId: number;
  uuid: Buffer;
  generation: number;
  page: number;
  sequence: number;
  before: Buffer;
}

/** Records of section 6. */
export const record = {
  w(sector: number, entry: Uint8Array): Buffer {
    return record.write(1, 0, sector, entry);
  },
  wd(payloadPage: number, sector: number, entry: Uint8Array): Buffer {
    return record.write(2, payloadPage, sector, entry);
  },
  write(type: number, payloadPage: number, sector: number, entry: Uint8Array): Buffer {
    const out = Buffer.alloc(48);
    out[0] = type;
    out.writeUInt32BE(payloadPage, 4);
    out.writeBigUInt64BE(BigInt(sector), 8);
    out.set(entry, 16);
    return out;
  },
  z(first: number, count: number): Buffer {
    const out = Buffer.alloc(24);
    out[0] = 3;
    out.writeBigUInt64BE(BigInt(first), 8);
    out.writeBigUInt64BE(BigInt(count), 16);
    return out;
  },
  map(kind: 'data' | 'entry', slot: number, to: bigint, from: bigint): Buffer {
    const out = Buffer.alloc(32);
    out[0] = 4;
    out[1] = kind === 'data' ? 0 : 1;
    out.writeBigUInt64BE(BigInt(slot), 8);
    out.writeBigUInt64BE(to, 16);
    out.writeBigUInt64BE(from, 24);
    return out;
  },
};

export const ZERO_FLAG = 1n;
export const mapped = (host: number) => BigInt(host) | COPIED;
export const zeroEntry = () => {
  const entry = Buffer.alloc(32);
  entry.writeUInt32BE(0x8000_0000, 28);
  return entry;
};

export class ImageBuilder {
  readonly uuid = randomBytes(16);
  readonly integrityKey = randomBytes(32);
  readonly dataKeys: ReadonlyMap<number, Uint8Array>;
  readonly clusterBits: number;
  readonly clusterBytes: number;
  readonly suite: 1 | 2;
  readonly places: Record<'keyA' | 'keyB' | 'sessionA' | 'sessionB' | 'log' | 'l1', number>;
  /** Refcounts other than 1, by host offset. */
  readonly refcounts = new Map<number, number>();
  /** Incompatible features besides bit 56. */
  features = 0n;

  readonly #options: BuildOptions;
  readonly #clusters = new Map<number, Buffer>();
  readonly #sessions = new Map<number, { epoch: number; salt: Buffer }>();
  readonly #logBytes: number;
  readonly #l1Size: number;
  readonly #n: number;
  readonly #d: number;
  #end = 1;
  #log: LogState | undefined;

  constructor(options: BuildOptions) {
    this.#options = options;
    this.clusterBits = options.clusterBits ?? 16;
    this.clusterBytes = 2 ** this.clusterBits;
    this.suite = options.suite ?? 1;
    this.dataKeys = options.dataKeys ?? new Map([[1, randomBytes(32)]]);
    this.#n = this.clusterBytes / 8;
    this.#d = this.#n - this.#n / 128;
    this.#logBytes = (options.logPages ?? 64) * PAGE;
    this.#l1Size = Math.ceil(Math.ceil(options.size / this.clusterBytes) / this.#d);
    this.places = {
      l1: this.allocate(this.#l1Size * 8),
      keyA: this.allocate(69_632),
      keyB: this.allocate(69_632),
      sessionA: this.allocate(PAGE),
      sessionB: this.allocate(PAGE),
      log: this.allocate(this.#logBytes),
    };
    this.writeKeyAreas();
    this.#putSessionHeads();
    this.writeLogHeader({ sessionId: 0 });
  }

  get keys() {
    return { integrityKey: this.integrityKey, dataKeys: this.dataKeys };
  }

  /** Host clusters for so many bytes; their offset. */
  allocate(bytes: number): number {
    const offset = this.#end * this.clusterBytes;
    this.#end += Math.max(1, Math.ceil(bytes / this.clusterBytes));
    return offset;
  }

  put(offset: number, bytes: Uint8Array): void {
    for (let done = 0; done < bytes.length; ) {
      const [cluster, at] = this.#locate(offset + done);
      const part = bytes.subarray(done, done + this.clusterBytes - at);
      cluster.set(part, at);
      done += part.length;
    }
  }

  get(offset: number, length: number): Buffer {
    const out = Buffer.alloc(length);
    for (let done = 0; done < length; ) {
      const [cluster, at] = this.#locate(offset + done);
      done += cluster.copy(out, done, at, Math.min(this.clusterBytes, at + length - done));
    }
    return out;
  }

  #locate(offset: number): [Buffer, number] {
    const index = Math.floor(offset / this.clusterBytes);
    let cluster = this.#clusters.get(index);
    if (!cluster) {
      cluster = Buffer.alloc(this.clusterBytes);
      this.#clusters.set(index, cluster);
    }
    return [cluster, offset % this.clusterBytes];
  }

  // ---- sessions and sectors --------------------------------------------------------------------------

  addSession(id: number, epoch = 1): void {
    const position = this.#sessions.size;
    const salt = randomBytes(32);
    this.#sessions.set(id, { epoch, salt });
    this.#putSessionHeads();
    const entry = Buffer.alloc(128);
    entry.writeUInt32BE(id, 0);
    entry.writeUInt32BE(epoch, 4);
    entry.writeBigUInt64BE(1_700_000_000n, 8);
    entry.set(salt, 16);
    this.#seal(entry, 'pqblk/v1 session mac', 'entry');
    for (const table of [this.places.sessionA, this.places.sessionB]) {
      this.put(table + 128 * (1 + position), entry);
    }
  }

  #putSessionHeads(): void {
    const head = Buffer.alloc(128);
    head.write('PQBLKSES', 0, 'latin1');
    head.writeUInt32BE(1, 8);
    head.writeUInt32BE(Math.max(0, ...this.#sessions.keys()), 12);
    this.#seal(head, 'pqblk/v1 session mac', 'head');
    this.put(this.places.sessionA, head);
    this.put(this.places.sessionB, head);
  }

  #seal(structure: Buffer, label: string, prefix: string): void {
    const body = structure.subarray(0, structure.length - 32);
    const mac = hmac(this.#derive(this.integrityKey, this.uuid, label), prefix, this.uuid, body);
    structure.set(mac, structure.length - 32);
  }

  #derive(key: Uint8Array, salt: Uint8Array, ...info: (Uint8Array | string)[]): Buffer {
    const joined = Buffer.concat(info.map((part) => Buffer.from(part as Uint8Array)));
    return Buffer.from(hkdfSync('sha3-256', key, salt, joined, 32));
  }

  #sessionKey(label: string, id: number): Buffer {
    const session = this.#sessions.get(id);
    const dataKey = session && this.dataKeys.get(session.epoch);
    if (!dataKey) throw new Error(`the builder has no session ${id}`);
    const numbers = Buffer.alloc(5);
    numbers.writeUInt32BE(id, 0);
    numbers[4] = this.suite;
    return this.#derive(dataKey, session.salt, label, this.uuid, numbers);
  }

  #encrypt(key: Uint8Array, nonce: Uint8Array, aad: Uint8Array, plain: Uint8Array) {
    const options = { authTagLength: 16 };
    const cipher =
      this.suite === 1
        ? createCipheriv('aes-256-gcm', key, nonce, options)
        : createCipheriv('chacha20-poly1305', key, nonce, options);
    cipher.setAAD(aad, { plaintextLength: plain.length });
    const ciphertext = Buffer.concat([cipher.update(plain), cipher.final()]);
    return { ciphertext, tag: cipher.getAuthTag() };
  }

  /** Ciphertext and entry of a sector; where they go is the caller's choice. */
  seal(sector: number, plaintext: Uint8Array, sessionId = 1): Sealed {
    const nonce = randomBytes(12);
    const aad = Buffer.alloc(36);
    aad.set(this.uuid, 0);
    aad.writeBigUInt64BE(BigInt(sector), 16);
    aad.writeUInt32BE(sessionId, 24);
    aad[28] = 1;
    aad.writeUInt32BE(1, 32);
    const key = this.#sessionKey('pqblk/v1 sector', sessionId);
    const { ciphertext, tag } = this.#encrypt(key, nonce, aad, plaintext);
    const entry = Buffer.alloc(32);
    entry.set(tag, 0);
    entry.set(nonce, 16);
    entry.writeUInt32BE(0x4000_0000 + sessionId, 28);
    return { entry, ciphertext };
  }

  /** Slots and offsets of a sector, computed the long way round. */
  place(sector: number) {
    const guest = sector * PAGE;
    const cluster = Math.floor(guest / this.clusterBytes);
    const [l1, index] = [Math.floor(cluster / this.#d), cluster % this.#d];
    const entryByte = ((index * this.clusterBytes + (guest % this.clusterBytes)) / PAGE) * 32;
    const entryIndex = this.#d + Math.floor(entryByte / this.clusterBytes);
    return {
      dataSlot: l1 * this.#n + index,
      entrySlot: l1 * this.#n + entryIndex,
      dataAt: guest % this.clusterBytes,
      entryAt: entryByte % this.clusterBytes,
    };
  }

  /** Where the L2 entry of a slot is; its table is made when there is none. */
  slotAt(slot: number): number {
    const l1At = this.places.l1 + Math.floor(slot / this.#n) * 8;
    let entry = this.get(l1At, 8).readBigUInt64BE();
    if (entry === 0n) {
      entry = mapped(this.allocate(this.clusterBytes));
      this.#put64(l1At, entry);
    }
    return Number(entry & ~COPIED) + (slot % this.#n) * 8;
  }

  #put64(offset: number, value: bigint): void {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64BE(value);
    this.put(offset, bytes);
  }

  setSlot(slot: number, entry: bigint): void {
    this.#put64(this.slotAt(slot), entry);
  }

  /** The host cluster of a slot; one is allocated and mapped when there is none. */
  hostOf(slot: number): number {
    const entry = this.get(this.slotAt(slot), 8).readBigUInt64BE();
    if (entry > 1n) return Number(entry & ~COPIED & ~1n);
    const host = this.allocate(this.clusterBytes);
    this.setSlot(slot, mapped(host));
    return host;
  }

  /** A sector written and checkpointed. */
  writeHome(sector: number, plaintext: Uint8Array, sessionId = 1): Sealed {
    const sealed = this.seal(sector, plaintext, sessionId);
    this.setData(sector, sealed.ciphertext);
    this.setEntry(sector, sealed.entry);
    return sealed;
  }

  setData(sector: number, ciphertext: Uint8Array): void {
    const { dataSlot, dataAt } = this.place(sector);
    this.put(this.hostOf(dataSlot) + dataAt, ciphertext);
  }

  setEntry(sector: number, entry: Uint8Array): void {
    this.put(this.entryOffset(sector), entry);
  }

  entryOffset(sector: number): number {
    const { entrySlot, entryAt } = this.place(sector);
    return this.hostOf(entrySlot) + entryAt;
  }

  // ---- key area and log ------------------------------------------------------------------------------

  writeKeyAreas(): void {
    const { uuid, integrityKey, dataKeys } = this;
    const recipients = this.#options.recipients ?? [];
    this.putKeyArea(buildKeyBlob({ uuid, integrityKey, dataKeys, recipients }), [1n, 1n]);
  }

  /** The same blob into both copies, with these generations. */
  putKeyArea(blob: Uint8Array, generations: readonly [bigint, bigint]): void {
    const copies = [this.places.keyA, this.places.keyB] as const;
    copies.forEach((offset, index) => {
      const head = Buffer.alloc(64);
      head.write('PQBLKKEY', 0, 'latin1');
      head.writeBigUInt64BE(generations[index] ?? 1n, 8);
      head.writeUInt32BE(65_536, 16);
      head.set(sha3(head.subarray(0, 32), blob), 32);
      this.put(offset, head);
      this.put(offset + PAGE, blob);
    });
  }

  /** A log header in both copies; `next` says where `block` goes on writing. */
  writeLogHeader(fields: {
    sessionId: number;
    page?: number;
    sequence?: number;
    before?: Buffer;
    serial?: number;
    generation?: number;
  }): void {
    const { sessionId, page = 0, sequence = 1, before = Buffer.alloc(16) } = fields;
    const { serial = 1, generation = 7 } = fields;
    const log = { sessionId, uuid: randomBytes(16), generation, page, sequence, before };
    this.#log = log;
    const header = Buffer.alloc(160);
    header.write('PQBLKLOG', 0, 'latin1');
    header.writeBigUInt64BE(BigInt(serial), 8);
    header.set(log.uuid, 16);
    header.writeBigUInt64BE(BigInt(log.generation), 32);
    header.writeUInt32BE(sessionId, 40);
    header.writeBigUInt64BE(BigInt(page), 48);
    header.writeBigUInt64BE(BigInt(sequence), 56);
    header.set(before, 64);
    this.#seal(header, 'pqblk/v1 log header mac', '');
    this.put(this.places.log, header);
    this.put(this.places.log + PAGE, header);
  }

  /** Sectors that the L2 tables have slots for, those beyond the disk's size too. */
  get mappable(): number {
    return (this.#l1Size * this.#d * this.clusterBytes) / PAGE;
  }

  get ringPages(): number {
    return this.#logBytes / PAGE - 2;
  }

  /** Appends a block; returns the file offset of its header and its sequence number. */
  block(options: BlockOptions): { at: number; sequence: number; payloadAt: number } {
    const { covered = 0, headerPages = 1, records = [], payload = [], skip = false } = options;
    const log = this.#log;
    if (!log) throw new Error('no log header');
    const toEnd = this.ringPages - log.page;
    const payloadPages = skip ? toEnd - headerPages : payload.length;
    if (headerPages + payloadPages > toEnd) throw new Error('the block would wrap');
    const body = Buffer.concat(records);
    const block = Buffer.alloc(96 + body.length);
    block.write('PQLB', 0, 'latin1');
    block.writeUInt16BE(headerPages, 4);
    block.writeUInt16BE(skip ? 1 : 0, 6);
    block.set(log.uuid, 8);
    block.writeBigUInt64BE(BigInt(options.generation ?? log.generation), 24);
    block.writeUInt32BE(log.sessionId, 32);
    block.writeUInt32BE(payloadPages, 36);
    block.writeBigUInt64BE(BigInt(log.sequence), 40);
    block.writeBigUInt64BE(BigInt(covered), 48);
    block.writeUInt32BE(records.length, 56);
    block.writeUInt32BE(body.length, 60);
    block.set(options.before ?? log.before, 64);
    block.set(body, 96);
    const nonce = Buffer.alloc(12);
    nonce.writeBigUInt64BE(BigInt(log.sequence), 4);
    const key = this.#sessionKey('pqblk/v1 log', log.sessionId);
    const { tag } = this.#encrypt(key, nonce, block, new Uint8Array(0));
    block.set(tag, 80);
    const at = this.places.log + (2 + log.page) * PAGE;
    const payloadAt = at + headerPages * PAGE;
    this.put(at, block);
    payload.forEach((page, index) => {
      this.put(payloadAt + index * PAGE, page);
    });
    const sequence = log.sequence;
    log.page = (log.page + headerPages + payloadPages) % this.ringPages;
    log.sequence += 1;
    log.before = tag;
    return { at, sequence, payloadAt };
  }

  get logState(): Readonly<LogState> {
    if (!this.#log) throw new Error('no log header');
    return { ...this.#log };
  }

  // ---- the file --------------------------------------------------------------------------------------

  /** Writes header and refcounts, then every cluster to `path`. */
  save(path: string): void {
    const { table, tableClusters } = this.#writeRefcounts();
    this.put(0, this.#header(table, tableClusters));
    const fd = openSync(path, 'w');
    ftruncateSync(fd, this.#end * this.clusterBytes);
    for (const [index, bytes] of this.#clusters) {
      writeSync(fd, bytes, 0, bytes.length, index * this.clusterBytes);
    }
    closeSync(fd);
  }

  /** Overwrites bytes of a file that was saved, and nothing else: no MAC, no refcount. */
  patch(path: string, offset: number, bytes: Uint8Array): void {
    const fd = openSync(path, 'r+');
    writeSync(fd, bytes, 0, bytes.length, offset);
    closeSync(fd);
  }

  #header(refcountTable: number, refcountTableClusters: number): Buffer {
    const { size, backing } = this.#options;
    const header = Buffer.alloc(1024);
    header.write('QFI\xfb', 0, 'latin1');
    header.writeUInt32BE(3, 4);
    header.writeUInt32BE(this.clusterBits, 20);
    header.writeBigUInt64BE(BigInt(size), 24);
    header.writeUInt32BE(this.#l1Size, 36);
    header.writeBigUInt64BE(BigInt(this.places.l1), 40);
    header.writeBigUInt64BE(BigInt(refcountTable), 48);
    header.writeUInt32BE(refcountTableClusters, 56);
    header.writeUInt32BE(4, 96);
    header.writeUInt32BE(112, 100);
    header.writeUInt32BE(0x5051_4231, 112);
    header.writeUInt32BE(392, 116);
    this.#extension(header.subarray(120, 512));
    this.#featureNames(header);
    header.writeBigUInt64BE(1n << 56n, 72);
    const name = Buffer.from(backing?.name ?? '', 'utf8');
    if (name.length > 0) {
      header.writeBigUInt64BE(640n, 8);
      header.writeUInt32BE(name.length, 16);
      header.set(name, 640);
    }
    const key = this.#derive(this.integrityKey, this.uuid, 'pqblk/v1 header mac');
    header.set(hmac(key, header.subarray(0, 512), name), 480);
    header.writeBigUInt64BE((1n << 56n) | this.features, 72);
    return header;
  }

  #extension(ext: Buffer): void {
    const { backing } = this.#options;
    ext.writeUInt32BE(1, 0);
    ext.writeUInt32BE(1, 4);
    ext[8] = this.suite;
    ext[9] = 1;
    ext[10] = backing ? (backing.uuid ? 1 : 2) : 0;
    ext.set(this.uuid, 16);
    ext.writeBigUInt64BE(BigInt(this.places.keyA), 32);
    ext.writeBigUInt64BE(BigInt(this.places.keyB), 40);
    ext.writeUInt32BE(69_632, 48);
    ext.writeBigUInt64BE(BigInt(this.places.sessionA), 56);
    ext.writeBigUInt64BE(BigInt(this.places.sessionB), 64);
    ext.writeUInt32BE(PAGE, 72);
    ext.writeBigUInt64BE(BigInt(this.places.log), 80);
    ext.writeBigUInt64BE(BigInt(this.#logBytes), 88);
    if (backing?.uuid) ext.set(backing.uuid, 96);
  }

  #featureNames(header: Buffer): void {
    header.writeUInt32BE(0x6803_f857, 512);
    header.writeUInt32BE(48, 516);
    header[521] = 56;
    header.write('sealed disk (pqblk): keys needed', 522, 'latin1');
  }

  #writeRefcounts(): { table: number; tableClusters: number } {
    const perBlock = this.clusterBytes / 2;
    const blocks: number[] = [];
    const table = this.allocate(this.clusterBytes);
    while (blocks.length * perBlock < this.#end) blocks.push(this.allocate(this.clusterBytes));
    blocks.forEach((offset, index) => {
      const block = Buffer.alloc(this.clusterBytes);
      for (let at = 0; at < perBlock && index * perBlock + at < this.#end; at += 1) {
        const host = (index * perBlock + at) * this.clusterBytes;
        block.writeUInt16BE(this.refcounts.get(host) ?? 1, at * 2);
      }
      this.put(offset, block);
      this.#put64(table + index * 8, BigInt(offset));
    });
    return { table, tableClusters: 1 };
  }
}
