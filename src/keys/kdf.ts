// Room keys/: HKDF-SHA3-256, HMAC-SHA3-256 and AES-256-GCM as the key area uses them, and every
// label.
//
// The labels below are part of the on-disk format (docs/keys.md): changing one makes every
// existing disk unreadable. Session and sector keys are derived in the engine; their labels live
// there.
import { createCipheriv, createDecipheriv } from 'node:crypto';
import { ascii, concat, lengthPrefixed, u16 } from './bytes.js';
import { hmacSha3Of, sha3_256 } from './hash.js';
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

/** RFC 5869. */
export function hkdfExtract(salt: Uint8Array, keyMaterial: Uint8Array): Secret {
  return new Secret(hmacSha3Of(salt, keyMaterial));
}

export function hkdfExpand(prk: Secret, info: Uint8Array, length = KEY_BYTES): Secret {
  const out = Secret.zeros(length);
  let previous: Uint8Array = new Uint8Array(0);
  for (let at = 0, block = 1; at < length; at += MAC_BYTES, block += 1) {
    const next = hmacSha3(prk, previous, info, Uint8Array.of(block));
    previous.fill(0);
    out.use((bytes) => bytes.set(next.subarray(0, length - at), at));
    previous = next;
  }
  previous.fill(0);
  return out;
}

export function hmacSha3(key: Secret, ...message: readonly Uint8Array[]): Uint8Array {
  return key.use((bytes) => hmacSha3Of(bytes, ...message));
}

/** AES-256-GCM: ciphertext followed by the 16-byte tag. */
export function gcmSeal(
  key: Secret,
  nonce: Uint8Array,
  aad: Uint8Array,
  plaintext: Uint8Array,
): Uint8Array {
  const cipher = key.use((bytes) => createCipheriv('aes-256-gcm', bytes, nonce)).setAAD(aad);
  const ciphertext = cipher.update(plaintext);
  cipher.final();
  return concat(ciphertext, cipher.getAuthTag());
}

/** The plaintext, or undefined when the tag does not hold. The caller says what that means. */
export function gcmOpen(
  key: Secret,
  nonce: Uint8Array,
  aad: Uint8Array,
  sealed: Uint8Array,
): Secret | undefined {
  if (sealed.length < GCM_TAG_BYTES) return undefined;
  const at = sealed.length - GCM_TAG_BYTES;
  const authTagLength = GCM_TAG_BYTES;
  const decipher = key
    .use((bytes) => createDecipheriv('aes-256-gcm', bytes, nonce, { authTagLength }))
    .setAAD(aad)
    .setAuthTag(sealed.subarray(at));
  const plain = new Secret(decipher.update(sealed.subarray(0, at)));
  try {
    decipher.final();
    return plain;
  } catch {
    plain.wipe(); // the tag does not hold: nothing of it was ever there
    return undefined;
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
