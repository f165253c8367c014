// Room cli/: options that name a token and its module, and making or taking in keys that live there.
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { PqblkError } from '../errors.js';
import {
  fingerprintOf,
  type KemId,
  type KeyInfo,
  type KeyStore,
  kemParameters,
  kemsOf,
  loadProfile,
  type ModulePlace,
  parseTokenUri,
  proveKey,
  type TokenInfo,
  type TokenKey,
  TokenModule,
  type TokenUri,
  toHex,
  uriOf,
} from '../keys/index.js';
import { type PassphraseFlags, readPin } from './options.js';

export interface TokenFlags extends PassphraseFlags {
  token?: string;
  module?: string;
  profile?: string;
  tokenDir?: string;
}

const DEFAULT_PROFILE = 'pkcs11-3.2';

export function addTokenOptions(command: Command): Command {
  return command
    .option('--token <uri>', 'the token, and which key on it: pkcs11:token=…;object=…;id=…')
    .option('--module <path>', "the token's PKCS#11 module (default: module-path of the URI)")
    .option('--profile <name|path>', `how the token speaks (default: ${DEFAULT_PROFILE})`)
    .option('--token-dir <dir>', 'where a token in software keeps its files (profile nss)');
}

/** Kind `usage`: an option that means something with --token only. */
export function requireTokenFlags(flags: TokenFlags): void {
  if (flags.token !== undefined) return;
  const wrong = (['module', 'profile', 'tokenDir'] as const).find((name) => flags[name]);
  if (!wrong) return;
  const option = wrong === 'tokenDir' ? 'token-dir' : wrong;
  throw new PqblkError('usage', `--${option} means something with --token only`);
}

/** A module as options and URI name it, and how its key file will. */
export interface NamedModule {
  readonly place: ModulePlace;
  /** Name of a shipped profile, or an absolute path. */
  readonly profile: string;
  readonly uri: TokenUri;
}

/** Options win over the URI. Kinds `bad_uri`, `bad_profile`, `usage`. */
export async function namedModule(flags: TokenFlags): Promise<NamedModule> {
  const uri = flags.token === undefined ? {} : parseTokenUri(flags.token);
  const module = flags.module ?? uri.modulePath;
  if (module === undefined) {
    throw new PqblkError('usage', 'which PKCS#11 module? none was named', {
      hint: 'name it with --module, or module-path in the URI',
    });
  }
  const named = flags.profile ?? uri.profile ?? DEFAULT_PROFILE;
  const profile = named.includes('/') ? resolve(named) : named;
  const directory = flags.tokenDir ?? uri.directory;
  const place = {
    module: resolve(module),
    profile: await loadProfile(profile),
    directory: directory === undefined ? undefined : resolve(directory),
  };
  return { place, profile, uri };
}

/** Finds the token and logs in, with a PIN only where it asks for one. */
export async function logIn(
  module: TokenModule,
  uri: TokenUri,
  flags: TokenFlags,
  options: { readWrite?: boolean; lastTry?: boolean | undefined } = {},
): Promise<TokenInfo> {
  const token = await module.find(uri);
  if (token.login !== 'pin') {
    await module.logIn(token, undefined, options);
    return token;
  }
  using pin = await readPin(flags, uri.pinFile, `PIN of token "${token.label}"`);
  await module.logIn(token, pin, options);
  return token;
}

/** A new key on a token, proved there, and its entry in the store. */
export async function generateOnToken(
  store: KeyStore,
  name: string,
  kem: KemId,
  flags: TokenFlags,
): Promise<KeyInfo> {
  await store.requireFree(name);
  const named = await namedModule(flags);
  requireKem(named.place, kem); // before anybody types a PIN
  using module = await TokenModule.load(named.place);
  const { object, id, ...where } = named.uri;
  const token = await logIn(module, where, flags, { readWrite: true });
  let info: KeyInfo | undefined;
  // The entry is made while the key can still be taken back: none is left that nobody knows.
  const keep = async (key: TokenKey) => {
    await proveKey(module, key);
    info = await addToStore(store, name, named, token, key);
  };
  await module.generate(kem, object ?? name, keep, ...(id ? [id] : []));
  if (!info) throw new PqblkError('general', 'the key was not kept');
  return info;
}

function requireKem({ profile }: ModulePlace, kem: KemId): void {
  if (profile.kems.has(kem)) return;
  throw new PqblkError(
    'unsupported',
    `tokens of profile "${profile.name}" have no ${kemParameters(kem).name}, but ${kemsOf(profile)}`,
  );
}

/** A key that is on a token already, proved there, as an entry of the store. */
export async function importFromToken(
  store: KeyStore,
  name: string | undefined,
  flags: TokenFlags,
): Promise<{ info: KeyInfo; confined: boolean }> {
  const named = await namedModule(flags);
  using module = await TokenModule.load(named.place);
  const token = await logIn(module, named.uri, flags);
  const key = await module.key(named.uri);
  await proveKey(module, key);
  const chosen =
    name ?? named.uri.object ?? toHex(fingerprintOf(key.encapsulationKey)).slice(0, 16);
  const info = await addToStore(store, chosen, named, token, key);
  return { info, confined: key.confined };
}

function addToStore(
  store: KeyStore,
  name: string,
  { place, profile, uri }: NamedModule,
  token: TokenInfo,
  key: TokenKey,
): Promise<KeyInfo> {
  // Of a PIN file only the URI's is remembered: an option is said each time.
  const { pinFile } = uri;
  return store.addToken(name, key.kem, key.encapsulationKey, {
    protection: 'token',
    uri: uriOf(token, key),
    module: place.module,
    profile,
    directory: place.directory,
    pinFile,
    login: token.login,
  });
}
