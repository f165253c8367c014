// What an unlock through a token leaves in this process: neither the PIN nor a shared secret. The
// whole memory is searched, by a masked copy, so that the search does not find itself.
import { spawnSync } from 'node:child_process';
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Kem, openTokenKey, proveKey, readPassphrase, TokenModule } from '../../src/keys/index.js';
import { TestToken } from './pkcs11-support.js';
import { secretOf } from './support.js';

const MASK = 0x5a;
const PIECE = 2 ** 20;

/** How often the unmasked bytes stand in the writable memory of this process. */
function found(masked: Uint8Array): number {
  const memory = openSync('/proc/self/mem', 'r');
  const piece = Buffer.alloc(PIECE + masked.length - 1);
  let count = 0;
  try {
    for (const line of readFileSync('/proc/self/maps', 'utf8').split('\n')) {
      const [, from, to] = /^([0-9a-f]+)-([0-9a-f]+) rw/.exec(line) ?? [];
      if (from === undefined || to === undefined) continue;
      const end = Number.parseInt(to, 16);
      for (let at = Number.parseInt(from, 16); at < end; at += PIECE) {
        count += countIn(piece.subarray(0, readAt(memory, piece, at, end)), masked);
        piece.fill(0);
      }
    }
  } finally {
    closeSync(memory);
  }
  return count;
}

/** Regions that cannot be read (guard pages, devices) hold nothing of ours. */
function readAt(fd: number, into: Buffer, at: number, end: number): number {
  try {
    return readSync(fd, into, 0, Math.min(into.length, end - at), at);
  } catch {
    return 0;
  }
}

function countIn(bytes: Buffer, masked: Uint8Array): number {
  const first = (masked[0] ?? 0) ^ MASK;
  let count = 0;
  for (let at = bytes.indexOf(first); at >= 0; at = bytes.indexOf(first, at + 1)) {
    if (masked.every((byte, index) => bytes[at + index] === (byte ^ MASK))) count += 1;
  }
  return count;
}

/** A PIN that this process has never seen: in `pin`, and masked in `masked`. */
function makePin(directory: string): Uint8Array {
  const script = `
    const { randomBytes } = require('node:crypto');
    const { writeFileSync } = require('node:fs');
    const pin = Buffer.from(randomBytes(18).toString('base64'));
    writeFileSync('pin', pin);
    writeFileSync('masked', pin.map((byte) => byte ^ ${MASK}));`;
  const { status } = spawnSync(process.execPath, ['-e', script], { cwd: directory });
  expect(status).toBe(0);
  return Uint8Array.from(readFileSync(join(directory, 'masked')));
}

test('neither PIN nor shared secret is left after an unlock', async () => {
  const token = new TestToken();
  const masked = makePin(token.directory);
  const readPin = () => readPassphrase({ from: 'file', path: join(token.directory, 'pin') }, 'PIN');
  const init = await TokenModule.load(token.place());
  {
    using pin = await readPin();
    // The search can fail: while a PIN is held, it is found.
    expect(found(masked)).toBeGreaterThan(0);
    await init.initPin(await init.find(token.uri), secretOf('so'), pin);
  }
  init.end();
  const module = await TokenModule.load(token.place());
  {
    using pin = await readPin();
    await module.logIn(await module.find(token.uri), pin, { readWrite: true });
  }
  const key = await module.generate(Kem.mlKem768, 'key', (made) => proveKey(module, made));
  module.end();

  const open = async () => {
    using pin = await readPin();
    return await openTokenKey(token.place(), token.uri, key.encapsulationKey, pin);
  };
  using identity = await open();
  expect(found(masked)).toBe(0);

  const { provider, privateKey } = identity;
  const sealed = await provider.encapsulate(Kem.mlKem768, key.encapsulationKey);
  const shared = await provider.decapsulate(privateKey, sealed.ciphertext);
  const maskedSecret = shared.use((bytes) => bytes.map((byte) => byte ^ MASK));
  expect(found(maskedSecret)).toBeGreaterThan(0);
  shared.wipe();
  sealed.sharedSecret.wipe();
  expect(found(maskedSecret)).toBe(0);
});
