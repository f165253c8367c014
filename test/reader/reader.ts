// The second reader: opens a sealed image, closed cleanly or not, and returns every sector of it.
//
// It never writes. A log that is not empty is folded in memory (docs/format.md section 6). What
// cannot be believed is an error: of the whole image when it is opened, of one sector when it is read.
import { be32, be64, ensure, Fields, fail, join, ReaderError } from './bytes.js';
import { type Aead, aeadOpen, deriveMacKeys, deriveSessionKey } from './crypto.js';
import {
  ENTRY_BYTES,
  type Geometry,
  geometryOf,
  NEVER,
  type Place,
  parseSectorEntry,
  parseTableEntry,
  placeOf,
  type SectorEntry,
  type State,
  type TableEntry,
  UNMAPPED,
  ZERO,
} from './entries.js';
import { ImageFile } from './file.js';
import { LogFold } from './fold.js';
import { checkHeaderMac, type Header, parseHeader, SECTOR_BYTES } from './header.js';
import { chooseKeyArea, type KeyArea, openKeyArea, type VolumeKeys } from './key-area.js';
import {
  type LogBlock,
  type LogContext,
  type LogHeader,
  readBlocks,
  readLogHeader,
  ringPagesOf,
} from './log.js';
import { readSessions, type SessionTable } from './sessions.js';

export interface ReaderOptions {
  /** `fast` lets node:crypto open sectors; see crypto.ts. */
  readonly aead?: Aead;
  /** 4096 bytes of the backing image for a sector that was never written; zeros when left out. */
  readonly backing?: (sector: number) => Uint8Array;
}

export interface SectorView {
  readonly sector: number;
  /** `damaged`: no candidate is valid, or its entry is none. */
  readonly state: State | 'damaged';
  /** Of a *data* sector. */
  readonly sessionId?: number;
  readonly epoch?: number;
  /** Of a *data* sector whose content was asked for. */
  readonly plaintext?: Uint8Array;
  /** Of a damaged one. */
  readonly reason?: string;
}

export interface WalkOptions {
  /** Opens the ciphertext of each n-th *data* sector only; 1, every one, when left out. */
  readonly openEvery?: number;
}

const ZEROS = new Uint8Array(SECTOR_BYTES);
const TABLES_CACHED_MAX = 64;

/** Opens an image with the keys that the key layer yields. Throws ReaderError. */
export function openSealed(
  path: string,
  keys: VolumeKeys,
  options: ReaderOptions = {},
): SealedImage {
  return withFile(path, (file) => new SealedImage(file, () => keys, options));
}

/** Opens an image with an ML-KEM decapsulation key (2400 or 3168 bytes). Throws ReaderError. */
export function openWithPrivateKey(
  path: string,
  mlkemSecretKey: Uint8Array,
  options: ReaderOptions = {},
): SealedImage {
  return withFile(path, (file) => {
    const unlock = (header: Header, area: KeyArea) =>
      openKeyArea(area, header.uuid, mlkemSecretKey);
    return new SealedImage(file, unlock, options);
  });
}

function withFile(path: string, open: (file: ImageFile) => SealedImage): SealedImage {
  const file = new ImageFile(path);
  try {
    return open(file);
  } catch (error) {
    file.close();
    throw error;
  }
}

export class SealedImage {
  readonly header: Header;
  readonly geometry: Geometry;
  readonly keyArea: KeyArea;
  readonly sessions: SessionTable;
  readonly logHeader: LogHeader;
  readonly blocks: readonly LogBlock[];
  readonly fold: LogFold;

  readonly #file: ImageFile;
  readonly #keys: VolumeKeys;
  readonly #aead: Aead;
  readonly #backing: (sector: number) => Uint8Array;
  readonly #sectorKeys = new Map<number, Uint8Array | undefined>();
  readonly #l1: Fields;
  readonly #clusters = new Map<number, Fields>();

  constructor(
    file: ImageFile,
    unlock: (header: Header, area: KeyArea) => VolumeKeys,
    options: ReaderOptions,
  ) {
    this.#file = file;
    this.#aead = options.aead ?? 'noble';
    this.#backing = options.backing ?? (() => ZEROS);
    const start = file.read(0, Math.min(file.bytes, 2 ** 21));
    const header = parseHeader(start, file.bytes);
    this.header = header;
    this.keyArea = chooseKeyArea(header.keyAreas.map((r) => file.read(r.offset, r.length)));
    this.#keys = unlock(header, this.keyArea);
    const macKeys = deriveMacKeys(this.#keys.integrityKey, header.uuid);
    checkHeaderMac(header, macKeys.header);
    this.geometry = geometryOf(header);
    ensure(
      header.l1Offset + header.l1Size * 8 <= file.bytes,
      'tables',
      'the L1 table goes beyond the end of the file',
    );
    this.#l1 = new Fields(file.read(header.l1Offset, header.l1Size * 8), 'tables');
    const tables = header.sessionTables.map((r) => file.read(r.offset, r.length));
    this.sessions = readSessions(tables, macKeys.sessions, header.uuid);
    const context = this.#logContext();
    this.logHeader = readLogHeader(context, macKeys.logHead);
    this.blocks = readBlocks(context, this.logHeader);
    this.fold = new LogFold(this.blocks, this.geometry);
    for (const slot of this.fold.mappings.keys()) {
      ensure(slot < header.l1Size * this.geometry.n, 'log', `a MAP of slot ${slot}`);
    }
  }

  /** True when the log is empty. The dirty bit is but a hint. */
  get closedCleanly(): boolean {
    return this.blocks.length === 0;
  }

  close(): void {
    this.#file.close();
  }

  /** State and content of one sector; never throws for what is wrong with this sector alone. */
  inspect(sector: number, open = true): SectorView {
    ensure(
      Number.isInteger(sector) && sector >= 0 && sector < this.geometry.sectors,
      'sector',
      `sector ${sector} of ${this.geometry.sectors}`,
    );
    try {
      return this.#resolve(sector, open);
    } catch (error) {
      if (!(error instanceof ReaderError) || error.fault === 'io') throw error;
      return { sector, state: 'damaged', reason: error.message };
    }
  }

  /** The 4096 bytes that the guest reads; fault `sector` for a damaged one. */
  content(sector: number): Uint8Array {
    return this.#contentOf(this.inspect(sector));
  }

  /** Every sector in order. */
  *walk({ openEvery = 1 }: WalkOptions = {}): Generator<SectorView> {
    for (let sector = 0; sector < this.geometry.sectors; sector += 1) {
      yield this.inspect(sector, sector % openEvery === 0);
    }
  }

  /** The guest's disk as one array; for disks that fit into memory. */
  readAll(): Uint8Array;
  /** The guest's disk sector by sector; the last one may be shorter. */
  readAll(each: (content: Uint8Array, view: SectorView) => void): void;
  readAll(each?: (content: Uint8Array, view: SectorView) => void): Uint8Array | undefined {
    const { size } = this.header;
    const all = each ? undefined : new Uint8Array(size);
    for (const view of this.walk()) {
      const at = view.sector * SECTOR_BYTES;
      const content = this.#contentOf(view).subarray(0, Math.min(SECTOR_BYTES, size - at));
      if (each) each(content, view);
      else all?.set(content, at);
    }
    return all;
  }

  /** The L1 entry, fault `tables` when it has bits that it must not have. */
  l1Entry(index: number): TableEntry {
    return parseTableEntry(this.#l1, index * 8, 1, this.geometry.clusterBytes);
  }

  /** The L2 entry on the medium, without what the log says of it. */
  homeMapping(slot: number): TableEntry {
    const { n, clusterBytes } = this.geometry;
    const table = this.l1Entry(Math.floor(slot / n)).host;
    if (table === 0) return UNMAPPED;
    return parseTableEntry(this.#cluster(table), (slot % n) * 8, 2, clusterBytes);
  }

  /** The L2 entry that counts: the last MAP of the log, or else the one on the medium. */
  finalMapping(slot: number): TableEntry {
    return this.fold.mappings.get(slot)?.to ?? this.homeMapping(slot);
  }

  /** Bytes of the file, for refcounts.ts and for tests. */
  readHost(offset: number, length: number): Uint8Array {
    return this.#file.read(offset, length);
  }

  get fileBytes(): number {
    return this.#file.bytes;
  }

  #contentOf(view: SectorView): Uint8Array {
    if (view.state === 'damaged') return fail('sector', view.reason ?? 'damaged');
    if (view.state === 'never') return this.#backing(view.sector);
    return view.plaintext ?? ZEROS;
  }

  #resolve(sector: number, open: boolean): SectorView {
    const place = placeOf(this.geometry, sector);
    const logged = this.fold.candidates(sector);
    // Only what is valid by itself, or needs no check, may go unopened.
    const trusted = logged.length === 0;
    for (const { entry, inlineAt } of logged) {
      const view = this.#attempt(sector, entry, this.#places(place, inlineAt), true);
      if (view) return view;
    }
    const oldest = logged[logged.length - 1];
    if (oldest && oldest.sequence <= this.fold.covered) return this.#damaged(sector, logged);
    const entry = this.#homeEntry(sector, place);
    const view = this.#attempt(sector, entry, this.#places(place), open || !trusted);
    return view ?? this.#damaged(sector, [...logged, { entry }]);
  }

  /** What the sector is under this entry, or undefined when its ciphertext is in none of the places. */
  #attempt(
    sector: number,
    entry: SectorEntry,
    places: number[],
    open: boolean,
  ): SectorView | undefined {
    if (entry.state !== 'data') return { sector, state: entry.state };
    const { sessionId } = entry;
    const epoch = this.sessions.sessions.get(sessionId)?.epoch ?? 0;
    if (!open) return { sector, state: 'data', sessionId, epoch };
    for (const at of places) {
      const plaintext = this.#decrypt(sector, entry, this.#file.read(at, SECTOR_BYTES));
      if (plaintext) return { sector, state: 'data', sessionId, epoch, plaintext };
    }
    return undefined;
  }

  #damaged(sector: number, candidates: readonly { entry: SectorEntry }[]): SectorView {
    const sessions = candidates.map(({ entry }) => entry.sessionId);
    const unknown = sessions.filter((id) => this.#sectorKey(id) === undefined);
    const why = unknown.length > 0 ? `no key of session ${unknown.join(', ')}` : 'no tag holds';
    return { sector, state: 'damaged', reason: `sector ${sector}: ${why}` };
  }

  /** Where the ciphertext of a candidate may be, in the order in which to look. */
  #places(place: Place, inlineAt?: number): number[] {
    if (inlineAt !== undefined) return [inlineAt];
    const hosts = [this.finalMapping(place.dataSlot).host];
    const last = this.fold.mappings.get(place.dataSlot);
    if (last && last.sequence > this.fold.covered) hosts.push(last.from.host);
    return hosts.filter((host) => host !== 0).map((host) => host + place.dataAt);
  }

  #decrypt(sector: number, entry: SectorEntry, ciphertext: Uint8Array): Uint8Array | undefined {
    const key = this.#sectorKey(entry.sessionId);
    if (!key) return undefined;
    const { uuid, formatVersion, suite } = this.header;
    const state = Uint8Array.of(1, 0, 0, 0);
    const session = be32(entry.sessionId);
    const aad = join(uuid, be64(sector), session, state, be32(formatVersion));
    return aeadOpen(suite, key, entry.nonce, aad, ciphertext, entry.tag, this.#aead);
  }

  /** The entry on the medium, through the L2 entry on the medium. */
  #homeEntry(sector: number, place: Place): SectorEntry {
    const { host, zero } = this.homeMapping(place.entrySlot);
    if (zero) return ZERO;
    if (host === 0) return NEVER;
    const cluster = this.#cluster(host).bytes;
    const bytes = cluster.subarray(place.entryAt, place.entryAt + ENTRY_BYTES);
    return parseSectorEntry(bytes, sector);
  }

  /** An L2 table or entry cluster; the last few are kept. */
  #cluster(host: number): Fields {
    let fields = this.#clusters.get(host);
    if (!fields) {
      if (this.#clusters.size >= TABLES_CACHED_MAX) this.#clusters.clear();
      fields = new Fields(this.#file.read(host, this.geometry.clusterBytes), 'tables');
      this.#clusters.set(host, fields);
    }
    return fields;
  }

  #sectorKey(sessionId: number): Uint8Array | undefined {
    if (!this.#sectorKeys.has(sessionId)) {
      this.#sectorKeys.set(sessionId, this.#sessionKey('sector', sessionId));
    }
    return this.#sectorKeys.get(sessionId);
  }

  #sessionKey(use: 'sector' | 'log', sessionId: number): Uint8Array | undefined {
    const session = this.sessions.sessions.get(sessionId);
    const dataKey = session && this.#keys.dataKeys.get(session.epoch);
    if (!dataKey) return undefined;
    const { uuid, suite } = this.header;
    return deriveSessionKey(use, dataKey, session.salt, uuid, sessionId, suite);
  }

  #logContext(): LogContext {
    const { log, uuid, suite, l1Size } = this.header;
    const { d, spc } = this.geometry;
    return {
      offset: log.offset,
      ringPages: ringPagesOf(log.length),
      volumeUuid: uuid,
      suite,
      geometry: this.geometry,
      mappable: l1Size * d * spc,
      read: (offset, length) => this.#file.read(offset, length),
      lastSessionId: Math.max(this.sessions.highWater, ...this.sessions.sessions.keys()),
      logKey: (sessionId) => this.#sessionKey('log', sessionId),
      opens: (sector, entry, ciphertext) => this.#decrypt(sector, entry, ciphertext) !== undefined,
    };
  }
}
