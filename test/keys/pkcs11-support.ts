// Shared by the tests of tokens: NSS's softokn, set up afresh for each test file, and the module of
// our own (test/pkcs11-module) that misbehaves on request.
import { existsSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll } from 'vitest';
import {
  type KemId,
  loadProfile,
  type ModulePlace,
  openTokenKey,
  PROFILES,
  parseProfile,
  proveKey,
  type TokenKey,
  TokenModule,
  type TokenUri,
} from '../../src/keys/index.js';
import { secretOf } from './support.js';

export const NSS_MODULE = fileURLToPath(
  new URL('../../build/nss/current/libsoftokn3.so', import.meta.url),
);
export const PIN = 'correct-horse-7';

/** False, with a loud line, where scripts/fetch-nss did not run. In CI that is an error. */
export function haveNss(): boolean {
  if (existsSync(NSS_MODULE)) return true;
  if (process.env.CI) throw new Error(`${NSS_MODULE} is missing: scripts/fetch-nss failed`);
  console.warn('SKIP: no NSS softokn (scripts/fetch-nss); the tests of a real token did not run');
  return false;
}

export interface NssToken {
  readonly place: ModulePlace;
  readonly uri: TokenUri;
  readonly directory: string;
  readonly pinFile: string;
}

export const NSS_TOKEN = 'NSS Certificate DB';

const made: string[] = [];
afterAll(async () => {
  for (const directory of made) await rm(directory, { recursive: true, force: true });
});

/** A token with its user PIN set, in a directory that goes after the file's tests. */
export async function freshNss(): Promise<NssToken> {
  const directory = await mkdtemp(join(tmpdir(), 'pqblk-nss-'));
  made.push(directory);
  const place = { module: NSS_MODULE, profile: await loadProfile('nss'), directory };
  const pinFile = join(directory, 'pin');
  await writeFile(pinFile, `${PIN}\n`, { mode: 0o600 });
  const uri = { token: NSS_TOKEN };
  using module = await TokenModule.load(place);
  await module.initPin(await module.find(uri), secretOf(''), secretOf(PIN));
  return { place, uri, directory, pinFile };
}

const TEST_MODULE = fileURLToPath(
  new URL('../../build/release/tests/libpqblk_test_token.so', import.meta.url),
);

export type TestStyle = 'quac100' | 'decrypt' | 'pkcs11-3.2';

/** A token of our own: real ML-KEM, three dialects, and whatever `misbehave` asks for. */
export class TestToken {
  readonly directory = mkdtempSync(join(tmpdir(), 'pqblk-token-'));
  readonly uri: TokenUri = { token: 'Test token' };
  /** The module keeps what it keeps beside the path that it was loaded from. */
  readonly module = join(this.directory, 'module.so');

  constructor() {
    if (!existsSync(TEST_MODULE)) {
      throw new Error(
        `${TEST_MODULE} is missing; \`node scripts/test.mjs --only vitest\` builds it`,
      );
    }
    symlinkSync(TEST_MODULE, this.module);
    afterAll(() => rmSync(this.directory, { recursive: true, force: true }));
  }

  place(style: TestStyle = 'quac100', changes: object = {}): ModulePlace {
    const document =
      style === 'decrypt' ? { ...PROFILES.quac100, style: 'decrypt' } : PROFILES[style];
    return { module: this.module, profile: parseProfile({ ...document, ...changes }) };
  }

  misbehave(mode: string): void {
    writeFileSync(join(this.directory, 'mode'), mode);
  }

  async init(): Promise<void> {
    using module = await TokenModule.load(this.place());
    await module.initPin(await module.find(this.uri), secretOf('so'), secretOf(PIN));
  }

  async opened(style: TestStyle = 'quac100', changes: object = {}): Promise<TokenModule> {
    const module = await TokenModule.load(this.place(style, changes));
    await module.logIn(await module.find(this.uri), secretOf(PIN), { readWrite: true });
    return module;
  }

  async generate(kem: KemId, label: string, style: TestStyle = 'quac100'): Promise<TokenKey> {
    using module = await this.opened(style);
    return await module.generate(kem, label, (key) => proveKey(module, key));
  }

  /** What every command that opens a disk does. */
  async unlock(key: TokenKey, place = this.place(), pin = PIN): Promise<void> {
    const uri = { ...this.uri, id: key.id };
    using _ = await openTokenKey(place, uri, key.encapsulationKey, secretOf(pin));
  }
}
