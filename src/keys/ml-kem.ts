// Room keys/: what is known of each KEM without running it: numbers, names, sizes, and the input
// checks of FIPS 203. No provider is called here, so that every provider's keys meet the same
// checks.
import { PqblkError } from '../errors.js';
import { equalConstantTime } from './bytes.js';
import { sha3_256 } from './hash.js';

/** The number a slot stores. */
export const Kem = { mlKem768: 1, mlKem1024: 2, xWing: 3 } as const;
export type KemId = (typeof Kem)[keyof typeof Kem];

export const DEFAULT_KEM: KemId = Kem.mlKem768;

/** Sizes in bytes. `rank` is k of FIPS 203. */
export interface KemParameters {
  readonly id: KemId;
  readonly name: string;
  readonly rank: number;
  readonly encapsulationKeyBytes: number;
  readonly decapsulationKeyBytes: number;
  readonly ciphertextBytes: number;
}

export const SHARED_SECRET_BYTES = 32;
export const FINGERPRINT_BYTES = 32;

function mlKem(id: KemId, name: string, rank: number, ciphertextBytes: number): KemParameters {
  return {
    id,
    name,
    rank,
    encapsulationKeyBytes: 384 * rank + 32,
    decapsulationKeyBytes: 768 * rank + 96,
    ciphertextBytes,
  };
}

const PARAMETERS: readonly KemParameters[] = [
  mlKem(Kem.mlKem768, 'ML-KEM-768', 3, 1088),
  mlKem(Kem.mlKem1024, 'ML-KEM-1024', 4, 1568),
  {
    id: Kem.xWing,
    name: 'X-Wing',
    rank: 3,
    encapsulationKeyBytes: 1216,
    decapsulationKeyBytes: 32,
    ciphertextBytes: 1120,
  },
];

/** The parameters of a KEM number, or undefined when the number means nothing to this version. */
export function findKem(id: number): KemParameters | undefined {
  return PARAMETERS.find((kem) => kem.id === id);
}

export function kemParameters(id: KemId): KemParameters {
  const found = findKem(id);
  if (!found) throw new PqblkError('unsupported', `unknown KEM number ${id}`);
  return found;
}

/** "ML-KEM-768" (any case) → its parameters; kind `invalid_argument` with the names that exist. */
export function kemByName(name: string): KemParameters {
  const found = PARAMETERS.find((kem) => kem.name.toLowerCase() === name.toLowerCase());
  if (found) return found;
  const names = PARAMETERS.map((kem) => kem.name).join(', ');
  throw new PqblkError('invalid_argument', `unknown KEM ${JSON.stringify(name)}; known: ${names}`);
}

/** SHA3-256 of the encapsulation key: the name of a key everywhere in this product. */
export function fingerprintOf(encapsulationKey: Uint8Array): Uint8Array {
  return sha3_256(encapsulationKey);
}

const Q = 3329;

/** Every 12-bit coefficient below q: ByteEncode12(ByteDecode12(bytes)) = bytes of FIPS 203. */
function coefficientsReduced(bytes: Uint8Array): boolean {
  let reduced = true; // no early exit: the time must not tell where in a private key
  for (let at = 0; at < bytes.length; at += 3) {
    const middle = bytes[at + 1] ?? 0;
    const low = (bytes[at] ?? 0) | ((middle & 0x0f) << 8);
    const high = (middle >> 4) | ((bytes[at + 2] ?? 0) << 4);
    if (low >= Q || high >= Q) reduced = false;
  }
  return reduced;
}

function requireLength(what: string, kem: KemParameters, actual: number, expected: number): void {
  if (actual !== expected) {
    throw new PqblkError(
      'bad_key',
      `${kem.name} ${what} has ${actual} bytes, expected ${expected}`,
    );
  }
}

/**
 * FIPS 203 section 7.2, type and modulus check; of X-Wing the half that is ML-KEM's (X25519 takes any
 * 32 bytes). Kind `bad_key` when it fails.
 */
export function checkEncapsulationKey(id: KemId, key: Uint8Array): void {
  const kem = kemParameters(id);
  requireLength('encapsulation key', kem, key.length, kem.encapsulationKeyBytes);
  if (!coefficientsReduced(key.subarray(0, 384 * kem.rank))) {
    throw new PqblkError('bad_key', `${kem.name} encapsulation key fails the modulus check`);
  }
}

/**
 * FIPS 203 section 7.3, type and hash check of a decapsulation key, and the modulus check of both
 * vectors in it; of X-Wing its length, since any 32 bytes are a seed. Kind `bad_key` when it fails; the message says which check and nothing of the key.
 */
export function checkDecapsulationKey(id: KemId, key: Uint8Array): void {
  const kem = kemParameters(id);
  requireLength('decapsulation key', kem, key.length, kem.decapsulationKeyBytes);
  if (id === Kem.xWing) return;
  const hashAt = 768 * kem.rank + 32;
  const hash = sha3_256(encapsulationKeyOf(id, key));
  if (!equalConstantTime(hash, key.subarray(hashAt, hashAt + 32))) {
    throw new PqblkError('bad_key', `${kem.name} decapsulation key fails the hash check`);
  }
  if (!coefficientsReduced(key.subarray(0, 384 * kem.rank))) {
    throw new PqblkError('bad_key', `${kem.name} decapsulation key fails the modulus check`);
  }
  checkEncapsulationKey(id, encapsulationKeyOf(id, key));
}

/** FIPS 203 section 7.3, type check of a ciphertext. Kind `corrupt` when it fails. */
export function checkCiphertext(id: KemId, ciphertext: Uint8Array): void {
  const kem = kemParameters(id);
  if (ciphertext.length === kem.ciphertextBytes) return;
  throw new PqblkError(
    'corrupt',
    `${kem.name} ciphertext has ${ciphertext.length} bytes, expected ${kem.ciphertextBytes}`,
  );
}

/** The encapsulation key that an expanded ML-KEM decapsulation key carries (a view, not a copy). */
export function encapsulationKeyOf(
  id: Exclude<KemId, typeof Kem.xWing>,
  decapsulationKey: Uint8Array,
): Uint8Array {
  const { rank } = kemParameters(id);
  return decapsulationKey.subarray(384 * rank, 768 * rank + 32);
}
