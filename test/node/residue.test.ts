// What is left of a sealed disk's secrets in a process that has closed it: nothing. The whole memory of a
// child is searched for keys that the second reader has found out. While the disk is open its data key
// is there, which shows that the search finds what it looks for.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { createDisk, KeyStore, Secret } from '../../src/index.js';
import {
  encodeRecoveryCode,
  Kem,
  newRecoverySecret,
  recoveryRecipient,
} from '../../src/keys/index.js';
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
  const key = parseKeyFile(new Secret(readFileSync(at('keys/alice.key'))));
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

/** Starts the child with these arguments; what it holds while the disk is open. */
async function heldWhileOpen(secrets: Readonly<Record<string, Uint8Array>>, ...argv: string[]) {
  const child = spawn(process.execPath, [HOLDS, DIST, ...argv], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  expect(String(((await once(child.stdout, 'data')) as [Buffer])[0]).trim()).toBe('open');
  const found = findIn(child.pid as number, secrets);
  child.kill('SIGKILL');
  await once(child, 'exit');
  return found;
}

/** Stretches of bytes, as text would hold them, too. */
const pieces = (name: string, bytes: Uint8Array, at_ = [100, 800, 1400]) =>
  Object.fromEntries(at_.map((from) => [`${name} ${from}`, bytes.slice(from, from + 32)]));

test('a process that has a disk open holds nothing of a key without a passphrase', async () => {
  const store = new KeyStore(at('open-keys'));
  await store.generate('alice', { noPassphrase: true });
  const path = at('open.sealed');
  const recipients = [await store.recipient('alice')];
  await createDisk(path, { format: 'sealed', size: 2 ** 24, recipients });
  const file = readFileSync(at('open-keys/alice.key'));
  const { private: part } = JSON.parse(file.toString()) as {
    private: { decapsulationKey: string };
  };
  using key = await openPrivate(parseKeyFile(new Secret(file)), undefined);
  const image = openWithPrivateKey(
    path,
    key.use((bytes) => Uint8Array.from(bytes)),
  );
  const { dataKeys } = openBlob(
    image.keyArea.blob,
    image.header.uuid,
    key.use((bytes) => Uint8Array.from(bytes)),
  );
  image.close();
  const secrets = {
    'data key': dataKeys.get(1) as Uint8Array,
    ...key.use((bytes) => pieces('raw', bytes, [100, 800, 2368])), // the public half lies between
    ...pieces('base64', Buffer.from(part.decapsulationKey)),
  };
  expect(await heldWhileOpen(secrets, path, at('open-keys'), '-')).toEqual(['data key']);
});

test('nor of a recovery code that was typed', async () => {
  using secret = newRecoverySecret();
  const path = at('code.sealed');
  const recipients = [await recoveryRecipient(secret, Kem.mlKem768, 'paper')];
  await createDisk(path, { format: 'sealed', size: 2 ** 24, recipients });
  const lines = encodeRecoveryCode(secret);
  const plain = lines.join('').replaceAll(' ', '');
  writeFileSync(at('typed'), plain.match(/.{4}/g)?.join('-') ?? '');
  const text = (name: string, value: string) =>
    Object.fromEntries(
      [16, 40].map((from) => [`${name} ${from}`, Buffer.from(value.slice(from, from + 20))]),
    );
  const values = Uint8Array.from(plain, (symbol) =>
    '0123456789ABCDEFGHJKMNPQRSTVWXYZ'.indexOf(symbol),
  );
  const secrets = {
    ...text('code', plain),
    ...text('typed', readFileSync(at('typed'), 'utf8')),
    values: values.slice(8, 40),
    bytes: secret.use((bytes) => Uint8Array.from(bytes)),
  };
  expect(await heldWhileOpen(secrets, path, at('open-keys'), '-', at('typed'))).toEqual([]);
});
