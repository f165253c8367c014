// What is left of a sealed disk's secrets in a process that has closed it: nothing. The whole memory of a
// child is searched for keys that the second reader has found out. While the disk is open its data key
// is there, which shows that the search finds what it looks for.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { createDisk, KeyStore, type Secret } from '../../src/index.js';
import { openPrivate, parseKeyFile } from '../../src/keys/key-file.js';
import { CHEAP, secretOf } from '../keys/support.js';
import { openBlob, openVmk } from '../reader/key-area.js';
import { openWithPrivateKey } from '../reader/reader.js';
import { DIST, scratch } from './support.js';

const HOLDS = fileURLToPath(new URL('./child/holds.mjs', import.meta.url));
const PIECE = 4 * 2 ** 20;
const dir = scratch();
const at = (name: string) => join(dir, name);

/** Which of the secrets stand in the writable memory of a process. */
function findIn(pid: number, secrets: Readonly<Record<string, Uint8Array>>): string[] {
  const memory = openSync(`/proc/${pid}/mem`, 'r');
  const longest = Math.max(...Object.values(secrets).map((secret) => secret.length));
  const piece = Buffer.alloc(PIECE + longest);
  const found = new Set<string>();
  for (const line of readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n')) {
    const [, from, to] = /^([0-9a-f]+)-([0-9a-f]+) rw/.exec(line) ?? [];
    if (from === undefined || to === undefined) continue;
    const end = Number.parseInt(to, 16);
    for (let begin = Number.parseInt(from, 16); begin < end; begin += PIECE) {
      const bytes = piece.subarray(0, readAt(memory, piece, begin, end));
      for (const [name, secret] of Object.entries(secrets)) {
        if (bytes.indexOf(secret) >= 0) found.add(name);
      }
    }
  }
  closeSync(memory);
  return [...found].sort();
}

/** Regions that cannot be read (guard pages, devices) hold nothing of ours. */
function readAt(fd: number, into: Buffer, begin: number, end: number): number {
  try {
    return readSync(fd, into, 0, Math.min(into.length, end - begin), begin);
  } catch {
    return 0;
  }
}

test('a process that closed a sealed disk holds no secret of it', async () => {
  const store = new KeyStore(at('keys'));
  writeFileSync(at('passphrase'), 'correct horse\n', { mode: 0o600 });
  await store.generate('alice', { passphrase: secretOf('correct horse'), cost: CHEAP });
  const path = at('disk.sealed');
  const recipients = [await store.recipient('alice')];
  await createDisk(path, { format: 'sealed', size: 2 ** 24, recipients });
  const key = parseKeyFile(readFileSync(at('keys/alice.key'), 'utf8'));
  using privateKey: Secret = await openPrivate(key, secretOf('correct horse'));
  const secretKey = privateKey.use((bytes) => Uint8Array.from(bytes));
  const image = openWithPrivateKey(path, secretKey);
  const { integrityKey, dataKeys } = openBlob(image.keyArea.blob, image.header.uuid, secretKey);
  const { vmk, sharedSecret } = openVmk(image.keyArea.blob, image.header.uuid, secretKey);
  image.close();
  const secrets = {
    'data key': dataKeys.get(1) as Uint8Array,
    'integrity key': integrityKey,
    'master key': vmk,
    'private key': secretKey.subarray(0, 64),
    'shared secret': sharedSecret,
  };

  const child = spawn(process.execPath, [HOLDS, DIST, path, at('keys'), at('passphrase')], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  const said = async () => String(((await once(child.stdout, 'data')) as [Buffer])[0]).trim();
  expect(await said()).toBe('open');
  expect(findIn(child.pid as number, secrets)).toContain('data key');
  child.stdin.write('\n');
  expect(await said()).toBe('closed');
  expect(findIn(child.pid as number, secrets)).toEqual([]);
  child.stdin.write('\n');
  await once(child, 'exit');
});
