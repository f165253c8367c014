// Shared by the tests of keys/: temporary directories, cheap scrypt, ready identities, vectors.
import { existsSync, readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll } from 'vitest';
import { PqblkError } from '../../src/errors.js';
import {
  fingerprintOf,
  type Identity,
  Kem,
  type KemId,
  liboqs,
  type Recipient,
  Secret,
  softwareIdentity,
} from '../../src/keys/index.js';

/** The smallest cost a key file may name: the tests are about files, not about scrypt. */
export const CHEAP = { N: 2 ** 14, r: 8, p: 1 };

export const secretOf = (text: string) => new Secret(new TextEncoder().encode(text));

export const hex = (text: string) => Uint8Array.from(Buffer.from(text, 'hex'));

const made: string[] = [];
afterAll(async () => {
  for (const path of made) await rm(path, { recursive: true, force: true });
});

export async function temporaryDirectory(): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'pqblk-keys-'));
  made.push(path);
  return path;
}

export interface Person {
  readonly recipient: Recipient;
  readonly identity: Identity;
}

export async function person(label: string, kem: KemId = Kem.mlKem768): Promise<Person> {
  const { encapsulationKey, privateKey } = await liboqs.generate(kem);
  if (privateKey.type !== 'software') throw new Error('not a software key');
  const fingerprint = fingerprintOf(encapsulationKey);
  return {
    recipient: { provider: liboqs, kem, encapsulationKey, label },
    identity: softwareIdentity(kem, privateKey.decapsulationKey, fingerprint),
  };
}

/** The PqblkError that `action` ends with; fails the test when there is none. */
export async function errorOf(action: () => unknown): Promise<PqblkError> {
  try {
    await action();
  } catch (error) {
    if (error instanceof PqblkError) return error;
    throw error;
  }
  throw new Error('expected a PqblkError, and nothing was thrown');
}

const vectorFolder = fileURLToPath(new URL('../../../shared/vectors/', import.meta.url));

export interface VectorFile<Test> {
  numberOfTests: number;
  testGroups: { parameterSet?: string; tagSize?: number; tests: Test[] }[];
}

/** A file of test vectors, or undefined (with a loud line) where the folder does not exist. */
export function vectors<Test>(name: string): VectorFile<Test> | undefined {
  const path = join(vectorFolder, name);
  if (existsSync(path)) return JSON.parse(readFileSync(path, 'utf8')) as VectorFile<Test>;
  console.warn(`SKIPPED: ${name}: no vectors at ../shared/vectors; these tests did not run`);
  return undefined;
}
