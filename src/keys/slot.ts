// Room keys/: one key slot, 4 KiB: its bytes, and how the volume master key (VMK) goes in and out.
//
// The layout is declared once, in OFFSET (docs/keys.md). Everything is little-endian
// and every byte that no field uses is zero, so that a slot has exactly one encoding. A slot
// authenticates itself: the commitment tells a wrong key from a right one, and AES-GCM covers every
// byte before the nonce. This file knows nothing of the head, of files, or of where private keys
// live.
import { PqblkError } from '../errors.js';
import { ascii, concat, equalConstantTime, isZero, viewOf } from './bytes.js';
import {
  Aead,
  deriveSlotKeys,
  GCM_NONCE_BYTES,
  GCM_TAG_BYTES,
  gcmOpen,
  gcmSeal,
  Kdf,
  KEY_BYTES,
} from './kdf.js';
import { checkEncapsulationKey, findKem, type KemId } from './ml-kem.js';
import { type Identity, type KemProvider, ProviderKind, type ProviderKindId } from './provider.js';
import { randomBytes, type Secret } from './secret.js';

export const SLOT_BYTES = 4096;
export const SLOT_ID_BYTES = 16;
export const LABEL_BYTES_MAX = 128;
export const TOKEN_REFERENCE_BYTES_MAX = 320;
const SLOT_MAGIC = ascii('PQSL');
const SLOT_VERSION = 1;

/**
 * active: opens, and rotations keep it; decrypt-only: opens until the next rotation of the master
 * key revokes it; revoked: wiped, opens nothing.
 */
export const SlotState = { active: 1, decryptOnly: 2, revoked: 3 } as const;
export type SlotStateId = (typeof SlotState)[keyof typeof SlotState];

export const SlotRole = { primary: 1, recovery: 2, escrow: 3 } as const;
export type SlotRoleId = (typeof SlotRole)[keyof typeof SlotRole];

/** Byte offsets within a slot. The variable fields have room for every KEM that has a number. */
const OFFSET = {
  magic: 0,
  version: 4, // u16
  state: 6, // u8
  role: 7, // u8
  provider: 8, // u8, then 1 byte zero
  kem: 10, // u16
  kdf: 12, // u16
  aead: 14, // u16
  id: 16, // 16 bytes
  created: 32, // u64, seconds since 1970
  notAfter: 40, // u64, seconds since 1970; 0 = none
  labelLength: 48, // u16
  tokenReferenceLength: 50, // u16
  encapsulationKeyLength: 52, // u16
  ciphertextLength: 54, // u16, then 8 bytes zero
  label: 64, // 128 bytes, UTF-8
  tokenReference: 192, // 320 bytes, UTF-8
  encapsulationKey: 512, // 1600 bytes
  ciphertext: 2112, // 1600 bytes, then 292 bytes zero
  commitment: 4004, // 32 bytes
  nonce: 4036, // 12 bytes; everything before it is the AAD
  wrappedVmk: 4048, // 32 bytes
  tag: 4080, // 16 bytes
} as const;
const KEY_FIELD_BYTES = 1600;

export interface Slot {
  readonly state: SlotStateId;
  readonly role: SlotRoleId;
  readonly provider: ProviderKindId;
  readonly kem: KemId;
  readonly kdf: number;
  readonly aead: number;
  readonly id: Uint8Array;
  /** Seconds since 1970. */
  readonly created: number;
  /** Seconds since 1970; 0 = none. Advice to people and policies: no key can enforce it. */
  readonly notAfter: number;
  readonly label: string;
  readonly tokenReference: string;
  readonly encapsulationKey: Uint8Array;
  /** Empty in a revoked slot, as are the fields below zero there. */
  readonly ciphertext: Uint8Array;
  readonly commitment: Uint8Array;
  readonly nonce: Uint8Array;
  readonly wrappedVmk: Uint8Array;
  readonly tag: Uint8Array;
}

/** For whom a slot is made. */
export interface Recipient {
  /** Encapsulates; any software provider can do it for a key that lives on a token. */
  readonly provider: KemProvider;
  readonly kem: KemId;
  readonly encapsulationKey: Uint8Array;
  readonly label: string;
  readonly role?: SlotRoleId | undefined;
  /** Where the private key lives; the software store unless said otherwise. */
  readonly home?: ProviderKindId | undefined;
  readonly tokenReference?: string | undefined;
  /** Seconds since 1970; 0: none. Left out: that of the slot whose place it takes, if there is one. */
  readonly notAfter?: number | undefined;
}

// Characters that could rewrite a terminal line or reverse its reading order.
const UNPRINTABLE = /[\p{Cc}\p{Zl}\p{Zp}\u202a-\u202e\u2066-\u2069]/u;

/** Bytes of a label or token reference; kind `invalid_argument` when too long or unprintable. */
export function encodeText(what: string, text: string, bytesMax: number): Uint8Array {
  const bytes = new TextEncoder().encode(text);
  if (bytes.length > bytesMax) {
    throw new PqblkError('invalid_argument', `${what} is longer than ${bytesMax} bytes`);
  }
  if (UNPRINTABLE.test(text) || new TextDecoder().decode(bytes) !== text) {
    throw new PqblkError('invalid_argument', `${what} holds unprintable characters`);
  }
  return bytes;
}

/** The 4096 bytes of a slot. Kind `invalid_argument` for fields that do not fit their place. */
export function encodeSlot(slot: Slot): Uint8Array {
  const bytes = new Uint8Array(SLOT_BYTES);
  const view = viewOf(bytes);
  const label = encodeText('label', slot.label, LABEL_BYTES_MAX);
  const reference = encodeText('token reference', slot.tokenReference, TOKEN_REFERENCE_BYTES_MAX);
  bytes.set(SLOT_MAGIC, OFFSET.magic);
  view.setUint16(OFFSET.version, SLOT_VERSION, true);
  view.setUint8(OFFSET.state, slot.state);
  view.setUint8(OFFSET.role, slot.role);
  view.setUint8(OFFSET.provider, slot.provider);
  view.setUint16(OFFSET.kem, slot.kem, true);
  view.setUint16(OFFSET.kdf, slot.kdf, true);
  view.setUint16(OFFSET.aead, slot.aead, true);
  bytes.set(slot.id, OFFSET.id);
  view.setBigUint64(OFFSET.created, BigInt(slot.created), true);
  view.setBigUint64(OFFSET.notAfter, BigInt(slot.notAfter), true);
  view.setUint16(OFFSET.labelLength, label.length, true);
  view.setUint16(OFFSET.tokenReferenceLength, reference.length, true);
  view.setUint16(OFFSET.encapsulationKeyLength, slot.encapsulationKey.length, true);
  view.setUint16(OFFSET.ciphertextLength, slot.ciphertext.length, true);
  bytes.set(label, OFFSET.label);
  bytes.set(reference, OFFSET.tokenReference);
  bytes.set(slot.encapsulationKey, OFFSET.encapsulationKey);
  bytes.set(slot.ciphertext, OFFSET.ciphertext);
  bytes.set(slot.commitment, OFFSET.commitment);
  bytes.set(slot.nonce, OFFSET.nonce);
  bytes.set(slot.wrappedVmk, OFFSET.wrappedVmk);
  bytes.set(slot.tag, OFFSET.tag);
  return bytes;
}

/**
 * Reads a slot; undefined when it is empty (all zero). Checks every field and every unused byte;
 * kind `key_area_damaged` names the slot, the field, what was expected and what was found.
 */
export function parseSlot(bytes: Uint8Array, index: number): Slot | undefined {
  if (bytes.length !== SLOT_BYTES) {
    throw new PqblkError('invalid_argument', `a slot has ${SLOT_BYTES} bytes`);
  }
  if (isZero(bytes)) return undefined;
  const read = new SlotReader(bytes, index);
  read.require(equalConstantTime(read.raw(OFFSET.magic, 4), SLOT_MAGIC), 'magic', 'PQSL');
  const version = read.u16(OFFSET.version);
  read.require(version === SLOT_VERSION, 'version', `${SLOT_VERSION}, found ${version}`);
  const state = read.choice<SlotStateId>('state', OFFSET.state, Object.values(SlotState));
  const kem = findKem(read.u16(OFFSET.kem));
  if (!kem) return read.fail('kem', `a known KEM, found ${read.u16(OFFSET.kem)}`);
  const ciphertextBytes = state === SlotState.revoked ? 0 : kem.ciphertextBytes;
  const slot: Slot = {
    state,
    role: read.choice<SlotRoleId>('role', OFFSET.role, Object.values(SlotRole)),
    provider: read.choice<ProviderKindId>('provider', OFFSET.provider, Object.values(ProviderKind)),
    kem: kem.id,
    kdf: read.exactly('kdf', OFFSET.kdf, Kdf.hkdfSha3_256),
    aead: read.exactly('aead', OFFSET.aead, Aead.aes256Gcm),
    id: read.copy(OFFSET.id, SLOT_ID_BYTES),
    created: read.time('created', OFFSET.created),
    notAfter: read.time('not-after', OFFSET.notAfter),
    label: read.text('label', OFFSET.labelLength, OFFSET.label, LABEL_BYTES_MAX),
    tokenReference: read.text(
      'token reference',
      OFFSET.tokenReferenceLength,
      OFFSET.tokenReference,
      TOKEN_REFERENCE_BYTES_MAX,
    ),
    encapsulationKey: read.field(
      'encapsulation key',
      OFFSET.encapsulationKeyLength,
      OFFSET.encapsulationKey,
      kem.encapsulationKeyBytes,
    ),
    ciphertext: read.field(
      'ciphertext',
      OFFSET.ciphertextLength,
      OFFSET.ciphertext,
      ciphertextBytes,
    ),
    commitment: read.copy(OFFSET.commitment, 32),
    nonce: read.copy(OFFSET.nonce, GCM_NONCE_BYTES),
    wrappedVmk: read.copy(OFFSET.wrappedVmk, KEY_BYTES),
    tag: read.copy(OFFSET.tag, GCM_TAG_BYTES),
  };
  read.zero('reserved byte', OFFSET.provider + 1, OFFSET.kem);
  read.zero('reserved bytes', OFFSET.ciphertextLength + 2, OFFSET.label);
  read.zero('reserved bytes', OFFSET.ciphertext + KEY_FIELD_BYTES, OFFSET.commitment);
  if (state === SlotState.revoked) read.zero('revoked key', OFFSET.commitment, SLOT_BYTES);
  return slot;
}

/** Field by field reading with one way to complain. */
class SlotReader {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  readonly #index: number;

  constructor(bytes: Uint8Array, index: number) {
    this.#bytes = bytes;
    this.#view = viewOf(bytes);
    this.#index = index;
  }

  fail(field: string, expected: string): never {
    throw new PqblkError(
      'key_area_damaged',
      `slot ${this.#index}: field "${field}": expected ${expected}`,
      { operation: 'read key slot' },
    );
  }

  require(holds: boolean, field: string, expected: string): void {
    if (!holds) this.fail(field, expected);
  }

  u16(offset: number): number {
    return this.#view.getUint16(offset, true);
  }

  raw(offset: number, length: number): Uint8Array {
    return this.#bytes.subarray(offset, offset + length);
  }

  copy(offset: number, length: number): Uint8Array {
    return this.#bytes.slice(offset, offset + length);
  }

  choice<T extends number>(field: string, offset: number, allowed: readonly T[]): T {
    const value = this.#view.getUint8(offset);
    const found = allowed.find((candidate) => candidate === value);
    return found ?? this.fail(field, `one of ${allowed.join(', ')}, found ${value}`);
  }

  exactly(field: string, offset: number, expected: number): number {
    const value = this.u16(offset);
    this.require(value === expected, field, `${expected}, found ${value}`);
    return value;
  }

  time(field: string, offset: number): number {
    const value = this.#view.getBigUint64(offset, true);
    this.require(value <= TIME_MAX, field, `at most ${TIME_MAX}, found ${value}`);
    return Number(value);
  }

  zero(field: string, from: number, to: number): void {
    this.require(isZero(this.#bytes.subarray(from, to)), field, 'zero');
  }

  text(field: string, lengthOffset: number, offset: number, capacity: number): string {
    const length = this.u16(lengthOffset);
    this.require(length <= capacity, field, `at most ${capacity} bytes, found ${length}`);
    this.zero(field, offset + length, offset + capacity);
    const text = decodeUtf8(this.raw(offset, length));
    if (text === undefined || UNPRINTABLE.test(text)) return this.fail(field, 'printable UTF-8');
    return text;
  }

  field(field: string, lengthOffset: number, offset: number, expected: number): Uint8Array {
    const length = this.u16(lengthOffset);
    this.require(length === expected, field, `${expected} bytes, found ${length}`);
    this.zero(field, offset + length, offset + KEY_FIELD_BYTES);
    return this.copy(offset, length);
  }
}

// The last second of the year 9999: what a Date can print and a number can hold.
const TIME_MAX = 253_402_300_799n;

function decodeUtf8(bytes: Uint8Array): string | undefined {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return undefined;
  }
}

const isTime = (value: number) =>
  Number.isInteger(value) && value >= 0 && value <= Number(TIME_MAX);

/** A new active slot, with everything but what sealing makes. */
export function draftSlot(recipient: Recipient, created: number): Slot {
  return {
    state: SlotState.active,
    role: recipient.role ?? SlotRole.primary,
    provider: recipient.home ?? ProviderKind.software,
    kem: recipient.kem,
    kdf: Kdf.hkdfSha3_256,
    aead: Aead.aes256Gcm,
    id: randomBytes(SLOT_ID_BYTES),
    created,
    notAfter: recipient.notAfter ?? 0,
    label: recipient.label,
    tokenReference: recipient.tokenReference ?? '',
    encapsulationKey: Uint8Array.from(recipient.encapsulationKey),
    ...unsealed(),
  };
}

const unsealed = () => ({
  ciphertext: new Uint8Array(0),
  commitment: new Uint8Array(32),
  nonce: new Uint8Array(GCM_NONCE_BYTES),
  wrappedVmk: new Uint8Array(KEY_BYTES),
  tag: new Uint8Array(GCM_TAG_BYTES),
});

/** A slot nobody can open any more. Whom it was for stays readable. */
export function revokedSlot(slot: Slot): Slot {
  return { ...slot, state: SlotState.revoked, ...unsealed() };
}

/**
 * Lets the owner of a slot's encapsulation key reach `vmk`: a draft, or a slot to be sealed anew, which
 * keeps its id. Kinds `bad_key` (FIPS 203 checks), `invalid_argument`, `unsupported`.
 */
export async function sealSlot(
  vmk: Secret,
  volumeUuid: Uint8Array,
  draft: Slot,
  provider: KemProvider,
): Promise<Slot> {
  const { kem, encapsulationKey } = draft;
  if (!isTime(draft.created) || !isTime(draft.notAfter)) {
    throw new PqblkError('invalid_argument', 'slot times are whole seconds since 1970');
  }
  checkEncapsulationKey(kem, encapsulationKey); // whatever the provider does or leaves out
  const { ciphertext, sharedSecret } = await provider.encapsulate(kem, encapsulationKey);
  using shared = sharedSecret;
  const open = { ...draft, ...unsealed(), ciphertext, nonce: randomBytes(GCM_NONCE_BYTES) };
  const keys = deriveSlotKeys(shared, { ...open, volumeUuid, slotId: open.id });
  using kek = keys.kek;
  using commitmentSecret = keys.commitment;
  const commitment = commitmentSecret.use((bytes) => Uint8Array.from(bytes));
  const aad = aadOf(encodeSlot({ ...open, commitment }));
  const sealed = vmk.use((bytes) => gcmSeal(kek, open.nonce, aad, bytes));
  return {
    ...open,
    commitment,
    wrappedVmk: sealed.slice(0, KEY_BYTES),
    tag: sealed.slice(KEY_BYTES),
  };
}

/**
 * The VMK in a slot, for the caller to wipe; undefined when the key is wrong or the slot was
 * tampered with, which ML-KEM's implicit rejection makes the same thing. Kind `slot_revoked` for a
 * wiped slot.
 */
export async function openSlot(
  slot: Slot,
  volumeUuid: Uint8Array,
  identity: Identity,
): Promise<Secret | undefined> {
  if (slot.state === SlotState.revoked) {
    throw new PqblkError('slot_revoked', `the slot "${slot.label}" of this key was revoked`, {
      operation: 'open key slot',
    });
  }
  if (slot.kem !== identity.privateKey.kem) return undefined;
  const { provider, privateKey } = identity;
  using shared = await provider.decapsulate(privateKey, slot.ciphertext);
  const keys = deriveSlotKeys(shared, { ...slot, volumeUuid, slotId: slot.id });
  using kek = keys.kek;
  using commitment = keys.commitment;
  if (!commitment.use((bytes) => equalConstantTime(bytes, slot.commitment))) return undefined;
  const sealed = concat(slot.wrappedVmk, slot.tag);
  return gcmOpen(kek, slot.nonce, aadOf(encodeSlot(slot)), sealed);
}

/** What AES-GCM covers besides the VMK: every byte of the slot before the nonce. */
function aadOf(encoded: Uint8Array): Uint8Array {
  return encoded.subarray(0, OFFSET.nonce);
}
