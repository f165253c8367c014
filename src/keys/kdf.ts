// Room keys/: HKDF-SHA3-256, HMAC-SHA3-256 and AES-256-GCM as the key area uses them, and every
// label.
//
// The labels below are part of the on-disk format (docs/keys.md): changing one makes every
// existing disk unreadable. Session and sector keys are derived in the engine; their labels live
// there.
import { gcm } from '@noble/ciphers/aes.js';
import { expand, extract } from '@noble/hashes/hkdf.js';
import { hmac } from '@noble/hashes/hmac.js';
import { sha3_256 } from '@noble/hashes/sha3.js';
import { ascii, concat, lengthPrefixed, u16 } from './bytes.js';
import { Secret } from './secret.js';

/** Key-derivation and wrapping algorithms, as numbered in slots and in the head. */
export const Kdf = { hkdfSha3_256: 1 } as const;
export const Aead = { aes256Gcm: 1 } as const;

export const KEY_BYTES = 32;
export const GCM_NONCE_BYTES = 12;
export const GCM_TAG_BYTES = 16;
export const MAC_BYTES = 32;

const LABEL = {
  slotSalt: 'pqblk/v1',
  kek: 'pqblk/v1 kek',
  commitment: 'pqblk/v1 commit',
  masterSalt: 'pqblk/v1 vmk',
  wrap: 'pqblk/v1 wrap',
  keyAreaMac: 'pqblk/v1 key area mac',
  vmkCheck: 'pqblk/v1 vmk check',
} as const;

export { sha3_256 };

export function hkdfExtract(salt: Uint8Array, keyMaterial: Uint8Array): Secret {
  return new Secret(extract(sha3_256, keyMaterial, salt));
}

export function hkdfExpand(prk: Secret, info: Uint8Array, length = KEY_BYTES): Secret {
  return new Secret(prk.use((bytes) => expand(sha3_256, bytes, info, length)));
}

export function hmacSha3(key: Secret, ...message: Uint8Array[]): Uint8Array {
  return key.use((bytes) => {
    const mac = hmac.create(sha3_256, bytes);
    for (const part of message) mac.update(part);
    return mac.digest();
  });
}

/** AES-256-GCM: ciphertext followed by the 16-byte tag. */
export function gcmSeal(
  key: Secret,
  nonce: Uint8Array,
  aad: Uint8Array,
  plaintext: Uint8Array,
): Uint8Array {
  return key.use((bytes) => gcm(bytes, nonce, aad).encrypt(plaintext));
}

/** The plaintext, or undefined when the tag does not hold. The caller says what that means. */
export function gcmOpen(
  key: Secret,
  nonce: Uint8Array,
  aad: Uint8Array,
  sealed: Uint8Array,
): Secret | undefined {
  try {
    return new Secret(key.use((bytes) => gcm(bytes, nonce, aad).decrypt(sealed)));
  } catch {
    return undefined; // noble throws for a bad tag only: sizes are checked by the codecs
  }
}

/** What binds a slot's KEK and commitment to its place; all public. */
export interface SlotContext {
  readonly kem: number;
  readonly kdf: number;
  readonly aead: number;
  readonly volumeUuid: Uint8Array;
  readonly slotId: Uint8Array;
  readonly encapsulationKey: Uint8Array;
  readonly ciphertext: Uint8Array;
}

/** KEK and commitment of a slot (docs/keys.md). The caller wipes both. */
export function deriveSlotKeys(
  sharedSecret: Secret,
  slot: SlotContext,
): { kek: Secret; commitment: Secret } {
  const context = concat(
    lengthPrefixed(slot.volumeUuid),
    lengthPrefixed(slot.slotId),
    lengthPrefixed(sha3_256(slot.encapsulationKey)),
    lengthPrefixed(sha3_256(slot.ciphertext)),
  );
  const salt = sha3_256(
    concat(ascii(LABEL.slotSalt), u16(slot.kem), u16(slot.kdf), u16(slot.aead)),
  );
  using prk = sharedSecret.use((bytes) => hkdfExtract(salt, bytes));
  return {
    kek: hkdfExpand(prk, concat(ascii(LABEL.kek), context)),
    commitment: hkdfExpand(prk, concat(ascii(LABEL.commitment), context)),
  };
}

/** Everything that hangs on the volume master key. The VMK itself is only ever an input here. */
export interface MasterKeys {
  readonly wrap: Secret;
  readonly mac: Secret;
  /** One-way fingerprint of the VMK, 32 bytes; public enough for a pin file. */
  readonly vmkCheck: Uint8Array;
  [Symbol.dispose](): void;
}

export function deriveMasterKeys(vmk: Secret, volumeUuid: Uint8Array): MasterKeys {
  using prk = vmk.use((bytes) => hkdfExtract(sha3_256(ascii(LABEL.masterSalt)), bytes));
  const derive = (label: string) =>
    hkdfExpand(prk, concat(ascii(label), lengthPrefixed(volumeUuid)));
  const [wrap, mac] = [derive(LABEL.wrap), derive(LABEL.keyAreaMac)];
  using check = derive(LABEL.vmkCheck);
  return {
    wrap,
    mac,
    vmkCheck: check.use((bytes) => Uint8Array.from(bytes)),
    [Symbol.dispose]() {
      wrap.wipe();
      mac.wipe();
    },
  };
}
