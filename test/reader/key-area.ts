// The second reader: docs/format.md section 5 (two copies) and docs/keys.md (the blob in them).
//
// The blob's integers are little-endian, unlike everything else on the disk. The KEMs are noble's.
import { gcm } from '@noble/ciphers/aes.js';
import { expand, extract } from '@noble/hashes/hkdf.js';
import { ml_kem768_x25519 } from '@noble/post-quantum/hybrid.js';
import { ml_kem768, ml_kem1024 } from '@noble/post-quantum/ml-kem.js';
import { ascii, ensure, Fields, fail, isZero, join, same } from './bytes.js';
import { hmacSha3, sha3_256 } from './crypto.js';

export const BLOB_BYTES = 65_536;
const PAGE = 4096;
const SLOT_ACTIVE = 1;
const SLOT_DECRYPT_ONLY = 2;
const SLOT_REVOKED = 3;

export interface KeyArea {
  /** The generations that the whole copies say they have, in the order in which they are tried. */
  readonly generations: readonly bigint[];
  /** The first of them, which counts unless it does not open. */
  readonly blob: Uint8Array;
  readonly others: readonly Uint8Array[];
  /** Which of the copies A and B are valid. */
  readonly valid: readonly boolean[];
}

export interface VolumeKeys {
  readonly integrityKey: Uint8Array;
  readonly dataKeys: ReadonlyMap<number, Uint8Array>;
}

/** Whole copies in the order in which they are tried: the higher generation of the blob first, A before B. */
export function chooseKeyArea(copies: readonly Uint8Array[]): KeyArea {
  const parsed = copies.map(parseCopy);
  const valid = parsed.map((copy) => copy !== undefined);
  const whole = parsed.filter((copy) => copy !== undefined);
  const [a, b] = whole;
  if (
    a &&
    b &&
    (b.generation === a.generation ? b.number > a.number : b.generation > a.generation)
  ) {
    whole.reverse();
  }
  const [first, ...others] = whole;
  if (!first) return fail('key-area', 'no copy of the key area is valid');
  const generations = whole.map(({ generation }) => generation);
  return { generations, blob: first.blob, others: others.map(({ blob }) => blob), valid };
}

/** Opens the first copy whose MAC holds for this key; see openBlob. */
export function openKeyArea(area: KeyArea, uuid: Uint8Array, secretKey: Uint8Array): VolumeKeys {
  for (const blob of [area.blob, ...area.others].slice(0, -1)) {
    try {
      return openBlob(blob, uuid, secretKey);
    } catch {} // the last one says what is wrong
  }
  return openBlob(area.others.at(-1) ?? area.blob, uuid, secretKey);
}

interface Copy {
  readonly number: bigint;
  readonly generation: bigint;
  readonly blob: Uint8Array;
}

function parseCopy(bytes: Uint8Array): Copy | undefined {
  const head = new Fields(bytes.subarray(0, 64), 'key-area');
  const blob = bytes.slice(PAGE, PAGE + BLOB_BYTES);
  if (head.text(0, 8) !== 'PQBLKKEY' || head.u32(16) !== BLOB_BYTES) return undefined;
  if (!same(sha3_256(join(bytes.subarray(0, 32), blob)), head.slice(32, 32))) return undefined;
  head.zero(20, 12, 'reserved bytes of the key area head');
  const number = bigEndian(head.slice(8, 8));
  ensure(number >= 1n, 'key-area', 'number 0');
  return { number, generation: bigEndian(blob.slice(16, 24).reverse()), blob };
}

const bigEndian = (bytes: Uint8Array) =>
  bytes.reduce((value, byte) => value * 256n + BigInt(byte), 0n);

// ---- the blob ---------------------------------------------------------------------------------------

const le16 = (bytes: Uint8Array, at: number) => (bytes[at] ?? 0) | ((bytes[at + 1] ?? 0) << 8);
const le32 = (bytes: Uint8Array, at: number) => le16(bytes, at) + le16(bytes, at + 2) * 65_536;
const lengthPrefixed = (bytes: Uint8Array) =>
  join(Uint8Array.of(bytes.length & 255, bytes.length >> 8, 0, 0), bytes);

/** By their private keys: ML-KEM's hold the public half, X-Wing's are the seed of it. */
const KEMS = [
  { id: 1, secretBytes: 2400, kem: ml_kem768, ciphertextBytes: 1088 },
  { id: 2, secretBytes: 3168, kem: ml_kem1024, ciphertextBytes: 1568 },
  { id: 3, secretBytes: 32, kem: ml_kem768_x25519, ciphertextBytes: 1120 },
];

function publicHalf(secretKey: Uint8Array): Uint8Array {
  if (secretKey.length === 32) return ml_kem768_x25519.keygen(secretKey).publicKey;
  const rank = (secretKey.length - 96) / 768;
  return secretKey.subarray(384 * rank, 768 * rank + 32);
}

/**
 * Opens a blob with an ML-KEM decapsulation key in the expanded form of FIPS 203 (dk_PKE ‖ ek ‖ H(ek)
 * ‖ z), or an X-Wing seed: faults `wrong-key` (no slot, or commitment or tag do not hold) and `key-area`.
 */
export function openBlob(blob: Uint8Array, uuid: Uint8Array, secretKey: Uint8Array): VolumeKeys {
  ensure(String.fromCharCode(...blob.subarray(0, 8)) === 'PQBLKKEY', 'key-area', 'no blob magic');
  ensure(le16(blob, 10) === 1 && le16(blob, 8) >= 1, 'key-area', 'unknown blob version');
  const slotCount = le16(blob, 12);
  ensure(slotCount <= 15, 'key-area', `${slotCount} slots`);
  ensure(same(blob.subarray(24, 40), uuid), 'key-area', 'the key area is of another volume');
  ensure(le16(blob, 48) === 1 && le16(blob, 50) === 1, 'key-area', 'unknown KDF or AEAD');
  const used = PAGE * (1 + slotCount);
  ensure(isZero(blob.subarray(used)), 'key-area', 'bytes after the slots are not zero');
  const tableBytes = le16(blob, 14);
  ensure(tableBytes >= 80 && tableBytes <= 2600, 'key-area', `a key table of ${tableBytes} bytes`);
  const unused = [
    [52, 56],
    [96, 128],
    [156, 160],
    [160 + tableBytes, 4064],
  ] as const;
  for (const [from, to] of le16(blob, 8) === 1 ? unused : []) requireZero(blob, from, to, 'head');
  const vmk = openOwnSlot(blob, slotCount, uuid, secretKey);
  const prk = extract(sha3_256, vmk, sha3_256(ascii('pqblk/v1 vmk')));
  const derive = (label: string) => expand(sha3_256, prk, join(label, lengthPrefixed(uuid)), 32);
  const covered = blob.slice(0, used);
  covered.fill(0, 4064, 4096);
  const mac = hmacSha3(derive('pqblk/v1 key area mac'), covered);
  ensure(same(mac, blob.subarray(4064, 4096)), 'key-area', 'the MAC of the blob does not hold');
  const sealed = join(blob.subarray(160, 160 + tableBytes), blob.subarray(140, 156));
  const wrap = derive('pqblk/v1 wrap');
  const plain = gcmOpen(wrap, blob.subarray(128, 140), blob.subarray(0, 128), sealed);
  if (!plain) return fail('key-area', 'the key table does not open');
  return parseTable(plain, [le32(blob, 40), le32(blob, 44)]);
}

/** The volume master key and the shared secret that leads to it, for tests of what is left of them. */
export function openVmk(
  blob: Uint8Array,
  uuid: Uint8Array,
  secretKey: Uint8Array,
): { vmk: Uint8Array; sharedSecret: Uint8Array } {
  const vmk = openOwnSlot(blob, le16(blob, 12), uuid, secretKey);
  const sharedSecret = ml_kem768.decapsulate(blob.subarray(PAGE + 2112, PAGE + 3200), secretKey);
  return { vmk, sharedSecret };
}

function gcmOpen(key: Uint8Array, nonce: Uint8Array, aad: Uint8Array, sealed: Uint8Array) {
  try {
    return gcm(key, nonce, aad).decrypt(sealed);
  } catch {
    return undefined;
  }
}

function openOwnSlot(
  blob: Uint8Array,
  slotCount: number,
  uuid: Uint8Array,
  secretKey: Uint8Array,
): Uint8Array {
  const known = KEMS.find(({ secretBytes }) => secretKey.length === secretBytes);
  if (!known) return fail('wrong-key', `a private key of ${secretKey.length} bytes`);
  const ek = publicHalf(secretKey);
  let own = 0;
  for (let index = 0; index < slotCount; index += 1) {
    const slot = blob.subarray(PAGE * (index + 1), PAGE * (index + 2));
    if (isZero(slot)) continue;
    ensure(String.fromCharCode(...slot.subarray(0, 4)) === 'PQSL', 'key-area', 'slot magic');
    ensure(le16(slot, 4) === 1, 'key-area', `slot version ${le16(slot, 4)}`);
    const state = slot[6] ?? 0;
    ensure(
      [SLOT_ACTIVE, SLOT_DECRYPT_ONLY, SLOT_REVOKED].includes(state),
      'key-area',
      'slot state',
    );
    requireUnusedZero(slot);
    if (state === SLOT_REVOKED || le16(slot, 10) !== known.id) continue;
    if (le16(slot, 52) !== ek.length || !same(slot.subarray(512, 512 + ek.length), ek)) continue;
    ensure(le16(slot, 12) === 1 && le16(slot, 14) === 1, 'key-area', 'slot KDF or AEAD');
    ensure(le16(slot, 54) === known.ciphertextBytes, 'key-area', 'slot ciphertext length');
    own += 1;
    const ciphertext = slot.slice(2112, 2112 + known.ciphertextBytes);
    const shared = known.kem.decapsulate(ciphertext, secretKey);
    const vmk = unwrap(slot, uuid, ek, ciphertext, shared);
    if (vmk) return vmk;
  }
  return fail('wrong-key', own > 0 ? 'wrong key or tampered slot' : 'no slot for this key');
}

/** The VMK of a slot, or undefined when the commitment or the tag does not hold. */
function unwrap(
  slot: Uint8Array,
  uuid: Uint8Array,
  ek: Uint8Array,
  ciphertext: Uint8Array,
  shared: Uint8Array,
): Uint8Array | undefined {
  const context = join(
    lengthPrefixed(uuid),
    lengthPrefixed(slot.subarray(16, 32)),
    lengthPrefixed(sha3_256(ek)),
    lengthPrefixed(sha3_256(ciphertext)),
  );
  const salt = sha3_256(join('pqblk/v1', slot.subarray(10, 16))); // kem, kdf, aead: 2 bytes each
  const prk = extract(sha3_256, shared, salt);
  const commitment = expand(sha3_256, prk, join('pqblk/v1 commit', context), 32);
  if (!same(commitment, slot.subarray(4004, 4036))) return undefined;
  const kek = expand(sha3_256, prk, join('pqblk/v1 kek', context), 32);
  return gcmOpen(kek, slot.subarray(4036, 4048), slot.subarray(0, 4036), slot.slice(4048, 4096));
}

/** `epochs` of the head: the current one, and the next one or 0. */
function parseTable(plain: Uint8Array, epochs: readonly [number, number]): VolumeKeys {
  const count = le32(plain, 32);
  ensure(plain.length === 40 * (count + 1), 'key-area', `a key table of ${count} keys`);
  requireZero(plain, 36, 40, 'key table');
  const dataKeys = new Map<number, Uint8Array>();
  let last = 0;
  for (let at = 40; at < plain.length; at += 40) {
    const epoch = le32(plain, at);
    ensure(epoch > last, 'key-area', 'epochs of the key table do not ascend');
    requireZero(plain, at + 4, at + 8, 'key table');
    dataKeys.set(epoch, plain.slice(at + 8, at + 40));
    last = epoch;
  }
  const [current, next] = epochs;
  ensure(next === 0 || next > current, 'key-area', `next epoch ${next} after ${current}`);
  const there = dataKeys.has(current) && (next === 0 || dataKeys.has(next));
  ensure(there, 'key-area', `no data key of epoch ${current} or ${next}`);
  return { integrityKey: plain.slice(0, 32), dataKeys };
}

function requireZero(bytes: Uint8Array, from: number, to: number, what: string): void {
  ensure(isZero(bytes.subarray(from, to)), 'key-area', `unused bytes ${from} to ${to} of ${what}`);
}

/** The bytes of a slot that no field of it uses. */
function requireUnusedZero(slot: Uint8Array): void {
  const [label, token, ek, ciphertext] = [48, 50, 52, 54].map((at) => le16(slot, at));
  ensure((label ?? 0) <= 128 && (token ?? 0) <= 320, 'key-area', 'text lengths of a slot');
  const unused = [
    [9, 10],
    [56, 64],
    [64 + (label ?? 0), 192],
    [192 + (token ?? 0), 512],
    [512 + (ek ?? 0), 2112],
    [2112 + (ciphertext ?? 0), 4004],
  ] as const;
  for (const [from, to] of unused) requireZero(slot, from, to, 'slot');
}
