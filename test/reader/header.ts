// The second reader: docs/format.md section 1, the QCOW2 header and the extension "PQB1".
//
// Every field is checked before anyone uses it. The MAC is checked apart, since it needs a key and
// the key area is found through this header.
import { ensure, Fields, fail, isZero, join, same } from './bytes.js';
import { hmacSha3, Suite, type SuiteId } from './crypto.js';

export const SECTOR_BYTES = 4096;
export const KEY_AREA_COPY_BYTES = 69_632;
const HEADER_LENGTH = 112;
const EXTENSION_TYPE = 0x5051_4231;
const EXTENSION_BYTES = 392;
const PAYLOAD_AT = 120;
const MAC_AT = PAYLOAD_AT + 360;
const AUTHENTICATED_BYTES = 512;
const READER_VERSION = 1;
const LOG_BYTES_MIN = 262_144;
const BACKING_NAME_BYTES_MAX = 1023;

const DIRTY = 1n;
const CORRUPT = 2n;
const SEALED = 1n << 56n;

export const BackingPolicy = { none: 0, sealed: 1, unauthenticated: 2 } as const;

export interface Region {
  readonly name: string;
  readonly offset: number;
  readonly length: number;
}

export interface Extension {
  readonly type: number;
  readonly payload: Uint8Array;
}

export interface Header {
  readonly clusterBits: number;
  readonly clusterBytes: number;
  /** Bytes the guest sees. */
  readonly size: number;
  readonly l1Offset: number;
  readonly l1Size: number;
  readonly refcountTableOffset: number;
  readonly refcountTableClusters: number;
  readonly snapshots: number;
  readonly dirty: boolean;
  readonly corrupt: boolean;
  readonly formatVersion: number;
  readonly suite: SuiteId;
  readonly uuid: Uint8Array;
  readonly backingPolicy: number;
  readonly backingUuid: Uint8Array;
  readonly backingName: Uint8Array;
  readonly keyAreas: readonly [Region, Region];
  readonly sessionTables: readonly [Region, Region];
  readonly log: Region;
  /** Those after the first one. */
  readonly extensions: readonly Extension[];
  readonly mac: Uint8Array;
  /** What the MAC covers. */
  readonly authenticated: Uint8Array;
}

/** `start` is the beginning of the file: at least one cluster of 2 MiB, or the whole file. */
export function parseHeader(start: Uint8Array, fileBytes: number): Header {
  ensure(start.length >= AUTHENTICATED_BYTES, 'header', `a file of ${fileBytes} bytes`);
  const qcow = new Fields(start, 'header');
  ensure(qcow.u32(0) === 0x5146_49fb && qcow.u32(4) === 3, 'header', 'not a QCOW2 version 3 image');
  ensure(qcow.u32(100) === HEADER_LENGTH, 'header', `header length ${qcow.u32(100)}`);
  ensure(qcow.u32(32) === 0, 'header', `crypt method ${qcow.u32(32)}`);
  ensure(qcow.u32(96) === 4, 'header', `refcount order ${qcow.u32(96)}`);
  qcow.zero(104, 8, 'compression type and padding');
  const clusterBits = qcow.u32(20);
  ensure(clusterBits >= 12 && clusterBits <= 21, 'header', `cluster bits ${clusterBits}`);
  const clusterBytes = 2 ** clusterBits;
  const size = qcow.u64(24);
  ensure(size % 512 === 0, 'header', `size ${size} is not a multiple of 512`);
  const features = qcow.u64big(72);
  ensure((features & SEALED) !== 0n, 'header', 'not a sealed disk');
  const unknown = features & ~(SEALED | DIRTY | CORRUPT);
  ensure(unknown === 0n, 'header', `unknown incompatible features ${unknown.toString(16)}`);
  const backingName = parseBackingName(qcow, Math.min(clusterBytes, start.length));
  const payload = parsePayload(qcow, clusterBytes);
  const named = backingName.length > 0;
  ensure(named === (payload.backingPolicy !== 0), 'header', 'backing policy without backing name');
  const header: Header = {
    clusterBits,
    clusterBytes,
    size,
    l1Offset: qcow.u64(40),
    l1Size: qcow.u32(36),
    refcountTableOffset: qcow.u64(48),
    refcountTableClusters: qcow.u32(56),
    snapshots: qcow.u32(60),
    dirty: (features & DIRTY) !== 0n,
    corrupt: (features & CORRUPT) !== 0n,
    backingName,
    extensions: parseExtensions(qcow, Math.min(clusterBytes, start.length)),
    mac: qcow.slice(MAC_AT, 32),
    authenticated: authenticatedBytes(start, backingName),
    ...payload,
  };
  checkRegions(header, fileBytes);
  return header;
}

export function checkHeaderMac(header: Header, key: Uint8Array): void {
  const mac = hmacSha3(key, header.authenticated);
  ensure(same(mac, header.mac), 'header-mac', 'the MAC of the header does not hold');
}

function parsePayload(qcow: Fields, clusterBytes: number) {
  ensure(qcow.u32(HEADER_LENGTH) === EXTENSION_TYPE, 'header', 'the first extension is not PQB1');
  ensure(qcow.u32(HEADER_LENGTH + 4) === EXTENSION_BYTES, 'header', 'PQB1 has another length');
  const ext = new Fields(qcow.slice(PAYLOAD_AT, EXTENSION_BYTES), 'header');
  const [formatVersion, minimumReader] = [ext.u32(0), ext.u32(4)];
  ensure(minimumReader <= READER_VERSION, 'header', `needs a reader of version ${minimumReader}`);
  ensure(minimumReader >= 1 && formatVersion >= minimumReader, 'header', 'format versions');
  const suite = ext.u8(8);
  if (suite !== Suite.aes256Gcm && suite !== Suite.chaCha20Poly1305) {
    return fail('header', `unknown suite ${suite}`);
  }
  ensure(ext.u8(9) === 1, 'header', `unknown KDF ${ext.u8(9)}`);
  const backingPolicy = ext.u8(10);
  ensure(backingPolicy <= 2, 'header', `unknown backing policy ${backingPolicy}`);
  ext.zero(11, 5, 'bytes after the backing policy');
  ensure(ext.u32(48) === KEY_AREA_COPY_BYTES, 'header', `key area of ${ext.u32(48)} bytes`);
  ext.zero(52, 4, 'bytes after the key area');
  const tableBytes = ext.u32(72);
  ensure(tableBytes > 0 && tableBytes % SECTOR_BYTES === 0, 'header', 'session table length');
  ext.zero(76, 4, 'bytes after the session table');
  const log = { name: 'log', offset: ext.u64(80), length: ext.u64(88) };
  ensure(log.length % SECTOR_BYTES === 0, 'header', `a log of ${log.length} bytes`);
  ensure(log.length >= LOG_BYTES_MIN, 'header', `a log of ${log.length} bytes`);
  ext.zero(112, 248, 'reserved bytes');
  const backingUuid = ext.slice(96, 16);
  const bound = backingPolicy === BackingPolicy.sealed;
  ensure(bound !== isZero(backingUuid), 'header', 'backing UUID against the backing policy');
  const region = (name: string, at: number, length: number): Region => {
    const offset = ext.u64(at);
    ensure(offset % clusterBytes === 0, 'regions', `${name} at ${offset} is not aligned`);
    return { name, offset, length };
  };
  ensure(log.offset % clusterBytes === 0, 'regions', `log at ${log.offset} is not aligned`);
  return {
    formatVersion,
    suite: suite as SuiteId,
    uuid: ext.slice(16, 16),
    backingPolicy,
    backingUuid,
    keyAreas: [
      region('key area A', 32, KEY_AREA_COPY_BYTES),
      region('key area B', 40, KEY_AREA_COPY_BYTES),
    ],
    sessionTables: [
      region('session table A', 56, tableBytes),
      region('session table B', 64, tableBytes),
    ],
    log,
  } as const;
}

function parseBackingName(qcow: Fields, limit: number): Uint8Array {
  const [offset, length] = [qcow.u64(8), qcow.u32(16)];
  if (offset === 0) {
    ensure(length === 0, 'header', 'a backing name without a place');
    return new Uint8Array(0);
  }
  ensure(length >= 1 && length <= BACKING_NAME_BYTES_MAX, 'header', `backing name of ${length}`);
  const inside = offset >= AUTHENTICATED_BYTES && offset + length <= limit;
  ensure(inside, 'header', `backing name at ${offset}`);
  return qcow.slice(offset, length);
}

function parseExtensions(qcow: Fields, clusterEnd: number): Extension[] {
  const end = qcow.u64(8) || clusterEnd;
  const extensions: Extension[] = [];
  let at = AUTHENTICATED_BYTES;
  while (at + 8 <= end && qcow.u32(at) !== 0) {
    const [type, length] = [qcow.u32(at), qcow.u32(at + 4)];
    ensure(at + 8 + length <= end, 'header', `extension of ${length} bytes at ${at}`);
    ensure(type !== EXTENSION_TYPE, 'header', 'PQB1 twice');
    extensions.push({ type, payload: qcow.slice(at + 8, length) });
    at += 8 + Math.ceil(length / 8) * 8;
  }
  return extensions;
}

function authenticatedBytes(start: Uint8Array, backingName: Uint8Array): Uint8Array {
  const bytes = start.slice(0, AUTHENTICATED_BYTES);
  bytes.fill(0, MAC_AT, MAC_AT + 32);
  bytes[79] = (bytes[79] ?? 0) & ~0b11; // the lowest byte of incompatible_features
  return join(bytes, backingName);
}

/** The places that the header names, in whole clusters; what of them is missing or shared is a fault. */
export function headerRegions(header: Header): Region[] {
  const { clusterBytes } = header;
  return [
    { name: 'header', offset: 0, length: clusterBytes },
    { name: 'L1 table', offset: header.l1Offset, length: header.l1Size * 8 },
    {
      name: 'refcount table',
      offset: header.refcountTableOffset,
      length: header.refcountTableClusters * clusterBytes,
    },
    ...header.keyAreas,
    ...header.sessionTables,
    header.log,
  ].map(({ name, offset, length }) => ({
    name,
    offset,
    length: Math.ceil(length / clusterBytes) * clusterBytes,
  }));
}

function checkRegions(header: Header, fileBytes: number): void {
  const regions = headerRegions(header).filter((region) => region.length > 0);
  regions.sort((a, b) => a.offset - b.offset);
  let end = 0;
  for (const { name, offset, length } of regions) {
    ensure(offset % header.clusterBytes === 0, 'regions', `${name} at ${offset} is not aligned`);
    ensure(offset >= end, 'regions', `${name} overlaps what lies before it`);
    end = offset + length;
  }
  for (const { name, offset, length } of [
    ...header.keyAreas,
    ...header.sessionTables,
    header.log,
  ]) {
    ensure(offset + length <= fileBytes, 'regions', `${name} goes beyond the end of the file`);
  }
}

/** Type and bit → name, from the feature-name table (QCOW2 extension 0x6803f857). */
export function featureNames(header: Header): Map<string, string> {
  const names = new Map<string, string>();
  for (const { type, payload } of header.extensions) {
    if (type !== 0x6803_f857) continue;
    const fields = new Fields(payload, 'header');
    for (let at = 0; at + 48 <= payload.length; at += 48) {
      const name = fields.text(at + 2, 46).replace(/\0+$/, '');
      names.set(`${fields.u8(at)}:${fields.u8(at + 1)}`, name);
    }
  }
  return names;
}
