// The second reader: docs/format.md section 6, the bytes of the log: its header, blocks and records.
//
// A block that does not authenticate ends the log: it is what a crash leaves. A block that does, but
// whose records make no sense, was written so on purpose or by a bug: that is a fault of the image.
import { be64, ensure, Fields, fail, isZero, join, same } from './bytes.js';
import { aeadOpen, hmacSha3, type SuiteId } from './crypto.js';
import {
  type Geometry,
  parseSectorEntry,
  parseTableEntry,
  type SectorEntry,
  type TableEntry,
} from './entries.js';

export const PAGE = 4096;
const HEADER_COPIES = 2;
const BLOCK_FIXED_BYTES = 96;
const HEADER_PAGES_MAX = 4;
const FLAG_SKIP = 1;
const TAG_AT = 80;

export interface LogHeader {
  readonly serial: number;
  readonly uuid: Uint8Array;
  readonly generation: number;
  /** 0: the log is empty. */
  readonly sessionId: number;
  readonly tail: number;
  readonly tailSequence: number;
  readonly macBeforeTail: Uint8Array;
}

export type LogRecord =
  | { readonly type: 'W'; readonly sector: number; readonly entry: SectorEntry }
  | {
      readonly type: 'WD';
      readonly sector: number;
      readonly entry: SectorEntry;
      /** Where in the file the ciphertext is. */
      readonly at: number;
    }
  | { readonly type: 'Z'; readonly first: number; readonly count: number }
  | {
      readonly type: 'MAP';
      readonly kind: 'data' | 'entry';
      readonly slot: number;
      readonly to: TableEntry;
      readonly from: TableEntry;
    };

export interface LogBlock {
  readonly sequence: number;
  readonly covered: number;
  readonly skip: boolean;
  /** Ring page of its first header page, and pages in all. */
  readonly page: number;
  readonly pages: number;
  readonly records: readonly LogRecord[];
  readonly mac: Uint8Array;
}

/** What the log is read with. */
export interface LogContext {
  /** Offset of the log in the file, and pages in its ring. */
  readonly offset: number;
  readonly ringPages: number;
  readonly volumeUuid: Uint8Array;
  readonly suite: SuiteId;
  readonly geometry: Geometry;
  /** Sectors that the L1 table can map: more than the disk's, if its header is older than a growth. */
  readonly mappable: number;
  read(offset: number, length: number): Uint8Array;
  /** The highest session id that was ever given out. */
  readonly lastSessionId: number;
  /** Undefined when no valid entry of the session table has this id. */
  logKey(sessionId: number): Uint8Array | undefined;
  /** Does this ciphertext open as this sector under this entry? */
  opens(sector: number, entry: SectorEntry, ciphertext: Uint8Array): boolean;
}

export const ringPagesOf = (logBytes: number) => logBytes / PAGE - HEADER_COPIES;

/** The valid copy with the higher serial; `alone` when the other one is not valid. */
function readHeaderCopies(context: LogContext, key: Uint8Array) {
  const valid: LogHeader[] = [];
  for (let copy = 0; copy < HEADER_COPIES; copy += 1) {
    const bytes = context.read(context.offset + copy * PAGE, 160);
    const fields = new Fields(bytes, 'log');
    if (fields.text(0, 8) !== 'PQBLKLOG') continue;
    const mac = hmacSha3(key, join(context.volumeUuid, bytes.subarray(0, 128)));
    if (!same(mac, bytes.subarray(128, 160))) continue;
    fields.zero(44, 4, 'bytes after the session of the log header');
    fields.zero(80, 48, 'reserved bytes of the log header');
    const header = {
      serial: fields.u64(8),
      uuid: fields.slice(16, 16),
      generation: fields.u64(32),
      sessionId: fields.u32(40),
      tail: fields.u64(48),
      tailSequence: fields.u64(56),
      macBeforeTail: fields.slice(64, 16),
    };
    ensure(header.tail < context.ringPages, 'log', `tail at page ${header.tail}`);
    valid.push(header);
  }
  const [header] = valid.sort((a, b) => b.serial - a.serial);
  return { header: header ?? fail('log', 'no copy of the log header is valid'), alone: !valid[1] };
}

/** The header that leads to the log: a copy, or what the ring's first block says in place of a lost one. */
export function readLogHeader(context: LogContext, key: Uint8Array): LogHeader {
  const { header, alone } = readHeaderCopies(context, key);
  if (!alone) return header;
  const from = besideLost(context, header);
  const next = from.tailSequence + readBlocks(context, from).length;
  const all = Array.from({ length: context.ringPages }, (_, page) => blockAt(context, page) ?? []);
  const blocks = all.flat();
  const later = blocks.some(({ begin, block }) => isOf(begin, from) && block.covered >= next);
  const newer = blocks.filter(({ begin }) => begin.generation > from.generation);
  const durable = newer.some(({ begin, block }) =>
    newer.some((other) => isOf(other.begin, begin) && block.covered >= other.block.sequence),
  );
  ensure(!later && !durable, 'log', 'later blocks show that the log is more than was found');
  return from;
}

const isOf = (a: LogHeader, b: LogHeader) =>
  a.generation === b.generation && a.sessionId === b.sessionId && same(a.uuid, b.uuid);

function besideLost(context: LogContext, header: LogHeader): LogHeader {
  const ahead = blockAt(context, 0);
  if (!ahead) return header;
  const { begin, block } = ahead;
  if (begin.generation > header.generation) {
    const next = begin.generation === header.generation + 1 && isZero(begin.macBeforeTail);
    const known = next && begin.sessionId === context.lastSessionId;
    ensure(known, 'log', 'the log is of a generation whose header is lost');
    return { ...begin, serial: header.serial };
  }
  const further = isOf(begin, header) && block.sequence > header.tailSequence;
  const lost = further && readBlocks(context, header).length === 0;
  ensure(!lost, 'log', 'the log has gone round since the header that is left');
  return header;
}

/** The block at a page of the ring, if it authenticates, and the header that would lead to it. */
function blockAt(context: LogContext, page: number) {
  const at = context.offset + (HEADER_COPIES + page) * PAGE;
  const fields = new Fields(context.read(at, PAGE), 'log');
  const absurd = [24, 40].some((at) => fields.u64big(at) > BigInt(Number.MAX_SAFE_INTEGER));
  if (fields.text(0, 4) !== 'PQLB' || absurd) return undefined;
  const begin: LogHeader = {
    ...{ serial: 0, uuid: fields.slice(8, 16), generation: fields.u64(24) },
    ...{ sessionId: fields.u32(32), tail: page, tailSequence: fields.u64(40) },
    macBeforeTail: fields.slice(64, 16),
  };
  const key = context.logKey(begin.sessionId);
  const expected = { page, sequence: begin.tailSequence, before: begin.macBeforeTail };
  const block = key && readBlock(context, begin, key, expected, false);
  return block ? { begin, block } : undefined;
}

/** The live blocks from the tail to the first one that does not hold. */
export function readBlocks(context: LogContext, header: LogHeader): LogBlock[] {
  const blocks: LogBlock[] = [];
  if (header.sessionId === 0) return blocks;
  const key = context.logKey(header.sessionId);
  if (!key) return fail('log', `session ${header.sessionId} of the log has no key`);
  let [page, sequence, before] = [header.tail, header.tailSequence, header.macBeforeTail];
  let left = context.ringPages;
  while (left > 0) {
    const block = readBlock(context, header, key, { page, sequence, before });
    if (!block || block.pages > left) break;
    blocks.push(block);
    left -= block.pages;
    page = (page + block.pages) % context.ringPages;
    sequence += 1;
    before = block.mac;
  }
  return blocks;
}

interface Expected {
  readonly page: number;
  readonly sequence: number;
  readonly before: Uint8Array;
}

function readBlock(
  context: LogContext,
  header: LogHeader,
  key: Uint8Array,
  expected: Expected,
  withPayload = true,
): LogBlock | undefined {
  const { page, sequence, before } = expected;
  const pagesToEnd = context.ringPages - page;
  const at = context.offset + (HEADER_COPIES + page) * PAGE;
  const room = Math.min(HEADER_PAGES_MAX, pagesToEnd) * PAGE;
  const fields = new Fields(context.read(at, room), 'log');
  const headerPages = fields.u16(4);
  const payloadPages = fields.u32(36);
  const recordBytes = fields.u32(60);
  const pages = headerPages + payloadPages;
  const fits =
    headerPages >= 1 &&
    headerPages <= HEADER_PAGES_MAX &&
    pages <= pagesToEnd &&
    BLOCK_FIXED_BYTES + recordBytes <= headerPages * PAGE;
  const ours =
    fields.text(0, 4) === 'PQLB' &&
    same(fields.slice(8, 16), header.uuid) &&
    fields.u64big(24) === BigInt(header.generation) &&
    fields.u32(32) === header.sessionId &&
    fields.u64big(40) === BigInt(sequence) &&
    same(fields.slice(64, 16), before);
  if (!fits || !ours) return undefined;
  const mac = fields.slice(TAG_AT, 16);
  const covered = fields.slice(0, BLOCK_FIXED_BYTES + recordBytes);
  covered.fill(0, TAG_AT, TAG_AT + 16);
  const nonce = join(new Uint8Array(4), be64(sequence));
  const empty = new Uint8Array(0);
  if (!aeadOpen(context.suite, key, nonce, covered, empty, mac)) return undefined;

  const flags = fields.u16(6);
  ensure((flags & ~FLAG_SKIP) === 0, 'log', `block ${sequence}: unknown flags ${flags}`);
  const skip = (flags & FLAG_SKIP) !== 0;
  ensure(!skip || pages === pagesToEnd, 'log', `block ${sequence} skips to a place before the end`);
  ensure(fields.u64(48) < sequence, 'log', `block ${sequence} covers itself`);
  const payloadAt = at + headerPages * PAGE;
  const payload = { at: payloadAt, pages: skip ? 0 : payloadPages };
  const records = parseRecords(context, covered, fields.u32(56), payload, sequence);
  const payloadHolds = records.every(
    (record) =>
      !withPayload ||
      record.type !== 'WD' ||
      context.opens(record.sector, record.entry, context.read(record.at, PAGE)),
  );
  if (!payloadHolds) return undefined;
  return { sequence, covered: fields.u64(48), skip, page, pages, records, mac };
}

function parseRecords(
  context: LogContext,
  block: Uint8Array,
  count: number,
  payload: { at: number; pages: number },
  sequence: number,
): LogRecord[] {
  const records: LogRecord[] = [];
  const fields = new Fields(block, 'log');
  let at = BLOCK_FIXED_BYTES;
  for (let index = 0; index < count; index += 1) {
    ensure(at < block.length, 'log', `block ${sequence}: record ${index} is missing`);
    const length = { 1: 48, 2: 48, 3: 24, 4: 32 }[fields.u8(at)];
    if (length === undefined) return fail('log', `block ${sequence}: record ${index}: type`);
    ensure(at + length <= block.length, 'log', `block ${sequence}: record ${index} is cut short`);
    records.push(parseRecord(context, new Fields(block.slice(at, at + length), 'log'), payload));
    at += length;
  }
  ensure(at === block.length, 'log', `block ${sequence}: bytes after its records`);
  return records;
}

function parseRecord(
  context: LogContext,
  fields: Fields,
  payload: { at: number; pages: number },
): LogRecord {
  const { mappable } = context;
  const type = fields.u8(0);
  if (type === 4) return parseMap(context, fields);
  const sector = fields.u64(8);
  ensure(sector < mappable, 'log', `a record of sector ${sector}, beyond the tables`);
  if (type === 3) {
    fields.zero(1, 7, 'bytes of a Z record');
    const count = fields.u64(16);
    ensure(count >= 1 && sector + count <= mappable, 'log', `Z of ${count} sectors`);
    return { type: 'Z', first: sector, count };
  }
  const entry = parseSectorEntry(fields.slice(16, 32), sector);
  ensure(entry.state === 'data', 'log', `a write of sector ${sector} without data`);
  if (type === 1) {
    fields.zero(1, 7, 'bytes of a W record');
    return { type: 'W', sector, entry };
  }
  fields.zero(1, 3, 'bytes of a WD record');
  const index = fields.u32(4);
  ensure(index < payload.pages, 'log', `a WD record of payload page ${index}`);
  return { type: 'WD', sector, entry, at: payload.at + index * PAGE };
}

function parseMap(context: LogContext, fields: Fields): LogRecord {
  const { n, d, clusterBytes } = context.geometry;
  ensure(fields.u8(1) <= 1 && isZero(fields.slice(2, 6)), 'log', 'bytes of a MAP record');
  const kind = fields.u8(1) === 0 ? 'data' : 'entry';
  const slot = fields.u64(8);
  ensure(slot % n < d === (kind === 'data'), 'log', `a MAP of kind ${kind} for slot ${slot}`);
  const to = parseTableEntry(fields, 16, 2, clusterBytes);
  const from = parseTableEntry(fields, 24, 2, clusterBytes);
  return { type: 'MAP', kind, slot, to, from };
}
