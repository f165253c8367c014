// The second reader: sector entries (docs/format.md section 4), L1 and L2 entries, and where in the
// tables a sector lies. Pure arithmetic on bytes; no file, no keys.
import { ensure, Fields, isZero } from './bytes.js';
import { type Header, SECTOR_BYTES } from './header.js';

export const ENTRY_BYTES = 32;
const STATE_SHIFT = 30;
const SESSION_MASK = 2 ** 30 - 1;

export type State = 'never' | 'data' | 'zero';

export interface SectorEntry {
  readonly state: State;
  readonly sessionId: number;
  readonly tag: Uint8Array;
  readonly nonce: Uint8Array;
}

const EMPTY = new Uint8Array(0);
export const NEVER: SectorEntry = { state: 'never', sessionId: 0, tag: EMPTY, nonce: EMPTY };
export const ZERO: SectorEntry = { state: 'zero', sessionId: 0, tag: EMPTY, nonce: EMPTY };

/** Fault `entry` when it is none of the three forms. */
export function parseSectorEntry(bytes: Uint8Array, sector: number): SectorEntry {
  const word = new Fields(bytes, 'entry').u32(28);
  const [state, sessionId] = [word >>> STATE_SHIFT, word & SESSION_MASK];
  if (state === 1) {
    ensure(sessionId !== 0, 'entry', `sector ${sector}: data of session 0`);
    return { state: 'data', sessionId, tag: bytes.slice(0, 16), nonce: bytes.slice(16, 28) };
  }
  ensure(state !== 3, 'entry', `sector ${sector}: unknown state 3`);
  ensure(sessionId === 0, 'entry', `sector ${sector}: a session without data`);
  ensure(isZero(bytes.subarray(0, 28)), 'entry', `sector ${sector}: a tag or nonce without data`);
  return state === 2 ? ZERO : NEVER;
}

/** An entry of an L1 or L2 table. `host` is 0 when nothing is mapped. */
export interface TableEntry {
  readonly host: number;
  readonly copied: boolean;
  /** L2 only: bit 0. */
  readonly zero: boolean;
}

export const UNMAPPED: TableEntry = { host: 0, copied: false, zero: false };

/** Bits 9 to 55 are the offset, 63 is COPIED, 0 is the zero flag of an L2 entry; the others are zero. */
export function parseTableEntry(
  fields: Fields,
  at: number,
  level: 1 | 2,
  clusterBytes: number,
): TableEntry {
  const [high, low] = [fields.u32(at), fields.u32(at + 4)];
  if (high === 0 && low === 0) return UNMAPPED;
  const host = (high & 0x00ff_ffff) * 2 ** 32 + ((low & 0xffff_fe00) >>> 0);
  const zero = (low & 1) === 1;
  ensure((low & 0x1fe) === 0 && !(level === 1 && zero), 'tables', 'reserved bits of a table entry');
  ensure((high & 0x4000_0000) === 0, 'tables', 'a compressed cluster');
  ensure((high & 0x3f00_0000) === 0, 'tables', 'reserved bits of a table entry');
  ensure(host % clusterBytes === 0, 'tables', `a table entry to ${host}, not aligned`);
  return { host, copied: high >= 2 ** 31, zero };
}

/** What section 4 computes for every image, in its own letters. */
export interface Geometry {
  readonly clusterBytes: number;
  /** Sectors in a cluster. */
  readonly spc: number;
  /** Entries in an L2 table, those for data clusters, those for entry clusters. */
  readonly n: number;
  readonly d: number;
  readonly e: number;
  /** Guest clusters and guest sectors, the last ones perhaps partial. */
  readonly clusters: number;
  readonly sectors: number;
}

export interface Place {
  readonly l1: number;
  /** Slots as MAP records number them: l1 index * n + L2 index. */
  readonly dataSlot: number;
  readonly entrySlot: number;
  /** Byte offsets within the data cluster and the entry cluster. */
  readonly dataAt: number;
  readonly entryAt: number;
}

export function geometryOf(header: Header): Geometry {
  const { clusterBytes, size } = header;
  const n = clusterBytes / 8;
  const e = n / 128;
  const d = n - e;
  const clusters = Math.ceil(size / clusterBytes);
  ensure(header.l1Size >= Math.ceil(clusters / d), 'header', `an L1 table of ${header.l1Size}`);
  const sectors = Math.ceil(size / SECTOR_BYTES);
  return { clusterBytes, spc: clusterBytes / SECTOR_BYTES, n, d, e, clusters, sectors };
}

export function placeOf(geometry: Geometry, sector: number): Place {
  const { spc, n, d, clusterBytes } = geometry;
  const cluster = Math.floor(sector / spc);
  const [l1, index] = [Math.floor(cluster / d), cluster % d];
  const byte = (index * spc + (sector % spc)) * ENTRY_BYTES;
  return {
    l1,
    dataSlot: l1 * n + index,
    entrySlot: l1 * n + d + Math.floor(byte / clusterBytes),
    dataAt: (sector % spc) * SECTOR_BYTES,
    entryAt: byte % clusterBytes,
  };
}

/** The guest sectors of which an entry slot holds the entries; `count` stops at the disk's end. */
export function sectorsOfEntrySlot(geometry: Geometry, slot: number) {
  const { spc, n, d, clusterBytes, sectors } = geometry;
  const perCluster = clusterBytes / ENTRY_BYTES;
  const [l1, index] = [Math.floor(slot / n), slot % n];
  const within = (index - d) * perCluster;
  const first = l1 * d * spc + within;
  const last = Math.min(first + perCluster, (l1 + 1) * d * spc, sectors);
  return { first, count: Math.max(0, last - first) };
}
