// Room keys/: the key store, a directory of key files that only its owner may read.
//
// One file per key, `NAME.key`, holding the document of key-file.ts; pins of volumes in `pins/`.
// Keys are named by their name, or by at least 8 digits of their fingerprint. The store knows no
// disk.
import { readdir } from 'node:fs/promises';
import { homedir } from 'node:os';
import { isAbsolute, join, resolve } from 'node:path';
import { fromSystem, PqblkError } from '../errors.js';
import { toHex } from './bytes.js';
import {
  armour,
  checkKeyName,
  encodeKeyFile,
  isKeyName,
  KEY_FILE_BYTES_MAX,
  type KeyFile,
  openPrivate,
  type PrivatePart,
  parseArmour,
  parseKeyFile,
  type ScryptCost,
  sealPrivate,
  type TokenPart,
  wipeKeyFile,
} from './key-file.js';
import { liboqs, prepareKeys, softwareIdentity } from './liboqs.js';
import { DEFAULT_KEM, fingerprintOf, type KemId, kemParameters } from './ml-kem.js';
import { Pins } from './pins.js';
import { parseTokenUri, slotReference } from './pkcs11/uri.js';
import {
  ensurePrivateDirectory,
  readSecretFile,
  removePrivateFile,
  requirePrivateDirectory,
  writePrivateFile,
} from './private-file.js';
import { type Identity, ProviderKind } from './provider.js';
import type { Secret } from './secret.js';
import { type Recipient, TOKEN_REFERENCE_BYTES_MAX } from './slot.js';

const KEY_SUFFIX = '.key';
const FINGERPRINT_DIGITS_MIN = 8;

/** What may be shown of a key. */
export interface KeyInfo {
  readonly name: string;
  /** SHA3-256 of the encapsulation key, hex. */
  readonly fingerprint: string;
  readonly kem: string;
  /** ISO 8601, UTC. */
  readonly created: string;
  /** How the private key is kept; `public-only` when the store has none. */
  readonly protection: 'scrypt' | 'none' | 'token' | 'public-only';
  readonly path: string;
  /** Where the private key is, when `protection` is `token`. */
  readonly token?: Omit<TokenPart, 'protection'>;
}

export interface KeyListing {
  readonly keys: readonly KeyInfo[];
  /** Files that look like keys and cannot be read: shown, so that they are noticed. */
  readonly damaged: readonly PqblkError[];
}

/** How a private key shall be kept: under a passphrase, or openly because somebody said so. */
export type Protection =
  | { readonly passphrase: Secret; readonly cost?: ScryptCost | undefined }
  | { readonly noPassphrase: true };

/** Brings what opens this key, undefined where it needs nothing; who called wipes it. */
export type BringPassphrase = (key: KeyInfo) => Promise<Secret | undefined>;

/** $PQBLK_KEYS, else $XDG_DATA_HOME/pqblk/keys, else ~/.local/share/pqblk/keys. */
export function defaultStorePath(env: NodeJS.ProcessEnv = process.env): string {
  if (env.PQBLK_KEYS) return resolve(env.PQBLK_KEYS);
  // The XDG specification: a relative path in the variable is to be ignored.
  const data = env.XDG_DATA_HOME;
  const base = data && isAbsolute(data) ? data : join(env.HOME || homedir(), '.local', 'share');
  return join(base, 'pqblk', 'keys');
}

export class KeyStore {
  readonly path: string;
  readonly pins: Pins;

  constructor(path: string = defaultStorePath()) {
    this.path = resolve(path);
    this.pins = new Pins(join(this.path, 'pins'));
  }

  /** A fresh key pair under a new name. Kinds `exists`, `invalid_argument`, `permission`, … */
  async generate(name: string, protection: Protection, kem: KemId = DEFAULT_KEM): Promise<KeyInfo> {
    await this.#requireFreeName(name);
    const { encapsulationKey, privateKey } = await liboqs.generate(kem);
    if (privateKey.type !== 'software') throw new PqblkError('general', 'not a software key');
    using decapsulationKey = privateKey.decapsulationKey;
    const created = new Date().toISOString();
    const fingerprint = fingerprintOf(encapsulationKey);
    const fields = { name, kem, created, encapsulationKey, fingerprint };
    return await this.#save(fields, decapsulationKey, protection);
  }

  /** Every key, by name; no store yet = no keys. Kind `permission`: the store is not private. */
  async list(): Promise<KeyListing> {
    const keys: KeyInfo[] = [];
    const damaged: PqblkError[] = [];
    for (const name of await this.#names()) {
      try {
        const key = await this.#read(name);
        wipeKeyFile(key);
        keys.push(this.#info(key));
      } catch (error) {
        damaged.push(fromSystem(error, { path: this.#file(name) }));
      }
    }
    return { keys, damaged };
  }

  /** Kind `not_found` when no key fits, `invalid_argument` when several do. */
  async show(reference: string): Promise<KeyInfo> {
    const key = await this.#find(reference);
    wipeKeyFile(key);
    return this.#info(key);
  }

  /** The public half, as somebody a disk can be sealed to. */
  async recipient(reference: string): Promise<Recipient> {
    const key = await this.#find(reference);
    wipeKeyFile(key);
    const { name, kem, encapsulationKey, privatePart } = key;
    const token = privatePart?.protection === 'token' && {
      home: ProviderKind.pkcs11,
      tokenReference: slotReference(parseTokenUri(privatePart.uri), TOKEN_REFERENCE_BYTES_MAX),
    };
    return { provider: liboqs, kem, encapsulationKey, label: name, ...token };
  }

  /**
   * The private half, ready to open disks; of a key on a token, `passphrase` is the PIN. A function is
   * called once it is known for which key. Kinds as `openPrivate` and `openTokenKey`; dispose of it after use.
   */
  async unlock(reference: string, passphrase?: Secret | BringPassphrase): Promise<Identity> {
    const key = await this.#find(reference);
    if (typeof passphrase !== 'function') return await this.#unlock(key, passphrase);
    try {
      using found = await passphrase(this.#info(key));
      return await this.#unlock(key, found);
    } finally {
      wipeKeyFile(key);
    }
  }

  async #unlock(key: KeyFile, passphrase: Secret | undefined): Promise<Identity> {
    const part = key.privatePart;
    if (part?.protection === 'token') return await openOnToken(key, part, passphrase);
    prepareKeys(key.kem).catch(() => {}); // beside the passphrase's work; who uses the key hears of it
    const decapsulationKey = await this.#openPrivate(key, passphrase); // with the FIPS 203 checks
    return softwareIdentity(key.kem, decapsulationKey, key.fingerprint);
  }

  /** Armoured public half. */
  async exportPublic(reference: string): Promise<string> {
    const key = await this.#find(reference);
    wipeKeyFile(key);
    return armour({ ...key, privatePart: undefined });
  }

  /** Armoured key pair, always under a passphrase, which need not be the one of the store. */
  async exportPrivate(
    reference: string,
    passphrase: Secret | undefined,
    exportPassphrase: Secret,
    cost?: ScryptCost,
  ): Promise<string> {
    const key = await this.#find(reference);
    using decapsulationKey = await this.#openPrivate(key, passphrase);
    const privatePart = await sealPrivate(key, decapsulationKey, exportPassphrase, cost);
    return armour({ ...key, privatePart });
  }

  /**
   * Takes in armoured text. A key pair is opened with `passphrase`, tested, and kept as
   * `protection` says (under the same passphrase when left out). Kinds `bad_key`, `exists`,
   * `wrong_passphrase`, …
   */
  async import(
    text: string,
    options: { name?: string; passphrase?: Secret; protection?: Protection } = {},
  ): Promise<KeyInfo> {
    const imported = parseArmour(text);
    const name = options.name ?? imported.name;
    await this.#requireFreeName(name);
    await this.#requireNewFingerprint(imported);
    const fields = { ...imported, name };
    if (!imported.privatePart) return await this.#write({ ...fields, privatePart: undefined });
    using decapsulationKey = await openPrivate(imported, options.passphrase);
    await requireWorkingPair(imported, decapsulationKey);
    const { passphrase } = options;
    const protection = options.protection ?? (passphrase && { passphrase });
    if (!protection) {
      throw new PqblkError('passphrase_needed', 'an imported private key needs a passphrase', {
        hint: 'give one, or ask for --no-passphrase',
      });
    }
    return await this.#save(fields, decapsulationKey, protection);
  }

  /** Takes in a key that lives on a token, after it was proved there. Kinds `exists`, … */
  async addToken(
    name: string,
    kem: KemId,
    encapsulationKey: Uint8Array,
    part: TokenPart,
  ): Promise<KeyInfo> {
    const fingerprint = fingerprintOf(encapsulationKey);
    const created = new Date().toISOString();
    const key = { name, kem, created, encapsulationKey, fingerprint, privatePart: part };
    await this.requireFree(name);
    await this.#requireNewFingerprint(key);
    return await this.#write(key);
  }

  /** Keeps the public half of a key that this user vouches for, so that rotations may seal to it. */
  async remember(name: string, { kem, encapsulationKey }: Recipient): Promise<KeyInfo> {
    await this.#requireFreeName(name);
    const fingerprint = fingerprintOf(encapsulationKey);
    const created = new Date().toISOString();
    const key = { name, kem, created, encapsulationKey, fingerprint, privatePart: undefined };
    await this.#requireNewFingerprint(key);
    return await this.#write(key);
  }

  /** Kinds `exists`, `invalid_argument`: for what must not happen before the name is known good. */
  async requireFree(name: string): Promise<void> {
    await this.#requireFreeName(name);
  }

  /** Removes a key from the store. What it opened stays sealed to it: that is for the slots. */
  async delete(reference: string): Promise<KeyInfo> {
    const info = await this.show(reference);
    await removePrivateFile(info.path);
    return info;
  }

  #file(name: string): string {
    return join(this.path, `${name}${KEY_SUFFIX}`);
  }

  #info(key: KeyFile): KeyInfo {
    return {
      name: key.name,
      fingerprint: toHex(key.fingerprint),
      kem: kemParameters(key.kem).name,
      created: key.created,
      protection: key.privatePart?.protection ?? 'public-only',
      path: this.#file(key.name),
      ...(key.privatePart?.protection === 'token' && { token: tokenFields(key.privatePart) }),
    };
  }

  async #names(): Promise<string[]> {
    if (!(await requirePrivateDirectory(this.path))) return [];
    try {
      const files = await readdir(this.path);
      return files
        .filter((file) => file.endsWith(KEY_SUFFIX) && !file.startsWith('.'))
        .map((file) => file.slice(0, -KEY_SUFFIX.length))
        .sort();
    } catch (error) {
      throw fromSystem(error, { path: this.path, operation: 'list keys' });
    }
  }

  async #read(name: string): Promise<KeyFile> {
    const path = this.#file(name);
    using document = await readSecretFile(path, KEY_FILE_BYTES_MAX);
    const key = parseKeyFile(document, path);
    if (key.name === name) return key;
    throw new PqblkError('bad_key', `the file of key "${key.name}" was renamed`, {
      path,
      hint: `rename it to ${key.name}${KEY_SUFFIX}`,
    });
  }

  async #find(reference: string): Promise<KeyFile> {
    if (isKeyName(reference) && (await requirePrivateDirectory(this.path))) {
      const named = await this.#read(reference).catch(unlessNotFound);
      if (named) return named;
    }
    const matches = isFingerprintPrefix(reference)
      ? (await this.list()).keys.filter((key) =>
          key.fingerprint.startsWith(reference.toLowerCase()),
        )
      : [];
    const [match, another] = matches;
    if (another) {
      throw new PqblkError('ambiguous', `"${reference}" fits several keys`, {
        path: this.path,
      });
    }
    if (match) return await this.#read(match.name);
    throw new PqblkError('no_key', `no key ${JSON.stringify(reference)} in the store`, {
      path: this.path,
      hint: '`pqblk key list` shows what there is',
    });
  }

  async #openPrivate(key: KeyFile, passphrase: Secret | undefined): Promise<Secret> {
    try {
      return await openPrivate(key, passphrase);
    } catch (error) {
      throw inFile(error, this.#file(key.name));
    } finally {
      wipeKeyFile(key);
    }
  }

  async #requireFreeName(name: string): Promise<void> {
    checkKeyName(name);
    if (!(await this.#names()).includes(name)) return;
    throw new PqblkError('exists', `a key named "${name}" is in the store already`, {
      path: this.#file(name),
    });
  }

  async #requireNewFingerprint(key: KeyFile): Promise<void> {
    const fingerprint = toHex(key.fingerprint);
    const known = (await this.list()).keys.find((other) => other.fingerprint === fingerprint);
    if (!known) return;
    throw new PqblkError('exists', `this key is in the store already, as "${known.name}"`, {
      path: known.path,
    });
  }

  async #save(
    fields: Omit<KeyFile, 'privatePart'>,
    decapsulationKey: Secret,
    protection: Protection,
  ): Promise<KeyInfo> {
    const privatePart: PrivatePart =
      'passphrase' in protection
        ? await sealPrivate(fields, decapsulationKey, protection.passphrase, protection.cost)
        : { protection: 'none', decapsulationKey };
    return await this.#write({ ...fields, privatePart });
  }

  async #write(key: KeyFile): Promise<KeyInfo> {
    await ensurePrivateDirectory(this.path);
    await writePrivateFile(this.#file(key.name), encodeKeyFile(key), 'create');
    return this.#info(key);
  }
}

/** Only who has a key on a token waits for what talks to tokens. */
async function openOnToken(key: KeyFile, part: TokenPart, pin?: Secret): Promise<Identity> {
  const [{ loadProfile }, { openTokenKey }] = await Promise.all([
    import('./pkcs11/profile.js'),
    import('./pkcs11/provider.js'),
  ]);
  const place = { ...part, profile: await loadProfile(part.profile) };
  return await openTokenKey(place, parseTokenUri(part.uri), key.encapsulationKey, pin);
}

function tokenFields({ protection: _, ...fields }: TokenPart): Omit<TokenPart, 'protection'> {
  return fields;
}

function isFingerprintPrefix(reference: string): boolean {
  return reference.length >= FINGERPRINT_DIGITS_MIN && /^[0-9a-f]{1,64}$/i.test(reference);
}

function unlessNotFound(error: unknown): undefined {
  if (error instanceof PqblkError && error.kind === 'not_found') return undefined;
  throw error;
}

function inFile(error: unknown, path: string): unknown {
  if (!(error instanceof PqblkError) || error.path) return error;
  const { kind, message, hint, operation } = error;
  return new PqblkError(kind, message, { path, hint, operation });
}

/** FIPS 203 section 7.1, pairwise consistency: what one half seals, the other opens. */
async function requireWorkingPair(key: KeyFile, decapsulationKey: Secret): Promise<void> {
  const { ciphertext, sharedSecret } = await liboqs.encapsulate(key.kem, key.encapsulationKey);
  using sent = sharedSecret;
  const privateKey = { type: 'software', kem: key.kem, decapsulationKey } as const;
  using received = await liboqs.decapsulate(privateKey, ciphertext);
  if (!sent.equals(received)) {
    throw new PqblkError('bad_key', `the halves of key "${key.name}" do not belong together`);
  }
}
