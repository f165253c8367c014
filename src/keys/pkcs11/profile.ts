// Room keys/pkcs11: profiles, the small documents that say how a kind of token speaks ML-KEM.
//
// Which call, which numbers, which habits. Three are shipped; a user's own is a JSON file of the same
// form (docs/tokens.md) and is checked field by field: kind `bad_profile` names the field, what was
// expected and what was found. A profile chooses numbers and never what is believed: the self-test
// of provider.ts decides whether they were the right ones.
import { isAbsolute } from 'node:path';
import { PqblkError } from '../../errors.js';
import { readInputText } from '../input-file.js';
import { Kem, type KemId, kemParameters } from '../ml-kem.js';
import { printable, type StyleName } from './wire.js';

/** Fields of a template, by what they mean; `use` is what lets a key decapsulate. */
export const FIELDS = [
  'class',
  'keyType',
  'token',
  'private',
  'sensitive',
  'extractable',
  'use',
  'label',
  'id',
  'parameterSet',
  'valueLength',
] as const;
export type Field = (typeof FIELDS)[number];

const STYLES = ['encapsulate', 'derive', 'decrypt'] as const;

export interface ProfileKem {
  readonly keyType: number;
  /** CKP_… where key types are shared between parameter sets. */
  readonly parameterSet?: number;
  readonly generate: number;
  readonly decapsulate: number;
}

export interface Profile {
  readonly name: string;
  readonly description: string;
  readonly style: StyleName;
  readonly kems: ReadonlyMap<KemId, ProfileKem>;
  /** For C_Initialize: `{directory}` in the configuration becomes the token's directory. */
  readonly configuration: string | undefined;
  readonly osLocking: boolean;
  /** Libraries to load first: absolute, or beside the module. */
  readonly preload: readonly string[];
  readonly omit: {
    readonly publicKey: readonly Field[];
    readonly privateKey: readonly Field[];
    readonly secret: readonly Field[];
  };
  readonly environment: readonly string[];
  readonly timeoutSeconds: number;
  /** What the security officer of a fresh token logs in with, where that is a known value. */
  readonly freshSoPin: string | undefined;
}

export const PROFILE_BYTES_MAX = 16_384;
const TIMEOUT_SECONDS = 30;

// Mechanism and key-type numbers of PKCS#11 3.2.
const STANDARD_KEMS = {
  'ML-KEM-768': { keyType: '0x49', parameterSet: 2, generate: '0x0f', decapsulate: '0x17' },
  'ML-KEM-1024': { keyType: '0x49', parameterSet: 3, generate: '0x0f', decapsulate: '0x17' },
};

/** The shipped profiles, as the documents that `pqblk token profile` prints. */
export const PROFILES: Readonly<Record<string, object>> = {
  'pkcs11-3.2': {
    name: 'pkcs11-3.2',
    description: 'any token whose module offers PKCS#11 3.2',
    style: 'encapsulate',
    kems: STANDARD_KEMS,
  },
  nss: {
    name: 'nss',
    description: "NSS's softokn, 3.125 tested: a token in software, kept in a directory's files",
    style: 'encapsulate',
    kems: STANDARD_KEMS,
    configuration:
      "configdir='sql:{directory}' certPrefix='' keyPrefix='' secmod='secmod.db' flags=noModDB",
    preload: ['libnssutil3.so', 'libmozsqlite3.so'],
    omit: { secret: ['valueLength'] },
    freshSoPin: '',
  },
  quac100: {
    name: 'quac100',
    description: 'Dyber QUAC 100: PKCS#11 2.40 with numbers of the vendor',
    style: 'derive',
    kems: {
      'ML-KEM-768': { keyType: '0x80000002', generate: '0x80000002', decapsulate: '0x80000008' },
      'ML-KEM-1024': { keyType: '0x80000003', generate: '0x80000003', decapsulate: '0x80000009' },
    },
  },
};

/**
 * A shipped profile by its name, or a user's own by an absolute path. Kinds `bad_profile`,
 * `not_found`, `permission`.
 */
export async function loadProfile(reference: string): Promise<Profile> {
  const shipped = Object.hasOwn(PROFILES, reference) ? PROFILES[reference] : undefined;
  if (shipped) return parseProfile(shipped);
  if (!isAbsolute(reference)) {
    throw new PqblkError('bad_profile', `there is no profile ${JSON.stringify(reference)}`, {
      hint: `${Object.keys(PROFILES).join(', ')}, or the path of a file`,
    });
  }
  const text = await readInputText(reference, {
    operation: 'read token profile',
    bytesMax: PROFILE_BYTES_MAX,
    tooLong: 'bad_profile',
  });
  return parseProfile(parseJson(text, reference), reference);
}

function parseJson(text: string, path: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new PqblkError('bad_profile', 'the profile is no JSON', { path, cause });
  }
}

/** Checks every field; a field that means nothing here is an error too. Kind `bad_profile`. */
export function parseProfile(document: unknown, path?: string): Profile {
  const read = new ProfileReader(document, '', path);
  const style = read.choice('style', STYLES);
  const omit = read.optionalObject('omit');
  const profile: Profile = {
    name: read.text('name', /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/, 'a name of letters and digits'),
    description: read.optionalText('description', /^[^\p{Cc}]{1,200}$/u, 'one line') ?? '',
    style,
    kems: parseKems(read.object('kems')),
    configuration: read.optionalText('configuration', /^[^\p{Cc}]{1,1024}$/u, 'one line'),
    osLocking: read.boolean('osLocking', true),
    preload: read.texts('preload', 8, /^(\/|[^/]+$)[^\p{Cc}]*$/u, 'a file name or absolute path'),
    omit: {
      publicKey: omit?.choices('publicKey', FIELDS) ?? [],
      privateKey: omit?.choices('privateKey', FIELDS) ?? [],
      secret: omit?.choices('secret', FIELDS) ?? [],
    },
    environment: read.texts(
      'environment',
      16,
      /^(?!LD_|GLIBC_)[A-Z_][A-Z0-9_]{0,63}$/,
      'a variable that does not direct the dynamic linker',
    ),
    timeoutSeconds: read.number('timeoutSeconds', 1, 600, TIMEOUT_SECONDS),
    freshSoPin: read.optionalText('freshSoPin', /^[^\p{Cc}]{0,64}$/u, 'a PIN'),
  };
  omit?.end();
  read.end();
  return profile;
}

const KEMS: readonly KemId[] = [Kem.mlKem768, Kem.mlKem1024];

function parseKems(read: ProfileReader): ReadonlyMap<KemId, ProfileKem> {
  const kems = new Map<KemId, ProfileKem>();
  for (const id of KEMS) {
    const { name } = kemParameters(id);
    const entry = read.optionalObject(name);
    if (!entry) continue;
    const parameterSet = entry.optionalNumber('parameterSet');
    kems.set(id, {
      keyType: entry.number('keyType'),
      generate: entry.number('generate'),
      decapsulate: entry.number('decapsulate'),
      ...(parameterSet !== undefined && { parameterSet }),
    });
    entry.end();
  }
  read.end();
  if (kems.size > 0) return kems;
  return read.fail('', `one of ${KEMS.map((id) => kemParameters(id).name).join(', ')}`, undefined);
}

/** The names of a profile's KEMs, for messages. */
export function kemsOf(profile: Profile): string {
  return [...profile.kems.keys()].map((id) => kemParameters(id).name).join(', ');
}

/** Reads a JSON object field by field, and knows which fields nobody asked for. */
class ProfileReader {
  readonly #object: Record<string, unknown>;
  readonly #where: string;
  readonly #path: string | undefined;
  readonly #read = new Set<string>();

  constructor(value: unknown, where: string, path: string | undefined) {
    this.#where = where;
    this.#path = path;
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      this.fail('', 'a JSON object', value);
    }
    this.#object = value as Record<string, unknown>;
  }

  fail(field: string, expected: string, found: unknown): never {
    const name = [this.#where, field].filter(Boolean).join('.') || 'the document';
    const text = found === undefined ? 'nothing' : printable(JSON.stringify(found)).slice(0, 80);
    throw new PqblkError('bad_profile', `${name}: expected ${expected}, found ${text}`, {
      path: this.#path,
      operation: 'read token profile',
    });
  }

  /** Every field was read: others are mistakes, for instance in spelling. */
  end(): void {
    const unknown = Object.keys(this.#object).find((field) => !this.#read.has(field));
    if (unknown !== undefined) this.fail('', 'no unknown field', unknown);
  }

  #value(field: string): unknown {
    this.#read.add(field);
    return Object.hasOwn(this.#object, field) ? this.#object[field] : undefined;
  }

  object(field: string): ProfileReader {
    return new ProfileReader(this.#value(field), this.#name(field), this.#path);
  }

  optionalObject(field: string): ProfileReader | undefined {
    return this.#value(field) === undefined ? undefined : this.object(field);
  }

  text(field: string, pattern: RegExp, expected: string): string {
    const value = this.#value(field);
    if (typeof value === 'string' && pattern.test(value)) return value;
    return this.fail(field, expected, value);
  }

  optionalText(field: string, pattern: RegExp, expected: string): string | undefined {
    return this.#value(field) === undefined ? undefined : this.text(field, pattern, expected);
  }

  texts(field: string, max: number, pattern: RegExp, expected: string): string[] {
    const value = this.#value(field) ?? [];
    if (!Array.isArray(value) || value.length > max) {
      return this.fail(field, `a list of at most ${max}`, value);
    }
    return value.map((item) =>
      typeof item === 'string' && pattern.test(item) ? item : this.fail(field, expected, item),
    );
  }

  choice<T extends string>(field: string, allowed: readonly T[]): T {
    const value = this.#value(field);
    const found = allowed.find((choice) => choice === value);
    return found ?? this.fail(field, `one of ${allowed.join(', ')}`, value);
  }

  choices<T extends string>(field: string, allowed: readonly T[]): T[] {
    const value = this.#value(field) ?? [];
    if (!Array.isArray(value)) return this.fail(field, 'a list', value);
    return value.map(
      (item) =>
        allowed.find((choice) => choice === item) ??
        this.fail(field, `some of ${allowed.join(', ')}`, item),
    );
  }

  boolean(field: string, absent: boolean): boolean {
    const value = this.#value(field) ?? absent;
    return typeof value === 'boolean' ? value : this.fail(field, 'true or false', value);
  }

  /** A number, or "0x…" since JSON has no hexadecimal ones. */
  number(field: string, min = 0, max = 0xffff_ffff, absent?: number): number {
    const value = this.#value(field) ?? absent;
    const hex = typeof value === 'string' && /^0x[0-9a-fA-F]{1,8}$/.test(value);
    const number = hex ? Number(value) : value;
    if (typeof number === 'number' && Number.isInteger(number) && number >= min && number <= max) {
      return number;
    }
    return this.fail(field, `a number from ${min} to ${max}, or "0x…"`, value);
  }

  optionalNumber(field: string): number | undefined {
    return this.#value(field) === undefined ? undefined : this.number(field);
  }

  #name(field: string): string {
    return this.#where ? `${this.#where}.${field}` : field;
  }
}
