// Room keys/: the one interface behind which private keys live, in software or on a token.
//
// A provider knows a KEM and nothing of slots, disks or files. Everything is asynchronous so that a
// token in a child process fits behind the same calls as the software library.
import type { KemId } from './ml-kem.js';
import type { Secret } from './secret.js';

/** The number a slot stores: where the private key lived when it was made (a hint for people). */
export const ProviderKind = { software: 1, pkcs11: 2 } as const;
export type ProviderKindId = (typeof ProviderKind)[keyof typeof ProviderKind];

/** A private key that a provider can use: the key itself in software, a reference on a token. */
export type PrivateKey =
  | { readonly type: 'software'; readonly kem: KemId; readonly decapsulationKey: Secret }
  | { readonly type: 'token'; readonly kem: KemId; readonly uri: string };

export interface KeyPair {
  readonly encapsulationKey: Uint8Array;
  readonly privateKey: PrivateKey;
}

export interface Encapsulation {
  readonly ciphertext: Uint8Array;
  /** 32 bytes; the caller wipes it. */
  readonly sharedSecret: Secret;
}

export interface ProviderDescription {
  readonly name: string;
  readonly version: string;
  readonly kems: readonly KemId[];
  /** True when private keys cannot leave the provider. */
  readonly hardware: boolean;
}

export interface KemProvider {
  readonly kind: ProviderKindId;

  describe(): Promise<ProviderDescription>;

  /** A fresh key pair. Kinds `unsupported`, `no_random`. The caller wipes the private key. */
  generate(kem: KemId): Promise<KeyPair>;

  /**
   * Makes a shared secret for the owner of `encapsulationKey`, after the encapsulation-key check of
   * FIPS 203 section 7.2. Kinds `bad_key`, `unsupported`, `no_random`.
   */
  encapsulate(kem: KemId, encapsulationKey: Uint8Array): Promise<Encapsulation>;

  /**
   * Recovers the shared secret. ML-KEM rejects implicitly: a ciphertext for another key yields a
   * secret that is merely wrong. Kinds `corrupt` (length), `bad_key`, `token_unavailable`.
   */
  decapsulate(key: PrivateKey, ciphertext: Uint8Array): Promise<Secret>;

  /**
   * Generate, encapsulate, decapsulate, compare, and see that a changed ciphertext gives another
   * secret. Kind `integrity` when the provider does not compute this KEM; the caller must not use
   * it.
   */
  selfTest(kem: KemId): Promise<void>;
}

/** Whoever wants to open a disk: a private key, where it works, and the name of its public half. */
export interface Identity {
  readonly provider: KemProvider;
  readonly privateKey: PrivateKey;
  /** SHA3-256 of the encapsulation key. */
  readonly fingerprint: Uint8Array;
  /** Wipes the private key where it is in this process's memory. */
  [Symbol.dispose](): void;
}
