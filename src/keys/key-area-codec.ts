// Room keys/: the bytes of the key area: a 4 KiB head, then at most 15 slots of 4 KiB, 64 KiB in
// all.
//
// Layout and checks only; which keys protect what is key-area.ts. The engine keeps two copies of
// this blob and never looks inside. All integers are little-endian; unused bytes are zero and
// checked.
import { PqblkError } from '../errors.js';
import { ascii, equalConstantTime, isZero, viewOf } from './bytes.js';
import { Aead, GCM_NONCE_BYTES, GCM_TAG_BYTES, Kdf, KEY_BYTES, MAC_BYTES } from './kdf.js';
import { Secret } from './secret.js';
import { encodeSlot, parseSlot, SLOT_BYTES, type Slot } from './slot.js';

export const KEY_AREA_BYTES = 65_536;
export const HEAD_BYTES = 4096;
export const SLOTS_MAX = KEY_AREA_BYTES / SLOT_BYTES - 1;
/** Epochs whose data keys a disk can hold: the current, the next, and old ones in snapshots. */
export const EPOCHS_MAX = 64;
export const AUDIT_HEAD_BYTES = 32;

/** What this version writes, and the oldest reader that can read what it writes. */
export const KEY_AREA_VERSION = 1;
const MINIMUM_READER = 1;

const MAGIC = ascii('PQBLKKEY');

/** Byte offsets within the head. */
const OFFSET = {
  magic: 0,
  version: 8, // u16
  minimumReader: 10, // u16
  slotCount: 12, // u16: slots 0 … count-1 are in use or were; the rest is zero
  tableLength: 14, // u16: bytes of the wrapped key table, without its tag
  generation: 16, // u64
  volumeUuid: 24, // 16 bytes
  currentEpoch: 40, // u32
  nextEpoch: 44, // u32; 0 = no rotation of the data key under way
  kdf: 48, // u16
  aead: 50, // u16, then 4 bytes zero
  auditLength: 56, // u64: lines in the audit log
  auditHead: 64, // 32 bytes: hash of its last line; then 32 bytes zero
  tableNonce: 128, // 12 bytes; everything before it is the AAD of the key table
  tableTag: 140, // 16 bytes, then 4 bytes zero
  table: 160, // at most 2600 bytes, then zero
  mac: 4064, // 32 bytes: HMAC-SHA3-256 over head (this field as zero) and slots 0 … count-1
} as const;

const TABLE_FIXED_BYTES = 40;
const TABLE_ENTRY_BYTES = 40;
const TABLE_BYTES_MAX = TABLE_FIXED_BYTES + EPOCHS_MAX * TABLE_ENTRY_BYTES;
const GENERATION_MAX = BigInt(Number.MAX_SAFE_INTEGER);

export interface Head {
  readonly version: number;
  readonly generation: number;
  readonly volumeUuid: Uint8Array;
  readonly currentEpoch: number;
  /** 0 = none. */
  readonly nextEpoch: number;
  readonly auditLength: bigint;
  readonly auditHead: Uint8Array;
  readonly tableNonce: Uint8Array;
  readonly tableTag: Uint8Array;
  readonly wrappedTable: Uint8Array;
  readonly mac: Uint8Array;
}

export interface KeyArea {
  readonly head: Head;
  /** By position; undefined = empty. Its length is the slot count of the head. */
  readonly slots: readonly (Slot | undefined)[];
}

/** The key table in the clear: what the volume master key protects. */
export interface KeyTable {
  readonly integrityKey: Secret;
  readonly dataKeys: ReadonlyMap<number, Secret>;
}

/** The blob, without a valid MAC unless `area.head.mac` already is one. */
export function encodeKeyArea(area: KeyArea): Uint8Array {
  const { head, slots } = area;
  if (slots.length > SLOTS_MAX || head.wrappedTable.length > TABLE_BYTES_MAX) {
    throw new PqblkError('invalid_argument', 'too many slots or epochs for a key area');
  }
  const bytes = new Uint8Array(KEY_AREA_BYTES);
  const view = viewOf(bytes);
  bytes.set(MAGIC, OFFSET.magic);
  view.setUint16(OFFSET.version, KEY_AREA_VERSION, true);
  view.setUint16(OFFSET.minimumReader, MINIMUM_READER, true);
  view.setUint16(OFFSET.slotCount, slots.length, true);
  view.setUint16(OFFSET.tableLength, head.wrappedTable.length, true);
  view.setBigUint64(OFFSET.generation, BigInt(head.generation), true);
  bytes.set(head.volumeUuid, OFFSET.volumeUuid);
  view.setUint32(OFFSET.currentEpoch, head.currentEpoch, true);
  view.setUint32(OFFSET.nextEpoch, head.nextEpoch, true);
  view.setUint16(OFFSET.kdf, Kdf.hkdfSha3_256, true);
  view.setUint16(OFFSET.aead, Aead.aes256Gcm, true);
  view.setBigUint64(OFFSET.auditLength, head.auditLength, true);
  bytes.set(head.auditHead, OFFSET.auditHead);
  bytes.set(head.tableNonce, OFFSET.tableNonce);
  bytes.set(head.tableTag, OFFSET.tableTag);
  bytes.set(head.wrappedTable, OFFSET.table);
  bytes.set(head.mac, OFFSET.mac);
  slots.forEach((slot, index) => {
    if (slot) bytes.set(encodeSlot(slot), HEAD_BYTES + index * SLOT_BYTES);
  });
  return bytes;
}

function damaged(message: string): never {
  throw new PqblkError('key_area_damaged', `key area damaged: ${message}`, {
    operation: 'read key area',
  });
}

function requireZero(bytes: Uint8Array, from: number, to: number, what: string): void {
  if (!isZero(bytes.subarray(from, to))) damaged(`${what} not zero`);
}

/**
 * Reads a blob and checks every field; nothing in the result is authenticated yet. Kinds
 * `key_area_damaged` and `newer_version`.
 */
export function parseKeyArea(bytes: Uint8Array): KeyArea {
  if (bytes.length !== KEY_AREA_BYTES) {
    damaged(`expected ${KEY_AREA_BYTES} bytes, found ${bytes.length}`);
  }
  const view = viewOf(bytes);
  if (!equalConstantTime(bytes.subarray(0, MAGIC.length), MAGIC)) damaged('no key area magic');
  const [version, slotCount] = parseVersions(view);
  const head = parseHead(bytes, view, version);
  const slots: (Slot | undefined)[] = [];
  for (let index = 0; index < slotCount; index += 1) {
    const at = HEAD_BYTES + index * SLOT_BYTES;
    slots.push(parseSlot(bytes.subarray(at, at + SLOT_BYTES), index));
  }
  requireZero(bytes, HEAD_BYTES + slotCount * SLOT_BYTES, KEY_AREA_BYTES, 'bytes after the slots');
  return { head, slots };
}

/** The generation that a blob of the right size says it has. */
export const generationIn = (blob: Uint8Array) =>
  viewOf(blob).getBigUint64(OFFSET.generation, true);

function parseVersions(view: DataView): [version: number, slotCount: number] {
  const version = view.getUint16(OFFSET.version, true);
  const minimum = view.getUint16(OFFSET.minimumReader, true);
  if (minimum > KEY_AREA_VERSION) {
    throw new PqblkError(
      'newer_version',
      `the key area needs a reader of version ${minimum}; this one knows ${KEY_AREA_VERSION}`,
      { operation: 'read key area', hint: 'use a newer pqblk' },
    );
  }
  if (version < 1 || minimum < 1 || minimum > version) {
    damaged(`version ${version} with minimum reader ${minimum}`);
  }
  const slotCount = view.getUint16(OFFSET.slotCount, true);
  if (slotCount > SLOTS_MAX) damaged(`${slotCount} slots, at most ${SLOTS_MAX}`);
  return [version, slotCount];
}

function parseHead(bytes: Uint8Array, view: DataView, version: number): Head {
  const generation = view.getBigUint64(OFFSET.generation, true);
  if (generation < 1n || generation > GENERATION_MAX) damaged(`generation ${generation}`);
  const currentEpoch = view.getUint32(OFFSET.currentEpoch, true);
  const nextEpoch = view.getUint32(OFFSET.nextEpoch, true);
  if (currentEpoch < 1) damaged('the current epoch is 0');
  if (nextEpoch !== 0 && nextEpoch <= currentEpoch) {
    damaged(`next epoch ${nextEpoch} is not after the current one, ${currentEpoch}`);
  }
  const tableLength = view.getUint16(OFFSET.tableLength, true);
  const tableKeys = (tableLength - TABLE_FIXED_BYTES) / TABLE_ENTRY_BYTES;
  if (!Number.isInteger(tableKeys) || tableKeys < 1 || tableKeys > EPOCHS_MAX) {
    damaged(`a key table of ${tableLength} bytes`);
  }
  const [kdf, aead] = [view.getUint16(OFFSET.kdf, true), view.getUint16(OFFSET.aead, true)];
  if (kdf !== Kdf.hkdfSha3_256 || aead !== Aead.aes256Gcm) {
    damaged(`unknown algorithms (kdf ${kdf}, aead ${aead})`);
  }
  // A later version may give these a meaning that this reader may ignore; the MAC covers them
  // anyway.
  if (version === KEY_AREA_VERSION) {
    requireZero(bytes, OFFSET.aead + 2, OFFSET.auditLength, 'reserved bytes');
    requireZero(bytes, OFFSET.auditHead + AUDIT_HEAD_BYTES, OFFSET.tableNonce, 'reserved bytes');
    requireZero(bytes, OFFSET.tableTag + GCM_TAG_BYTES, OFFSET.table, 'reserved bytes');
    requireZero(bytes, OFFSET.table + tableLength, OFFSET.mac, 'bytes after the key table');
  }
  const copy = (offset: number, length: number) => bytes.slice(offset, offset + length);
  return {
    version,
    generation: Number(generation),
    volumeUuid: copy(OFFSET.volumeUuid, 16),
    currentEpoch,
    nextEpoch,
    auditLength: view.getBigUint64(OFFSET.auditLength, true),
    auditHead: copy(OFFSET.auditHead, AUDIT_HEAD_BYTES),
    tableNonce: copy(OFFSET.tableNonce, GCM_NONCE_BYTES),
    tableTag: copy(OFFSET.tableTag, GCM_TAG_BYTES),
    wrappedTable: copy(OFFSET.table, tableLength),
    mac: copy(OFFSET.mac, MAC_BYTES),
  };
}

/** What the MAC covers: head with the MAC field as zero, then the slots that the head counts. */
export function macInput(blob: Uint8Array): Uint8Array {
  const slotCount = viewOf(blob).getUint16(OFFSET.slotCount, true);
  const input = blob.slice(0, HEAD_BYTES + slotCount * SLOT_BYTES);
  input.fill(0, OFFSET.mac, OFFSET.mac + MAC_BYTES);
  return input;
}

/** Puts a MAC into an encoded blob. */
export function setMac(blob: Uint8Array, mac: Uint8Array): void {
  blob.set(mac, OFFSET.mac);
}

/** What AES-GCM covers besides the key table: every byte of the head before the nonce. */
export function tableAad(blob: Uint8Array): Uint8Array {
  return blob.subarray(0, OFFSET.tableNonce);
}

/** Key table in the clear: integrity key, u32 count, u32 zero, then {u32 epoch, u32 zero, key}. */
export function encodeKeyTable(table: KeyTable): Secret {
  const bytes = new Uint8Array(TABLE_FIXED_BYTES + table.dataKeys.size * TABLE_ENTRY_BYTES);
  const view = viewOf(bytes);
  table.integrityKey.use((key) => bytes.set(key, 0));
  view.setUint32(KEY_BYTES, table.dataKeys.size, true);
  const sorted = [...table.dataKeys].sort(([a], [b]) => a - b);
  sorted.forEach(([epoch, dataKey], index) => {
    const at = TABLE_FIXED_BYTES + index * TABLE_ENTRY_BYTES;
    view.setUint32(at, epoch, true);
    dataKey.use((key) => bytes.set(key, at + 8));
  });
  return new Secret(bytes);
}

/** The reverse; epochs ascend and are those that the head needs. Kind `key_area_damaged`. */
export function parseKeyTable(plain: Secret, head: Head): KeyTable {
  return plain.use((bytes) => {
    const view = viewOf(bytes);
    const count = view.getUint32(KEY_BYTES, true);
    const dataKeys = new Map<number, Secret>();
    if (count * TABLE_ENTRY_BYTES + TABLE_FIXED_BYTES !== bytes.length) {
      damaged(`the key table counts ${count} keys`);
    }
    requireZero(bytes, KEY_BYTES + 4, TABLE_FIXED_BYTES, 'reserved bytes of the key table');
    let last = 0;
    for (let at = TABLE_FIXED_BYTES; at < bytes.length; at += TABLE_ENTRY_BYTES) {
      const epoch = view.getUint32(at, true);
      if (epoch <= last) damaged('epochs of the key table do not ascend');
      requireZero(bytes, at + 4, at + 8, 'reserved bytes of the key table');
      dataKeys.set(epoch, Secret.copyOf(bytes.subarray(at + 8, at + TABLE_ENTRY_BYTES)));
      last = epoch;
    }
    const needed = head.nextEpoch === 0 ? [head.currentEpoch] : [head.currentEpoch, head.nextEpoch];
    for (const epoch of needed) {
      if (!dataKeys.has(epoch)) damaged(`no data key of epoch ${epoch}`);
    }
    return { integrityKey: Secret.copyOf(bytes.subarray(0, KEY_BYTES)), dataKeys };
  });
}
