// Room keys/pkcs11: the KEM provider over a token: what slots see of it.
//
// A provider is one session with one token. Encapsulating needs no private key and is done in
// software. Before a key is used, the token has to prove that it computes ML-KEM for it: simulators,
// wrong numbers in a profile and tokens that lie end in `token_mistrusted`, never at a disk.
import { PqblkError } from '../../errors.js';
import { equalConstantTime } from '../bytes.js';
import { liboqs } from '../liboqs.js';
import { checkCiphertext, checkEncapsulationKey, fingerprintOf, type KemId } from '../ml-kem.js';
import {
  type Encapsulation,
  type Identity,
  type KemProvider,
  type KeyPair,
  type PrivateKey,
  type ProviderDescription,
  ProviderKind,
} from '../provider.js';
import type { Secret } from '../secret.js';
import { type ModulePlace, mistrust } from './place.js';
import { nameOf, type TokenInfo } from './replies.js';
import { type TokenKey, TokenModule } from './token.js';
import { formatTokenUri, type TokenUri } from './uri.js';

export class TokenProvider implements KemProvider {
  readonly kind = ProviderKind.pkcs11;
  readonly #module: TokenModule;
  readonly #token: TokenInfo;
  readonly #keys = new Map<string, TokenKey>();

  /** Takes the module over, with a session that is logged in. */
  constructor(module: TokenModule, token: TokenInfo) {
    this.#module = module;
    this.#token = token;
  }

  async describe(): Promise<ProviderDescription> {
    const { info } = this.#module;
    return {
      name: `${info.manufacturer} ${info.library}`.trim(),
      version: info.version,
      kems: await this.#module.kems(this.#token),
      hardware: true,
    };
  }

  /** On the token, for good, under a label that says where it came from. */
  async generate(kem: KemId): Promise<KeyPair> {
    const module = this.#module;
    return this.adopt(await module.generate(kem, 'pqblk', (key) => proveKey(module, key)));
  }

  /** A key of this token as one that this provider can use. */
  adopt(key: TokenKey): KeyPair {
    const uri = uriOf(this.#token, key);
    this.#keys.set(uri, key);
    const privateKey = { type: 'token', kem: key.kem, uri } as const;
    return { encapsulationKey: key.encapsulationKey, privateKey };
  }

  encapsulate(kem: KemId, encapsulationKey: Uint8Array): Promise<Encapsulation> {
    return liboqs.encapsulate(kem, encapsulationKey);
  }

  async decapsulate(key: PrivateKey, ciphertext: Uint8Array): Promise<Secret> {
    checkCiphertext(key.kem, ciphertext);
    const known = key.type === 'token' ? this.#keys.get(key.uri) : undefined;
    if (!known) throw new PqblkError('bad_key', 'this key is not of this token session');
    return await this.#module.decapsulate(known, ciphertext);
  }

  /** With every key of the KEM that was adopted. Kinds `no_key`, `token_mistrusted`. */
  async selfTest(kem: KemId): Promise<void> {
    const keys = [...this.#keys.values()].filter((key) => key.kem === kem);
    if (keys.length === 0) throw new PqblkError('no_key', 'no key of this KEM was opened');
    for (const key of keys) await proveKey(this.#module, key);
  }

  end(): void {
    this.#module.end();
  }
}

/**
 * Encapsulates in software to the token's public key, has the token decapsulate, and compares in
 * constant time; a changed ciphertext must give another secret (FIPS 203 rejects implicitly). Kind
 * `token_mistrusted`.
 */
export async function proveKey(module: TokenModule, key: TokenKey): Promise<void> {
  checkEncapsulationKey(key.kem, key.encapsulationKey);
  const { ciphertext, sharedSecret } = await liboqs.encapsulate(key.kem, key.encapsulationKey);
  using sent = sharedSecret;
  using received = await module.decapsulate(key, ciphertext);
  if (!sent.equals(received)) {
    throw mistrust('fails the self-test: its shared secret is another', module.place);
  }
  const changed = ciphertext.map((byte, index) => (index === 0 ? byte ^ 1 : byte));
  using rejected = await module.decapsulate(key, changed);
  if (sent.equals(rejected)) {
    throw mistrust('fails the self-test: a changed ciphertext changes nothing', module.place);
  }
}

/** The URI of a key, as precise as the token makes it. */
export function uriOf(token: TokenInfo, key: Pick<TokenKey, 'label' | 'id'>): string {
  return formatTokenUri({
    ...nameOf(token),
    ...(key.label && { object: key.label }),
    ...(key.id.length > 0 && { id: key.id }),
  });
}

/**
 * A key on a token, proved and ready to open disks; disposing of it ends the token process. The
 * public half on the token must be `encapsulationKey`, which the store vouches for. Kinds `bad_key`
 * (another key there), `token_mistrusted`, and those of TokenModule.
 */
export async function openTokenKey(
  place: ModulePlace,
  uri: TokenUri,
  encapsulationKey: Uint8Array,
  pin: Secret | undefined,
  options: { lastTry?: boolean | undefined } = {},
): Promise<Identity> {
  const module = await TokenModule.load(place);
  try {
    const token = await module.find(uri);
    await module.logIn(token, pin, options);
    const key = await module.key(uri);
    if (!equalConstantTime(key.encapsulationKey, encapsulationKey)) {
      throw new PqblkError('bad_key', 'the key on the token is not the one of the key store', {
        path: place.module,
        hint: `${formatTokenUri(uri)} names another key than when it was imported`,
      });
    }
    await proveKey(module, key);
    const provider = new TokenProvider(module, token);
    const { privateKey } = provider.adopt(key);
    return {
      provider,
      privateKey,
      fingerprint: fingerprintOf(encapsulationKey),
      [Symbol.dispose]: () => provider.end(),
    };
  } catch (error) {
    module.end();
    throw error;
  }
}
