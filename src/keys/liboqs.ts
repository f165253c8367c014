// Room keys/: the default KEM provider, ML-KEM-768 and -1024 in software through liboqs.
//
// The module of a KEM is loaded when it is first needed and then kept; loading ends with a
// self-test, which also compiles the code, so that the first unlock is as fast as the others.
// Private keys are expanded decapsulation keys in a Secret (this build of liboqs exports no seeded
// key generation).
import { PqblkError } from '../errors.js';
import { LIBOQS_KEMS, LIBOQS_VERSION, OqsKem } from './liboqs-module.js';
import {
  checkCiphertext,
  checkDecapsulationKey,
  checkEncapsulationKey,
  DEFAULT_KEM,
  Kem,
  type KemId,
  kemParameters,
} from './ml-kem.js';
import {
  type Encapsulation,
  type Identity,
  type KemProvider,
  type KeyPair,
  type PrivateKey,
  type ProviderDescription,
  ProviderKind,
} from './provider.js';
import type { Secret } from './secret.js';
import { requirePrimitives } from './self-test.js';
import { decapsulateXWing, encapsulateXWing, generateXWing, selfTestXWing } from './x-wing.js';

const loaded = new Map<KemId, Promise<OqsKem>>();
let xWing: Promise<OqsKem> | undefined;

/** The module that X-Wing needs, once X-Wing as a whole was tested. */
function loadXWing(): Promise<OqsKem> {
  xWing ??= loadOqsKem(Kem.mlKem768).then(async (oqs) => {
    await selfTestXWing(oqs);
    return oqs;
  });
  xWing.catch(() => {
    xWing = undefined;
  });
  return xWing;
}

/** The loaded and self-tested module of a KEM, shared by the process. */
export function loadOqsKem(kem: KemId): Promise<OqsKem> {
  let pending = loaded.get(kem);
  if (!pending) {
    pending = OqsKem.load(kem).then((oqs) => {
      selfTest(oqs, kem);
      return oqs;
    });
    pending.catch(() => loaded.delete(kem)); // a failed load may be tried again
    loaded.set(kem, pending);
  }
  return pending;
}

function selfTest(oqs: OqsKem, kem: KemId): void {
  const { encapsulationKey, decapsulationKey } = oqs.keypair();
  using key = decapsulationKey;
  key.use((bytes) => checkDecapsulationKey(kem, bytes));
  checkEncapsulationKey(kem, encapsulationKey);
  const { ciphertext, sharedSecret } = oqs.encapsulate(encapsulationKey);
  using sent = sharedSecret;
  using received = oqs.decapsulate(key, ciphertext);
  const changed = ciphertext.map((byte, index) => (index === 0 ? byte ^ 1 : byte));
  using rejected = oqs.decapsulate(key, changed);
  if (sent.equals(received) && !sent.equals(rejected)) return;
  throw new PqblkError('integrity', `liboqs fails the self-test of ${kemParameters(kem).name}`);
}

class LiboqsProvider implements KemProvider {
  readonly kind = ProviderKind.software;

  async describe(): Promise<ProviderDescription> {
    const kems = [...LIBOQS_KEMS, Kem.xWing];
    return { name: 'liboqs', version: LIBOQS_VERSION, kems, hardware: false };
  }

  async generate(kem: KemId): Promise<KeyPair> {
    const { encapsulationKey, decapsulationKey } =
      kem === Kem.xWing ? await this.#generateXWing() : (await loadOqsKem(kem)).keypair();
    return { encapsulationKey, privateKey: { type: 'software', kem, decapsulationKey } };
  }

  async encapsulate(kem: KemId, encapsulationKey: Uint8Array): Promise<Encapsulation> {
    checkEncapsulationKey(kem, encapsulationKey);
    if (kem === Kem.xWing) return encapsulateXWing(await loadXWing(), encapsulationKey);
    return (await loadOqsKem(kem)).encapsulate(encapsulationKey);
  }

  async decapsulate(key: PrivateKey, ciphertext: Uint8Array): Promise<Secret> {
    if (key.type !== 'software') {
      throw new PqblkError('invalid_argument', 'a key on a token cannot be used in software');
    }
    checkCiphertext(key.kem, ciphertext);
    const { decapsulationKeyBytes, name } = kemParameters(key.kem);
    if (key.decapsulationKey.length !== decapsulationKeyBytes) {
      throw new PqblkError(
        'bad_key',
        `${name} decapsulation key has ${key.decapsulationKey.length} bytes, ` +
          `expected ${decapsulationKeyBytes}`,
      );
    }
    if (key.kem === Kem.xWing) {
      return await decapsulateXWing(await loadXWing(), key.decapsulationKey, ciphertext);
    }
    return (await loadOqsKem(key.kem)).decapsulate(key.decapsulationKey, ciphertext);
  }

  async selfTest(kem: KemId): Promise<void> {
    if (kem === Kem.xWing) await selfTestXWing(await loadOqsKem(Kem.mlKem768));
    else selfTest(await loadOqsKem(kem), kem);
  }

  async #generateXWing() {
    await loadXWing();
    return await generateXWing();
  }
}

/** The software provider. It holds no state of its own, so there is one. */
export const liboqs: KemProvider = new LiboqsProvider();

/**
 * An identity over a decapsulation key that was checked (`openPrivate`, or `generate`). It takes
 * the key over: disposing of the identity wipes it.
 */
export function softwareIdentity(
  kem: KemId,
  decapsulationKey: Secret,
  fingerprint: Uint8Array,
): Identity {
  return {
    provider: liboqs,
    privateKey: { type: 'software', kem, decapsulationKey },
    fingerprint,
    [Symbol.dispose]: () => decapsulationKey.wipe(),
  };
}

/**
 * Loads, tests and warms what an unlock needs, so that a program can do it early (beside reading an
 * image, or while somebody types a passphrase). Opening does it by itself otherwise.
 */
export async function prepareKeys(kem: KemId = DEFAULT_KEM): Promise<void> {
  requirePrimitives();
  await (kem === Kem.xWing ? loadXWing() : loadOqsKem(kem));
}
