// Room keys/pkcs11: one loaded module, its tokens, a session with one of them, and its KEM keys.
//
// This is where PKCS#11 is spoken: templates, searches, numbers of the profile. The functions are
// called in the token process (process.ts). Objects are found anew in each session: handles mean
// nothing outside of it. Nothing is retried.
import { dirname, isAbsolute, join } from 'node:path';
import { PqblkError } from '../../errors.js';
import { equalConstantTime, toHex } from '../bytes.js';
import {
  checkEncapsulationKey,
  type KemId,
  kemParameters,
  SHARED_SECRET_BYTES,
} from '../ml-kem.js';
import { randomBytes, Secret } from '../secret.js';
import { Attribute, GENERIC_SECRET, ObjectClass, TokenFlag } from './numbers.js';
import { requireTries, SECURITY_OFFICER, USER } from './pin-tries.js';
import { configurationFor, type ModulePlace, mistrust, requireFile } from './place.js';
import { TokenProcess } from './process.js';
import type { Field, Profile, ProfileKem } from './profile.js';
import {
  isMeant,
  type ModuleInfo,
  nameOf,
  readHandles,
  readLoaded,
  readToken,
  type TokenInfo,
} from './replies.js';
import { formatTokenUri, type TokenUri } from './uri.js';
import { type AttributeValue, MessageWriter, Operation, Style } from './wire.js';

/** A private key on the token, whatever became of its public half. */
export interface TokenEntry {
  readonly handle: bigint;
  readonly kem: KemId;
  readonly label: string;
  readonly id: Uint8Array;
  /** False when the token would let it out: sensitive and not extractable is what protects. */
  readonly confined: boolean;
  readonly publicHalf: Uint8Array | PqblkError;
}

/** A private key whose public half is on the token too, and is one (FIPS 203 section 7.2). */
export interface TokenKey extends Omit<TokenEntry, 'publicHalf'> {
  readonly encapsulationKey: Uint8Array;
}

const ID_BYTES = 16;
/** Of native/pkcs11/protocol.h: as long as the longest secret that the token process hands over. */
const MASK_BYTES = 64;

export class TokenModule {
  readonly info: ModuleInfo;
  readonly #place: ModulePlace;
  readonly #process: TokenProcess;
  readonly #slots: readonly bigint[];

  private constructor(
    place: ModulePlace,
    process: TokenProcess,
    loaded: { info: ModuleInfo; slots: bigint[] },
  ) {
    this.#place = place;
    this.#process = process;
    this.info = loaded.info;
    this.#slots = loaded.slots;
  }

  /** Starts a token process and loads the module there. Kinds `bad_module`, `token_crashed`, … */
  static async load(place: ModulePlace): Promise<TokenModule> {
    const { module, profile } = place;
    requireFile(module);
    const process = new TokenProcess({
      module,
      environment: profile.environment,
      timeoutMs: profile.timeoutSeconds * 1000,
    });
    try {
      const configuration = configurationFor(place);
      const message = new MessageWriter(Operation.load).text(module).u32(profile.preload.length);
      for (const path of profile.preload) {
        message.text(isAbsolute(path) ? path : join(dirname(module), path));
      }
      message
        .u8(profile.osLocking)
        .u8(configuration !== undefined)
        .text(configuration ?? '')
        .u8(Style[profile.style]);
      return new TokenModule(place, process, await process.request(message, readLoaded));
    } catch (error) {
      process.end();
      throw error;
    }
  }

  get place(): ModulePlace {
    return this.#place;
  }

  /** For tests: the token process. */
  get pid(): number | undefined {
    return this.#process.pid;
  }

  /** Every token that is there. */
  async tokens(): Promise<TokenInfo[]> {
    const tokens: TokenInfo[] = [];
    for (const slot of this.#slots) {
      const message = new MessageWriter(Operation.describeSlot).u64(slot);
      tokens.push(await this.#process.request(message, (reply) => readToken(Number(slot), reply)));
    }
    return tokens;
  }

  /** The one token a URI means. Kinds `token_unavailable` (none), `ambiguous` (several). */
  async find(uri: TokenUri): Promise<TokenInfo> {
    const all = await this.tokens();
    const fitting = all.filter((token) => isMeant(uri, token));
    const [token, another] = fitting;
    if (token && !another) return token;
    const { module } = this.#place;
    const shown = (token ? fitting : all).map((one) => formatTokenUri({ ...nameOf(one) }));
    if (token) {
      throw new PqblkError('ambiguous', `${formatTokenUri(uri)} names ${shown.length} tokens`, {
        path: module,
        hint: `say which: ${shown.join(' or ')}`,
      });
    }
    throw new PqblkError('token_unavailable', `${formatTokenUri(uri)}: no such token is there`, {
      path: module,
      hint: shown.length > 0 ? `there is ${shown.join(', ')}` : 'the module shows no token at all',
    });
  }

  /** The KEMs that the profile knows and the token offers. */
  async kems(token: TokenInfo): Promise<KemId[]> {
    const offered: KemId[] = [];
    for (const [kem, numbers] of this.#place.profile.kems) {
      const message = new MessageWriter(Operation.describeMechanism)
        .u64(token.slotId)
        .u64(numbers.decapsulate);
      const there = await this.#process.request(message, (reply) => {
        const known = reply.u8() === 1;
        reply.u64();
        return known;
      });
      if (there) offered.push(kem);
    }
    return offered;
  }

  /**
   * Opens the session and logs in. The PIN is tried once, and not at all where a wrong one would
   * lock the token, unless `lastTry`. Kinds `wrong_pin`, `pin_locked`, `passphrase_needed`, …
   */
  async logIn(
    token: TokenInfo,
    pin: Secret | undefined,
    options: { readWrite?: boolean; lastTry?: boolean | undefined } = {},
  ): Promise<void> {
    await this.#open(token, options.readWrite ?? false);
    if (token.login === 'none') return;
    requireTries(token, USER, { module: this.#place.module, ...options });
    if (token.login === 'pin' && !pin) {
      throw new PqblkError('passphrase_needed', `the token "${token.label}" asks for a PIN`, {
        hint: 'give it with --pin-file, --pin-fd, pin-source of the URI, or at the prompt',
      });
    }
    try {
      await this.#login(false, token.login === 'pin' ? pin : undefined);
    } catch (error) {
      throw token.ready ? error : this.#withoutPin(token, error);
    }
  }

  /** What becomes of a login where the token says that it has no user PIN: not all mean it. */
  #withoutPin({ label }: TokenInfo, error: unknown): unknown {
    if (!(error instanceof PqblkError) || error.kind !== 'token_refused') return error;
    return new PqblkError('token_unavailable', `the token "${label}" has no user PIN yet`, {
      path: this.#place.module,
      hint: 'is it the right one? `pqblk token init` gives it a PIN',
      cause: error,
    });
  }

  /**
   * As the security officer, gives a token its first user PIN. Kind `exists` when it has one; those of
   * logIn, with the same care for the last try.
   */
  async initPin(
    token: TokenInfo,
    soPin: Secret,
    pin: Secret,
    options: { lastTry?: boolean | undefined } = {},
  ): Promise<void> {
    if (token.flags & TokenFlag.userPinInitialized) {
      throw new PqblkError('exists', `the token "${token.label}" has a user PIN already`, {
        path: this.#place.module,
      });
    }
    requireTries(token, SECURITY_OFFICER, { module: this.#place.module, ...options });
    await this.#open(token, true);
    await this.#login(true, soPin);
    await this.#process.request(new MessageWriter(Operation.initPin).bytes(pin), () => {});
  }

  /** The keys of the KEMs that the profile knows; of one label and id if the URI says so. */
  async keys(uri: TokenUri = {}): Promise<TokenEntry[]> {
    const keys: TokenEntry[] = [];
    for (const keyType of new Set([...this.#place.profile.kems.values()].map((k) => k.keyType))) {
      const criteria = [
        ulong(Attribute.class, ObjectClass.privateKey),
        ulong(Attribute.keyType, keyType),
        ...(uri.object === undefined ? [] : [text(Attribute.label, uri.object)]),
        ...(uri.id === undefined ? [] : [{ type: Attribute.id, value: uri.id }]),
      ];
      for (const handle of await this.#find(criteria)) {
        const key = await this.#describe(handle, keyType);
        if (key) keys.push(key);
      }
    }
    return keys;
  }

  /** The one key a URI means. Kinds `no_key`, `ambiguous`, `bad_key`. */
  async key(uri: TokenUri): Promise<TokenKey> {
    const [key, ...others] = await this.keys(uri);
    const path = this.#place.module;
    if (!key) {
      throw new PqblkError('no_key', `${formatTokenUri(uri)}: no such key on the token`, {
        path,
        hint: '`pqblk token list` shows the keys that are there',
      });
    }
    if (others.length === 0) return requireWhole(key);
    const ids = [key, ...others].map(({ id }) => `id=${toHex(id).replace(/../g, '%$&')}`);
    throw new PqblkError('ambiguous', `${formatTokenUri(uri)} names ${ids.length} keys`, {
      path,
      hint: `say which: ${ids.join(' or ')}`,
    });
  }

  /**
   * A new key pair that stays on the token, once `prove` was content with it; otherwise it is
   * destroyed again. The session must be read-write. Kinds `exists` (the id), `token_mistrusted`.
   */
  async generate(
    kem: KemId,
    label: string,
    prove: (key: TokenKey) => Promise<void>,
    id: Uint8Array = randomBytes(ID_BYTES),
  ): Promise<TokenKey> {
    const numbers = this.#numbers(kem);
    if ((await this.keys({ id })).length > 0) {
      throw new PqblkError('exists', `a key of id ${toHex(id)} is on the token already`, {
        path: this.#place.module,
      });
    }
    const common: Partial<Record<Field, AttributeValue>> = {
      keyType: ulong(Attribute.keyType, numbers.keyType),
      token: flag(Attribute.token, true),
      label: text(Attribute.label, label),
      id: { type: Attribute.id, value: id },
    };
    const { parameterSet } = numbers;
    const publicKey = this.#template('publicKey', {
      class: ulong(Attribute.class, ObjectClass.publicKey),
      ...common,
      private: flag(Attribute.private, false),
      use: flag(USE[this.#place.profile.style].publicKey, true),
      ...(parameterSet !== undefined && {
        parameterSet: ulong(Attribute.parameterSet, parameterSet),
      }),
    });
    const privateKey = this.#template('privateKey', {
      class: ulong(Attribute.class, ObjectClass.privateKey),
      ...common,
      private: flag(Attribute.private, true),
      sensitive: flag(Attribute.sensitive, true),
      extractable: flag(Attribute.extractable, false),
      use: flag(USE[this.#place.profile.style].privateKey, true),
    });
    const message = new MessageWriter(Operation.generate)
      .u64(numbers.generate)
      .attributes(publicKey)
      .attributes(privateKey);
    const made = await this.#process.request(message, (reply) => [reply.u64(), reply.u64()]);
    try {
      const key = await this.#made(kem, id);
      await prove(key);
      return key;
    } catch (error) {
      for (const handle of made) await this.destroy(handle).catch(() => {});
      throw error;
    }
  }

  async #made(kem: KemId, id: Uint8Array): Promise<TokenKey> {
    const key = await this.key({ id });
    if (key.kem !== kem) {
      const [wanted, got] = [kemParameters(kem).name, kemParameters(key.kem).name];
      throw mistrust(`was asked for a key of ${wanted} and made one of ${got}`, this.#place);
    }
    if (!key.confined) {
      throw mistrust('made a private key that it would let out', this.#place);
    }
    return key;
  }

  /** The shared secret in a ciphertext, for the caller to wipe. */
  async decapsulate(key: TokenKey, ciphertext: Uint8Array): Promise<Secret> {
    const secret = this.#template('secret', {
      class: ulong(Attribute.class, ObjectClass.secretKey),
      keyType: ulong(Attribute.keyType, GENERIC_SECRET),
      token: flag(Attribute.token, false),
      sensitive: flag(Attribute.sensitive, false),
      extractable: flag(Attribute.extractable, true),
      valueLength: ulong(Attribute.valueLength, SHARED_SECRET_BYTES),
    });
    // Node copies what it reads on its way to us, and frees the copies as they are: they hold the
    // secret under a mask that only the two ends know.
    using mask = Secret.random(MASK_BYTES);
    const message = new MessageWriter(Operation.decapsulate)
      .u64(this.#numbers(key.kem).decapsulate)
      .u64(key.handle)
      .bytes(ciphertext)
      .bytes(mask)
      .attributes(secret);
    const shared = await this.#process.request(message, (reply) => unmasked(reply.bytes(), mask));
    if (shared.length === SHARED_SECRET_BYTES) return shared;
    const found = shared.length;
    shared.wipe();
    throw mistrust(
      `returned a shared secret of ${found} bytes, expected ${SHARED_SECRET_BYTES}`,
      this.#place,
    );
  }

  /** Puts an object onto the token; used with vectors, for tokens that take private keys. */
  async create(attributes: readonly AttributeValue[]): Promise<bigint> {
    const message = new MessageWriter(Operation.create).attributes(attributes);
    return await this.#process.request(message, (reply) => reply.u64());
  }

  async destroy(handle: bigint): Promise<void> {
    await this.#process.request(new MessageWriter(Operation.destroy).u64(handle), () => {});
  }

  /** Ends session and process. Does not wait. */
  end(): void {
    this.#process.end();
  }

  [Symbol.dispose](): void {
    this.end();
  }

  #numbers(kem: KemId): ProfileKem {
    const { profile, module } = this.#place;
    const numbers = profile.kems.get(kem);
    if (numbers) return numbers;
    throw new PqblkError(
      'unsupported',
      `the profile "${profile.name}" has no ${kemParameters(kem).name}`,
      { path: module },
    );
  }

  #template(
    which: keyof Profile['omit'],
    fields: Partial<Record<Field, AttributeValue>>,
  ): AttributeValue[] {
    const left: readonly string[] = this.#place.profile.omit[which];
    return Object.entries(fields)
      .filter(([field]) => !left.includes(field))
      .map(([, attribute]) => attribute);
  }

  #open(token: TokenInfo, readWrite: boolean): Promise<void> {
    const message = new MessageWriter(Operation.open).u64(token.slotId).u8(readWrite);
    return this.#process.request(message, () => {});
  }

  #login(securityOfficer: boolean, pin: Secret | undefined): Promise<void> {
    const message = new MessageWriter(Operation.login).u8(securityOfficer).u8(pin !== undefined);
    message.bytes(pin ?? new Uint8Array());
    return this.#process.request(message, () => {});
  }

  async #find(criteria: readonly AttributeValue[]): Promise<bigint[]> {
    const message = new MessageWriter(Operation.find).attributes(criteria);
    return await this.#process.request(message, readHandles);
  }

  /** Undefined when the key is of a parameter set that nobody asked for. */
  async #describe(handle: bigint, keyType: number): Promise<TokenEntry | undefined> {
    const got = await this.#attributes(handle, [
      Attribute.label,
      Attribute.id,
      Attribute.parameterSet,
      Attribute.sensitive,
      Attribute.extractable,
    ]);
    const [label, id = new Uint8Array(), parameterSet, sensitive, extractable] = got;
    const kem = this.#kemOf(keyType, parameterSet);
    if (kem === undefined) return undefined;
    const name = label === undefined ? '' : new TextDecoder().decode(label);
    return {
      handle,
      kem,
      label: name,
      id,
      publicHalf: await this.#publicHalf(kem, keyType, name, id).catch(unlessTokenFailed),
      confined: sensitive?.[0] === 1 && extractable?.[0] === 0,
    };
  }

  #kemOf(keyType: number, parameterSet: Uint8Array | undefined): KemId | undefined {
    const found = parameterSet === undefined ? undefined : numberOf(parameterSet);
    for (const [kem, numbers] of this.#place.profile.kems) {
      if (numbers.keyType !== keyType) continue;
      if (numbers.parameterSet === undefined || numbers.parameterSet === found) return kem;
    }
    return undefined;
  }

  /** The public key with the same id; where there are no ids, with the same label. */
  async #publicHalf(kem: KemId, keyType: number, label: string, id: Uint8Array) {
    const criteria = [
      ulong(Attribute.class, ObjectClass.publicKey),
      ulong(Attribute.keyType, keyType),
      id.length > 0 ? { type: Attribute.id, value: id } : text(Attribute.label, label),
    ];
    const values: Uint8Array[] = [];
    for (const handle of await this.#find(criteria)) {
      const [value] = await this.#attributes(handle, [Attribute.value]);
      const same = values.some((other) => value !== undefined && equalConstantTime(other, value));
      if (value !== undefined && !same) values.push(value);
    }
    const [value, another] = values;
    const path = this.#place.module;
    if (!value) {
      throw new PqblkError('no_key', `the public half of key "${label}" is not on the token`, {
        path,
        hint: 'pqblk finds it by the id that both halves share',
      });
    }
    if (another) {
      throw new PqblkError('ambiguous', `several public keys go with key "${label}"`, { path });
    }
    checkEncapsulationKey(kem, value);
    return value;
  }

  async #attributes(handle: bigint, types: readonly number[]) {
    const message = new MessageWriter(Operation.getAttributes).u64(handle).u32(types.length);
    for (const type of types) message.u64(type);
    return await this.#process.request(message, (reply) =>
      types.map(() => (reply.u8() === 1 ? reply.copy() : undefined)),
    );
  }
}

function requireWhole({ publicHalf, ...key }: TokenEntry): TokenKey {
  if (publicHalf instanceof PqblkError) throw publicHalf;
  return { ...key, encapsulationKey: publicHalf };
}

/** What is wrong with one key is shown beside it; what is wrong with the token ends everything. */
function unlessTokenFailed(error: unknown): PqblkError {
  const aboutKey = ['no_key', 'ambiguous', 'bad_key'];
  if (error instanceof PqblkError && aboutKey.includes(error.kind)) return error;
  throw error;
}

function unmasked(bytes: Uint8Array, mask: Secret): Secret {
  const secret = Secret.copyOf(bytes);
  secret.use((own) => mask.use((other) => xorInto(own, other)));
  return secret;
}

function xorInto(bytes: Uint8Array, other: Uint8Array): void {
  for (let at = 0; at < bytes.length; at += 1) bytes[at] = (bytes[at] ?? 0) ^ (other[at] ?? 0);
}

/** What lets a key be used, by call style. Vendors take CKA_DERIVE for both halves. */
const USE = {
  encapsulate: { publicKey: Attribute.encapsulate, privateKey: Attribute.decapsulate },
  derive: { publicKey: Attribute.derive, privateKey: Attribute.derive },
  decrypt: { publicKey: Attribute.encrypt, privateKey: Attribute.decrypt },
} as const;

function ulong(type: number, value: number): AttributeValue {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(value), true);
  return { type, value: bytes };
}

function numberOf(bytes: Uint8Array): number | undefined {
  if (bytes.length !== 8) return undefined;
  return Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
}

function flag(type: number, value: boolean): AttributeValue {
  return { type, value: Uint8Array.of(value ? 1 : 0) };
}

function text(type: number, value: string): AttributeValue {
  return { type, value: new TextEncoder().encode(value) };
}
