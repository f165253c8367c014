// Room keys/: X-Wing, ML-KEM-768 and X25519 joined (draft-connolly-cfrg-xwing-kem, version 10).
//
// A private key is a seed of 32 bytes, and nothing longer is ever stored: SHAKE256 makes of it the
// seed of an ML-KEM-768 pair and an X25519 key. ML-KEM is liboqs but for making the pair from its
// seed, which this build of liboqs does not offer; X25519 is OpenSSL's. As the draft says, an X25519
// result of zero is used like any other: ML-KEM still protects, and the combiner binds both halves of
// the X25519 exchange.
import { createPrivateKey, createPublicKey, diffieHellman, type KeyObject } from 'node:crypto';
import { PqblkError } from '../errors.js';
import { ascii, concat, toHex } from './bytes.js';
import { sha3_256, shake256 } from './hash.js';
import type { OqsKem } from './liboqs-module.js';
import { encapsulationKeyOf, Kem, type KemId, kemParameters } from './ml-kem.js';
import type { Encapsulation } from './provider.js';
import { Secret, unmovedCopy } from './secret.js';

const LABEL = ascii('\\.//^\\');
const ML_KEM = kemParameters(Kem.mlKem768);
const X25519_BYTES = 32;
const SEED_BYTES = 32;
const EXPANDED_BYTES = 96;

/** RFC 8410: what stands before the 32 bytes of a key in DER. */
const PRIVATE_PREFIX = Uint8Array.from(Buffer.from('302e020100300506032b656e04220420', 'hex'));
const PUBLIC_PREFIX = Uint8Array.from(Buffer.from('302a300506032b656e032100', 'hex'));

interface ExpandedKey {
  /** Expanded decapsulation key of ML-KEM-768. */
  readonly mlKem: Secret;
  readonly mlKemPublic: Uint8Array;
  readonly x25519: KeyObject;
  readonly x25519Public: Uint8Array;
}

/** The draft's expandDecapsulationKey. The caller wipes `mlKem`. */
async function expand(seed: Secret): Promise<ExpandedKey> {
  const { ml_kem768 } = await import('@noble/post-quantum/ml-kem.js');
  using expanded = shake256(seed, EXPANDED_BYTES);
  return expanded.use((bytes) => {
    const { secretKey, publicKey } = ml_kem768.keygen(bytes.subarray(0, 64));
    const mlKem = new Secret(secretKey);
    const x25519 = privateKeyOf(bytes.subarray(64));
    return { mlKem, mlKemPublic: publicKey, x25519, x25519Public: publicBytesOf(x25519) };
  });
}

function privateKeyOf(scalar: Uint8Array): KeyObject {
  const der = unmovedCopy(concat(PRIVATE_PREFIX, new Uint8Array(X25519_BYTES)));
  der.set(scalar, PRIVATE_PREFIX.length);
  try {
    return createPrivateKey({ key: Buffer.from(der.buffer), format: 'der', type: 'pkcs8' });
  } finally {
    der.fill(0);
  }
}

function publicBytesOf(key: KeyObject): Uint8Array {
  const der = createPublicKey(key).export({ format: 'der', type: 'spki' });
  return Uint8Array.from(der.subarray(PUBLIC_PREFIX.length));
}

/** X25519 of RFC 7748 section 5, without its optional check: a result of zero is a result. */
function x25519(privateKey: KeyObject, other: Uint8Array): Secret {
  const key = Buffer.from(concat(PUBLIC_PREFIX, other));
  const publicKey = createPublicKey({ key, format: 'der', type: 'spki' });
  try {
    return new Secret(diffieHellman({ privateKey, publicKey }));
  } catch (error) {
    // How OpenSSL says that the result is zero.
    const { code } = error as { code?: string };
    if (code === 'ERR_OSSL_FAILED_DURING_DERIVATION')
      return new Secret(new Uint8Array(X25519_BYTES));
    throw error;
  }
}

function combine(
  mlKem: Secret,
  exchanged: Secret,
  ciphertext: Uint8Array,
  publicKey: Uint8Array,
): Secret {
  return mlKem.use((a) =>
    exchanged.use((b) => new Secret(sha3_256(a, b, ciphertext, publicKey, LABEL))),
  );
}

/** The public half of a private key: of X-Wing by expanding it, of ML-KEM a copy of what it holds. */
export async function publicHalfOf(kem: KemId, decapsulationKey: Secret): Promise<Uint8Array> {
  if (kem !== Kem.xWing) {
    return decapsulationKey.use((key) => encapsulationKeyOf(kem, key).slice());
  }
  const { mlKem, mlKemPublic, x25519Public } = await expand(decapsulationKey);
  mlKem.wipe();
  return concat(mlKemPublic, x25519Public);
}

/** A fresh pair; the caller wipes the private key. */
export async function generateXWing(): Promise<{
  encapsulationKey: Uint8Array;
  decapsulationKey: Secret;
}> {
  const decapsulationKey = Secret.random(SEED_BYTES);
  return { encapsulationKey: await publicHalfOf(Kem.xWing, decapsulationKey), decapsulationKey };
}

/** `encapsulationKey` was checked. */
export function encapsulateXWing(mlKem: OqsKem, encapsulationKey: Uint8Array): Encapsulation {
  const x25519Public = encapsulationKey.subarray(ML_KEM.encapsulationKeyBytes);
  using scalar = Secret.random(X25519_BYTES);
  const ephemeral = scalar.use(privateKeyOf);
  const x25519Ciphertext = publicBytesOf(ephemeral);
  using exchanged = x25519(ephemeral, x25519Public);
  const inner = mlKem.encapsulate(encapsulationKey.subarray(0, ML_KEM.encapsulationKeyBytes));
  using shared = inner.sharedSecret;
  return {
    ciphertext: concat(inner.ciphertext, x25519Ciphertext),
    sharedSecret: combine(shared, exchanged, x25519Ciphertext, x25519Public),
  };
}

/** Sizes were checked. */
export async function decapsulateXWing(
  mlKem: OqsKem,
  seed: Secret,
  ciphertext: Uint8Array,
): Promise<Secret> {
  const key = await expand(seed);
  using mlKemKey = key.mlKem;
  const x25519Ciphertext = ciphertext.subarray(ML_KEM.ciphertextBytes);
  using shared = mlKem.decapsulate(mlKemKey, ciphertext.subarray(0, ML_KEM.ciphertextBytes));
  using exchanged = x25519(key.x25519, x25519Ciphertext);
  return combine(shared, exchanged, x25519Ciphertext, key.x25519Public);
}

/** SHA3-256 of the public half that the seed 0, 1, 2 … 31 expands to. */
const KNOWN_PUBLIC = '02ed14d55121ca47e2aa279a7fdba9867f7d9bbc3c5ab4f004f94354565c8158';

/** Kind `integrity` when keys, or secrets of both sides, are not what they must be. */
export async function selfTestXWing(mlKem: OqsKem): Promise<void> {
  using seed = new Secret(Uint8Array.from({ length: SEED_BYTES }, (_, index) => index));
  const encapsulationKey = await publicHalfOf(Kem.xWing, seed);
  const { ciphertext, sharedSecret } = encapsulateXWing(mlKem, encapsulationKey);
  using sent = sharedSecret;
  using received = await decapsulateXWing(mlKem, seed, ciphertext);
  // One bit in each half: both have a part in the secret.
  const changed = async (at: number) =>
    await decapsulateXWing(
      mlKem,
      seed,
      ciphertext.map((byte, index) => (index === at ? byte ^ 1 : byte)),
    );
  using first = await changed(0);
  using last = await changed(ML_KEM.ciphertextBytes);
  const known = toHex(sha3_256(encapsulationKey)) === KNOWN_PUBLIC;
  if (known && sent.equals(received) && !sent.equals(first) && !sent.equals(last)) return;
  throw new PqblkError('integrity', 'X-Wing fails its self-test');
}
