// Shared by the tests of tokens: NSS's softokn, set up afresh for each test file.
import { existsSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll } from 'vitest';
import { loadProfile, type ModulePlace, TokenModule, type TokenUri } from '../../src/keys/index.js';
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

/** A token with its user PIN set, in a directory that goes after the file's tests. */
export async function freshNss(): Promise<NssToken> {
  const directory = await mkdtemp(join(tmpdir(), 'pqblk-nss-'));
  afterAll(() => rm(directory, { recursive: true, force: true }));
  const place = { module: NSS_MODULE, profile: await loadProfile('nss'), directory };
  const pinFile = join(directory, 'pin');
  await writeFile(pinFile, `${PIN}\n`, { mode: 0o600 });
  const uri = { token: NSS_TOKEN };
  using module = await TokenModule.load(place);
  await module.initPin(await module.find(uri), secretOf(''), secretOf(PIN));
  return { place, uri, directory, pinFile };
}
