// Room keys/: one key as a document: its fields, their checks, and the private key sealed inside.
//
// A key file of the store and the armoured text of an export hold the same JSON document. The
// private key is sealed with AES-256-GCM under a key that scrypt makes of a passphrase; every other
// field is its AAD. `protection: "none"` exists because some machines have nobody to type: it must
// be asked for and shows in every listing. This file does no I/O.
import { type ScryptOptions, scrypt } from 'node:crypto';
import { promisify } from 'node:util';
import { PqblkError } from '../errors.js';
import { ascii, equalConstantTime, toHex } from './bytes.js';
import { GCM_NONCE_BYTES, GCM_TAG_BYTES, gcmOpen, gcmSeal, KEY_BYTES } from './kdf.js';
import {
  checkDecapsulationKey,
  checkEncapsulationKey,
  fingerprintOf,
  type KemId,
  type KemParameters,
  kemByName,
  kemParameters,
} from './ml-kem.js';
import { randomBytes, Secret } from './secret.js';
import { publicHalfOf } from './x-wing.js';

const FORMAT = 'pqblk-key';
const VERSION = 1;
/** A key on a token: version 1 does not know that place, and must say so rather than "damaged". */
const TOKEN_VERSION = 2;
/** Largest document: an ML-KEM-1024 key pair in base64, with room to spare. */
export const KEY_FILE_BYTES_MAX = 32_768;
const SALT_BYTES = 32;
const scryptAsync: (
  password: Uint8Array,
  salt: Uint8Array,
  length: number,
  options: ScryptOptions,
) => Promise<Buffer> = promisify(scrypt);

/** scrypt cost of new keys: 128 MiB and about half a second. */
export const SCRYPT_COST: ScryptCost = { N: 2 ** 17, r: 8, p: 1 };

/** What a key file may ask of this machine (at most 1 GiB) and the least that protects. */
const SCRYPT_LIMITS = {
  nMin: 2 ** 14,
  nMax: 2 ** 20,
  rMin: 8,
  rMax: 32,
  pMax: 4,
  bytesMax: 2 ** 30,
};

export interface ScryptCost {
  readonly N: number;
  readonly r: number;
  readonly p: number;
}

export type PrivatePart =
  | {
      readonly protection: 'scrypt';
      readonly cost: ScryptCost;
      readonly salt: Uint8Array;
      readonly nonce: Uint8Array;
      /** Sealed decapsulation key, then the tag. */
      readonly sealed: Uint8Array;
    }
  | { readonly protection: 'none'; readonly decapsulationKey: Secret }
  | TokenPart;

/** Where a private key is that never leaves its token, and how it is reached from this host. */
export interface TokenPart {
  readonly protection: 'token';
  /** RFC 7512, path attributes only: which key on which token. */
  readonly uri: string;
  /** Absolute path of the PKCS#11 module. */
  readonly module: string;
  /** Name of a shipped profile, or the absolute path of the user's own. */
  readonly profile: string;
  readonly directory?: string | undefined;
  /** A file that holds the PIN, for hosts without an operator. */
  readonly pinFile?: string | undefined;
  /** How the token lets somebody in. */
  readonly login: 'pin' | 'pinpad' | 'none';
}

export interface KeyFile {
  readonly name: string;
  readonly kem: KemId;
  /** ISO 8601, UTC. */
  readonly created: string;
  readonly encapsulationKey: Uint8Array;
  /** SHA3-256 of the encapsulation key. */
  readonly fingerprint: Uint8Array;
  /** Undefined for somebody else's key, of which only the public half is here. */
  readonly privatePart: PrivatePart | undefined;
}

type PublicFields = Omit<KeyFile, 'privatePart'>;

const KEY_NAME = /^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$/;

/** Names are file names: letters, digits and . _ @ - (not first), at most 64. */
export function isKeyName(name: string): boolean {
  return KEY_NAME.test(name);
}

export function checkKeyName(name: string): void {
  if (isKeyName(name)) return;
  throw new PqblkError(
    'invalid_argument',
    `${JSON.stringify(name)} is no key name: use letters, digits and . _ @ - (at most 64)`,
  );
}

function publicDocument(key: PublicFields, version = VERSION) {
  return {
    format: FORMAT,
    version,
    name: key.name,
    fingerprint: toHex(key.fingerprint),
    kem: kemParameters(key.kem).name,
    created: key.created,
    encapsulationKey: base64(key.encapsulationKey),
  };
}

/** The AAD of the sealed private key: every other field, in a fixed order. */
function associatedData(key: PublicFields, cost: ScryptCost, salt: Uint8Array): Uint8Array {
  const parameters = { protection: 'scrypt', N: cost.N, r: cost.r, p: cost.p, salt: base64(salt) };
  return ascii(JSON.stringify([publicDocument(key), parameters]));
}

// OpenSSL's, on a thread of its own: the 128 MiB that it needs go back to the system when it is
// done. In JavaScript they would stay until a collector sees a reason to act.
async function passphraseKey(passphrase: Secret, salt: Uint8Array, cost: ScryptCost) {
  const maxmem = SCRYPT_LIMITS.bytesMax + 2 ** 20;
  return new Secret(
    await passphrase.use((bytes) => scryptAsync(bytes, salt, KEY_BYTES, { ...cost, maxmem })),
  );
}

/** Seals a decapsulation key under a passphrase. Both stay the caller's. */
export async function sealPrivate(
  key: PublicFields,
  decapsulationKey: Secret,
  passphrase: Secret,
  cost: ScryptCost = SCRYPT_COST,
): Promise<PrivatePart> {
  const salt = randomBytes(SALT_BYTES);
  const nonce = randomBytes(GCM_NONCE_BYTES);
  using wrapping = await passphraseKey(passphrase, salt, cost);
  const aad = associatedData(key, cost, salt);
  const sealed = decapsulationKey.use((bytes) => gcmSeal(wrapping, nonce, aad, bytes));
  return { protection: 'scrypt', cost, salt, nonce, sealed };
}

/**
 * The decapsulation key of a key file, checked against its public half; the caller wipes it. Kinds
 * `no_key` (public half only), `passphrase_needed`, `wrong_passphrase`, `bad_key`, `unsupported`
 * (on a token).
 */
export async function openPrivate(key: KeyFile, passphrase: Secret | undefined): Promise<Secret> {
  const part = key.privatePart;
  if (!part) {
    throw new PqblkError('no_key', `the store holds only the public half of "${key.name}"`);
  }
  if (part.protection === 'token') {
    throw new PqblkError('unsupported', `the private half of "${key.name}" stays on its token`, {
      hint: part.uri,
    });
  }
  const opened =
    part.protection === 'none'
      ? part.decapsulationKey.use((bytes) => Secret.copyOf(bytes))
      : await openSealed(key, part, passphrase);
  try {
    opened.use((bytes) => checkDecapsulationKey(key.kem, bytes));
    if (!equalConstantTime(await publicHalfOf(key.kem, opened), key.encapsulationKey)) {
      throw new PqblkError('bad_key', `the halves of key "${key.name}" do not belong together`);
    }
    return opened;
  } catch (error) {
    opened.wipe();
    throw error;
  }
}

async function openSealed(
  key: KeyFile,
  part: Extract<PrivatePart, { protection: 'scrypt' }>,
  passphrase: Secret | undefined,
): Promise<Secret> {
  if (!passphrase) {
    throw new PqblkError('passphrase_needed', `key "${key.name}" is under a passphrase`, {
      hint: 'give it with --passphrase-file, --passphrase-fd, --passphrase-env or at the prompt',
    });
  }
  using wrapping = await passphraseKey(passphrase, part.salt, part.cost);
  const aad = associatedData(key, part.cost, part.salt);
  const opened = gcmOpen(wrapping, part.nonce, aad, part.sealed);
  if (opened) return opened;
  throw new PqblkError(
    'wrong_passphrase',
    `wrong passphrase for key "${key.name}", or its file was changed`,
  );
}

/** The document as JSON text. */
export function encodeKeyFile(key: KeyFile): string {
  const version = key.privatePart?.protection === 'token' ? TOKEN_VERSION : VERSION;
  const fields = publicDocument(key, version);
  return `${JSON.stringify({ ...fields, private: privateDocument(key) }, null, 2)}\n`;
}

function privateDocument({ privatePart: part }: KeyFile) {
  if (!part) return null;
  if (part.protection === 'token') {
    const { protection, uri, module, profile, login, directory, pinFile } = part;
    return { protection, uri, module, profile, login, directory, pinFile };
  }
  if (part.protection === 'none') {
    const decapsulationKey = part.decapsulationKey.use(base64);
    return { protection: 'none', decapsulationKey };
  }
  return {
    protection: 'scrypt',
    ...part.cost,
    salt: base64(part.salt),
    nonce: base64(part.nonce),
    sealed: base64(part.sealed),
  };
}

/**
 * Reads a document and checks every field, the FIPS 203 check of the public half included. Kinds
 * `bad_key`, and `newer_version` for a document of a later format.
 */
export function parseKeyFile(document: Secret, path?: string): KeyFile {
  using taken = takePrivate(document);
  const read = new DocumentReader(parseJson(taken.text), path);
  if (read.value('format') !== FORMAT) read.fail('not a pqblk key');
  const version = read.value('version');
  if (version !== VERSION && version !== TOKEN_VERSION) {
    throw new PqblkError('newer_version', `key format version ${version}`, { path });
  }
  const name = read.text('name', KEY_NAME);
  const created = read.text('created', /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z$/);
  const kem = kemByName(read.text('kem', /^(ML-KEM-768|ML-KEM-1024|X-Wing)$/));
  const encapsulationKey = read.bytes('encapsulationKey', kem.encapsulationKeyBytes);
  const fingerprint = fingerprintOf(encapsulationKey);
  if (read.value('fingerprint') !== toHex(fingerprint)) {
    read.fail('the fingerprint is not that of the public key');
  }
  checkEncapsulationKey(kem.id, encapsulationKey);
  const inner = read.value('private');
  const privatePart =
    inner === null ? undefined : parsePrivate(new DocumentReader(inner, path), kem, taken.key);
  if ((privatePart?.protection === 'token') !== (version === TOKEN_VERSION)) read.fail('version');
  return { name, kem: kem.id, created, encapsulationKey, fingerprint, privatePart };
}

function parsePrivate(
  read: DocumentReader,
  kem: KemParameters,
  key: Secret | undefined,
): PrivatePart {
  const protection = read.text('protection', /^(scrypt|none|token)$/);
  if (protection === 'token') return parseTokenPart(read);
  if (protection === 'none') {
    if (key?.length !== kem.decapsulationKeyBytes) return read.fail('decapsulationKey');
    return { protection, decapsulationKey: key.use((bytes) => Secret.copyOf(bytes)) };
  }
  const cost = { N: read.integer('N'), r: read.integer('r'), p: read.integer('p') };
  const limits = SCRYPT_LIMITS;
  const powerOfTwo = Number.isInteger(Math.log2(cost.N));
  if (!powerOfTwo || cost.N < limits.nMin || cost.N > limits.nMax) read.fail('scrypt N');
  if (cost.r < limits.rMin || cost.r > limits.rMax) read.fail('scrypt r');
  if (cost.p < 1 || cost.p > limits.pMax) read.fail('scrypt p');
  if (128 * cost.N * cost.r > limits.bytesMax) read.fail('scrypt wants more than 1 GiB');
  return {
    protection: 'scrypt',
    cost,
    salt: read.bytes('salt', SALT_BYTES),
    nonce: read.bytes('nonce', GCM_NONCE_BYTES),
    sealed: read.bytes('sealed', kem.decapsulationKeyBytes + GCM_TAG_BYTES),
  };
}

// What the fields mean is checked where they are used (pkcs11/): here only that they are text.
function parseTokenPart(read: DocumentReader): TokenPart {
  const path = /^\/[^\p{Cc}]{1,4095}$/u;
  const optionalPath = (field: string) =>
    read.value(field) === undefined ? undefined : read.text(field, path);
  return {
    protection: 'token',
    uri: read.text('uri', /^pkcs11:[\x21-\x7e]{0,4000}$/),
    module: read.text('module', path),
    profile: read.text('profile', /^[^\p{Cc}]{1,4096}$/u),
    login: read.text('login', /^(pin|pinpad|none)$/) as TokenPart['login'],
    directory: optionalPath('directory'),
    pinFile: optionalPath('pinFile'),
  };
}

const PRIVATE_FIELD = Buffer.from('"decapsulationKey"');

interface Taken extends Disposable {
  /** The document; a private key without passphrase is not in it. */
  readonly text: string;
  readonly key: Secret | undefined;
}

/** Takes a private key out of a document before that becomes text, which could not be wiped. */
function takePrivate(document: Secret): Taken {
  return document.use((bytes) => {
    using copy = Secret.copyOf(bytes);
    return copy.use((own) => {
      const [from, to] = fieldIn(own);
      const key = from < to ? decodeBase64(own.subarray(from, to)) : undefined;
      own.fill(0x20, from, to);
      const text = new TextDecoder().decode(own);
      return { text, key, [Symbol.dispose]: () => key?.wipe() };
    });
  });
}

/** Where the text of the private key is: between the quotes behind the name of its field. */
function fieldIn(bytes: Uint8Array): [from: number, to: number] {
  const quote = 0x22;
  const name = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).indexOf(PRIVATE_FIELD);
  const from = name < 0 ? 0 : bytes.indexOf(quote, name + PRIVATE_FIELD.length) + 1;
  const to = from === 0 ? 0 : bytes.indexOf(quote, from);
  return to < from ? [0, 0] : [from, to];
}

const NO_DIGIT = 64;
/** Values of the digits of base64, by their byte. */
const BASE64 = new Uint8Array(256).fill(NO_DIGIT);
ascii('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/').forEach(
  (digit, value) => {
    BASE64[digit] = value;
  },
);

/** Undefined where it is none. Node's own decoder leaves copies in pools. */
function decodeBase64(digits: Uint8Array): Secret | undefined {
  let length = digits.length;
  while (length > digits.length - 2 && digits[length - 1] === 0x3d) length -= 1;
  using bytes = Secret.zeros(Math.floor((length * 3) / 4));
  const whole = bytes.use((into) => {
    let [bits, pending, at] = [0, 0, 0];
    for (let digit = 0; digit < length; digit += 1) {
      const value = BASE64[digits[digit] ?? 0] ?? NO_DIGIT;
      if (value === NO_DIGIT) return false;
      pending = ((pending << 6) | value) & 0x3fff;
      bits += 6;
      if (bits < 8) continue;
      bits -= 8;
      into[at++] = pending >> bits;
    }
    return digits.length % 4 === 0;
  });
  return whole ? bytes.use((all) => Secret.copyOf(all)) : undefined;
}

/** Undefined where the text is no JSON, so that its complaint cannot quote a secret. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Reads fields of an untrusted JSON object; its complaints never quote a value. */
class DocumentReader {
  readonly #object: Record<string, unknown>;
  readonly #path: string | undefined;

  constructor(object: unknown, path: string | undefined) {
    this.#path = path;
    if (typeof object !== 'object' || object === null || Array.isArray(object)) {
      this.fail('not a JSON object');
    }
    this.#object = object as Record<string, unknown>;
  }

  fail(what: string): never {
    const path = this.#path;
    throw new PqblkError('bad_key', `damaged key file: ${what}`, { path, operation: 'read key' });
  }

  value(field: string): unknown {
    return Object.hasOwn(this.#object, field) ? this.#object[field] : undefined;
  }

  text(field: string, pattern: RegExp): string {
    const value = this.value(field);
    return typeof value === 'string' && pattern.test(value) ? value : this.fail(field);
  }

  integer(field: string): number {
    const value = this.value(field);
    return Number.isSafeInteger(value) ? (value as number) : this.fail(field);
  }

  bytes(field: string, length: number): Uint8Array {
    const text = this.text(field, /^[A-Za-z0-9+/]+={0,2}$/);
    const bytes = Uint8Array.from(Buffer.from(text, 'base64'));
    if (bytes.length !== length) this.fail(`${field} has ${bytes.length} bytes, not ${length}`);
    return bytes;
  }
}

function base64(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('base64');
}

// ---- armour ------------------------------------------------------------------------------------

const ARMOUR = { public: 'PQBLK PUBLIC KEY', private: 'PQBLK PRIVATE KEY' } as const;

/** Text to mail or print: a key document in base64 between lines that say what it is. */
export function armour(key: KeyFile): string {
  const title = key.privatePart ? ARMOUR.private : ARMOUR.public;
  const lines = base64(ascii(encodeKeyFile(key))).match(/.{1,64}/g) ?? [];
  return [
    `-----BEGIN ${title}-----`,
    `Name: ${key.name}`,
    `KEM: ${kemParameters(key.kem).name}`,
    `Fingerprint: ${toHex(key.fingerprint)}`,
    '',
    ...lines,
    `-----END ${title}-----`,
    '',
  ].join('\n');
}

/** Wipes what a document holds of a private key. */
export function wipeKeyFile({ privatePart }: Pick<KeyFile, 'privatePart'>): void {
  if (privatePart?.protection === 'none') privatePart.decapsulationKey.wipe();
}

/** The reverse. The lines above the blank one are for people: only the document counts. */
export function parseArmour(text: string): KeyFile {
  if (text.length > 2 * KEY_FILE_BYTES_MAX) {
    throw new PqblkError('bad_key', 'too long for an exported key');
  }
  const pattern = /-----BEGIN (PQBLK (?:PUBLIC|PRIVATE) KEY)-----\n([\s\S]*?)\n-----END \1-----/;
  const found = pattern.exec(text.replaceAll('\r\n', '\n'));
  const body = found?.[2]?.split('\n\n')[1]?.replaceAll('\n', '');
  if (!found || !body || !/^[A-Za-z0-9+/]+={0,2}$/.test(body)) {
    throw new PqblkError('bad_key', 'not an exported pqblk key', {
      hint: 'expected the text between -----BEGIN PQBLK … KEY----- and -----END …-----',
    });
  }
  using document = new Secret(Buffer.from(body, 'base64'));
  const key = parseKeyFile(document);
  if ((found[1] === ARMOUR.private) !== (key.privatePart !== undefined)) {
    throw new PqblkError('bad_key', 'the title of the exported key does not fit its content');
  }
  return key;
}
