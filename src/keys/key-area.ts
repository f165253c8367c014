// Room keys/: what the key area means: who can open a disk, and which keys he gets.
//
//   slot --(private key)--> VMK --HKDF--> wrap key --AES-256-GCM--> integrity key, data keys
//                                \-HKDF--> MAC key: HMAC-SHA3-256 over head and slots
//
// Bytes are key-area-codec.ts, one slot is slot.ts. Making a successor is key-area-editor.ts: the VMK
// never leaves these two files. Where the blob is kept, and that it is replaced atomically in both
// copies, is the engine's business; whether it is older than what this host saw before is pins.ts.
import { PqblkError } from '../errors.js';
import { concat, equalConstantTime, formatUuid, fromHex, toHex } from './bytes.js';
import {
  deriveMasterKeys,
  GCM_NONCE_BYTES,
  gcmOpen,
  gcmSeal,
  hmacSha3,
  KEY_BYTES,
  MAC_BYTES,
  type MasterKeys,
} from './kdf.js';
import {
  AUDIT_HEAD_BYTES,
  encodeKeyArea,
  encodeKeyTable,
  type Head,
  KEY_AREA_VERSION,
  type KeyArea,
  type KeyTable,
  macInput,
  parseKeyArea,
  parseKeyTable,
  SLOTS_MAX,
  setMac,
  tableAad,
} from './key-area-codec.js';
import {
  type AuditHead,
  describeAudit,
  describeSlot,
  type SlotDescription,
} from './key-area-describe.js';
import { fingerprintOf } from './ml-kem.js';
import type { Identity } from './provider.js';
import { randomBytes, Secret } from './secret.js';
import { requirePrimitives } from './self-test.js';
import { draftSlot, openSlot, type Recipient, type Slot, SlotState, sealSlot } from './slot.js';

const FIRST_EPOCH = 1;

/** What the engine needs of an opened key area, and what a pin remembers. Wipe it after use. */
export interface VolumeKeys {
  readonly volumeUuid: Uint8Array;
  /** 32 bytes: MACs of header, extension and session table hang on it. */
  readonly integrityKey: Secret;
  /** Epoch → 32-byte data key. */
  readonly dataKeys: ReadonlyMap<number, Secret>;
  readonly currentEpoch: number;
  /** The epoch a data-key rotation moves to, or undefined when none is under way. */
  readonly nextEpoch: number | undefined;
  readonly generation: number;
  /** One-way check value of the VMK, 32 bytes. */
  readonly vmkCheck: Uint8Array;
  [Symbol.dispose](): void;
}

export interface CreatedKeyArea extends VolumeKeys {
  /** The 64 KiB for both copies. */
  readonly blob: Uint8Array;
}

export interface OpenedKeyArea extends VolumeKeys {
  /** The slot that opened it. */
  readonly slotIndex: number;
  readonly slot: SlotDescription;
  /** The audit log, as far as this key area counts it. */
  readonly audit: AuditHead;
}

export interface CreateKeyAreaOptions {
  /** 16 bytes. */
  volumeUuid: Uint8Array;
  /** 1 to 15, each key once. */
  recipients: readonly Recipient[];
  /** Seconds since 1970; now, when left out. */
  created?: number;
  /** The line of the audit log that says so. */
  audit?: AuditHead | undefined;
}

/** Fresh VMK, integrity key and data key of epoch 1, sealed to every recipient. Generation 1. */
export async function createKeyArea(options: CreateKeyAreaOptions): Promise<CreatedKeyArea> {
  const { volumeUuid, recipients, created = nowSeconds(), audit } = options;
  if (volumeUuid.length !== 16) {
    throw new PqblkError(
      'invalid_argument',
      `a volume UUID has 16 bytes, not ${volumeUuid.length}`,
    );
  }
  if (recipients.length === 0) {
    throw new PqblkError('no_key', 'a sealed disk needs at least one recipient', {
      hint: 'make a key with `pqblk key gen` and name it',
    });
  }
  requireRoom(recipients.length);
  requireDistinct(recipients.map((recipient) => recipient.encapsulationKey));
  requirePrimitives();
  using vmk = Secret.random(KEY_BYTES);
  const slots: Slot[] = [];
  for (const recipient of recipients) {
    slots.push(await sealSlot(vmk, volumeUuid, draftSlot(recipient, created), recipient.provider));
  }
  const table: KeyTable = {
    integrityKey: Secret.random(KEY_BYTES),
    dataKeys: new Map([[FIRST_EPOCH, Secret.random(KEY_BYTES)]]),
  };
  const head: HeadFields = {
    generation: 1,
    volumeUuid,
    currentEpoch: FIRST_EPOCH,
    nextEpoch: 0,
    auditLength: BigInt(audit?.lines ?? 0),
    auditHead: audit ? fromHex(audit.hash) : new Uint8Array(AUDIT_HEAD_BYTES),
  };
  using master = deriveMasterKeys(vmk, volumeUuid);
  const blob = sealKeyArea(master, head, slots, table);
  return { ...volumeKeys(head, table, master), blob };
}

export interface OpenKeyAreaOptions {
  /** When given, a blob of another volume is refused with kind `uuid_mismatch`. */
  expectedVolumeUuid?: Uint8Array | undefined;
}

/**
 * Opens a blob with a private key. Kinds: `key_area_damaged` (magic, a field, or the MAC),
 * `newer_version`, `uuid_mismatch`, `no_slot` (no slot for this key), `slot_revoked`, `wrong_key`
 * (wrong key or tampered slot), and what the provider raises. Rollback is for the caller to check
 * against his pins, with `generation`, `vmkCheck` and `currentEpoch`, before he uses the keys.
 */
export async function openKeyArea(
  blob: Uint8Array,
  identity: Identity,
  options: OpenKeyAreaOptions = {},
): Promise<OpenedKeyArea> {
  const opened = await unlockKeyArea(blob, identity, options);
  opened.vmk.wipe();
  using master = opened.master;
  const { area, table, slotIndex } = opened;
  const slot = describeSlot(area.slots[slotIndex] as Slot, slotIndex);
  const audit = describeAudit(area.head);
  return { ...volumeKeys(area.head, table, master), slotIndex, slot, audit };
}

// ---- inside: between the VMK and the blob ------------------------------------------------------

export type HeadFields = Omit<Head, 'version' | 'tableNonce' | 'tableTag' | 'wrappedTable' | 'mac'>;

/** Everything of an opened key area. `unlockKeyArea` makes it; its receiver wipes it. */
export interface Unlocked {
  area: KeyArea;
  table: KeyTable;
  slotIndex: number;
  vmk: Secret;
  master: MasterKeys;
}

/** As openKeyArea, with what a successor is made of. */
export async function unlockKeyArea(
  blob: Uint8Array,
  identity: Identity,
  options: OpenKeyAreaOptions,
): Promise<Unlocked> {
  requirePrimitives();
  // A copy: what was parsed is what is authenticated, whatever the caller does meanwhile.
  const own = Uint8Array.from(blob);
  const area = parseKeyArea(own);
  requireVolume(area.head.volumeUuid, options.expectedVolumeUuid);
  const { vmk, slotIndex } = await openOwnSlot(area, identity);
  const master = deriveMasterKeys(vmk, area.head.volumeUuid);
  try {
    return { area, table: openTable(own, area.head, master), slotIndex, vmk, master };
  } catch (error) {
    vmk.wipe();
    master[Symbol.dispose]();
    throw error;
  }
}

/** Tries the slots made for this key. A revoked or broken one must not hide a good one. */
async function openOwnSlot(
  area: KeyArea,
  identity: Identity,
): Promise<{ vmk: Secret; slotIndex: number }> {
  const own = area.slots.flatMap((slot, slotIndex) =>
    slot && equalConstantTime(fingerprintOf(slot.encapsulationKey), identity.fingerprint)
      ? [{ slot, slotIndex }]
      : [],
  );
  const live = own.filter(({ slot }) => isLive(slot));
  for (const { slot, slotIndex } of live) {
    const vmk = await openSlot(slot, area.head.volumeUuid, identity);
    if (vmk) return { vmk, slotIndex };
  }
  const fingerprint = toHex(identity.fingerprint);
  const details = { operation: 'open key area' };
  if (live.length > 0) {
    throw new PqblkError('wrong_key', `wrong key or tampered slot (key ${fingerprint})`, details);
  }
  if (own.length > 0) {
    throw new PqblkError('slot_revoked', `the slot of key ${fingerprint} was revoked`, details);
  }
  throw new PqblkError('no_slot', `no slot for key ${fingerprint}`, {
    ...details,
    hint: '`pqblk info` lists the keys that open this disk',
  });
}

function openTable(blob: Uint8Array, head: Head, master: MasterKeys): KeyTable {
  if (!equalConstantTime(hmacSha3(master.mac, macInput(blob)), head.mac)) {
    throw new PqblkError('key_area_damaged', 'key area damaged: its MAC does not hold', {
      operation: 'open key area',
    });
  }
  const sealed = concat(head.wrappedTable, head.tableTag);
  using plain = gcmOpen(master.wrap, head.tableNonce, tableAad(blob), sealed);
  if (!plain) {
    throw new PqblkError('key_area_damaged', 'key area damaged: its key table does not open', {
      operation: 'open key area',
    });
  }
  return parseKeyTable(plain, head);
}

/** Composes a blob; a fresh nonce each time, so the same fields never give the same bytes. */
export function sealKeyArea(
  master: MasterKeys,
  fields: HeadFields,
  slots: readonly (Slot | undefined)[],
  table: KeyTable,
): Uint8Array {
  using plain = encodeKeyTable(table);
  const open: Head = {
    ...fields,
    version: KEY_AREA_VERSION,
    tableNonce: randomBytes(GCM_NONCE_BYTES),
    tableTag: new Uint8Array(0),
    wrappedTable: new Uint8Array(plain.length),
    mac: new Uint8Array(MAC_BYTES),
  };
  // The length of the table is part of its AAD, so the AAD is taken from a blob with room for it.
  const aad = tableAad(encodeKeyArea({ head: open, slots }));
  const sealed = plain.use((bytes) => gcmSeal(master.wrap, open.tableNonce, aad, bytes));
  const head: Head = {
    ...open,
    wrappedTable: sealed.subarray(0, plain.length),
    tableTag: sealed.subarray(plain.length),
  };
  const blob = encodeKeyArea({ head, slots });
  setMac(blob, hmacSha3(master.mac, macInput(blob)));
  return blob;
}

export function volumeKeys(head: HeadFields, table: KeyTable, master: MasterKeys): VolumeKeys {
  return {
    volumeUuid: Uint8Array.from(head.volumeUuid),
    integrityKey: table.integrityKey,
    dataKeys: table.dataKeys,
    currentEpoch: head.currentEpoch,
    nextEpoch: head.nextEpoch || undefined,
    generation: head.generation,
    vmkCheck: master.vmkCheck,
    [Symbol.dispose]() {
      table.integrityKey.wipe();
      for (const key of table.dataKeys.values()) key.wipe();
    },
  };
}

export const nowSeconds = () => Math.floor(Date.now() / 1000);

export const isLive = (slot: Slot | undefined): slot is Slot =>
  slot !== undefined && slot.state !== SlotState.revoked;

export function requireRoom(count: number): number {
  if (count <= SLOTS_MAX) return count;
  throw new PqblkError('no_space', `a key area has ${SLOTS_MAX} slots and all would be in use`, {
    hint: 'revoke a slot first',
  });
}

export function requireDistinct(keys: readonly Uint8Array[]): void {
  const seen = new Set<string>();
  for (const key of keys) {
    const fingerprint = toHex(fingerprintOf(key));
    if (seen.has(fingerprint)) {
      throw new PqblkError('slot_exists', `key ${fingerprint} would have two slots`);
    }
    seen.add(fingerprint);
  }
}

function requireVolume(actual: Uint8Array, expected: Uint8Array | undefined): void {
  if (expected === undefined || equalConstantTime(actual, expected)) return;
  throw new PqblkError(
    'uuid_mismatch',
    `the key area belongs to volume ${formatUuid(actual)}, expected ${formatUuid(expected)}`,
    { operation: 'open key area' },
  );
}
