// A minimal writer of the key area blob, from docs/keys.md, for the tests of the second reader.
//
// Its symmetric primitives are node:crypto's, where the reader's are noble's, so that the two check
// each other; ML-KEM is noble's in both.
import { createCipheriv, createHash, createHmac, randomBytes } from 'node:crypto';
import { ml_kem768, ml_kem1024 } from '@noble/post-quantum/ml-kem.js';

export const sha3 = (...parts: Uint8Array[]) => {
  const hash = createHash('sha3-256');
  for (const part of parts) hash.update(part);
  return hash.digest();
};

export const hmac = (key: Uint8Array, ...parts: (Uint8Array | string)[]) => {
  const mac = createHmac('sha3-256', key);
  for (const part of parts) mac.update(part);
  return mac.digest();
};

/** The first block of HKDF-Expand: all that 32 bytes need. */
const expandOne = (prk: Uint8Array, ...info: (Uint8Array | string)[]) =>
  hmac(prk, ...info, Uint8Array.of(1));

function seal(key: Uint8Array, nonce: Uint8Array, aad: Uint8Array, plain: Uint8Array) {
  const cipher = createCipheriv('aes-256-gcm', key, nonce).setAAD(aad);
  const ciphertext = Buffer.concat([cipher.update(plain), cipher.final()]);
  return { ciphertext, tag: cipher.getAuthTag() };
}

const lp = (bytes: Uint8Array) => {
  const out = Buffer.alloc(4 + bytes.length);
  out.writeUInt32LE(bytes.length);
  out.set(bytes, 4);
  return out;
};

export interface BlobOptions {
  readonly uuid: Uint8Array;
  readonly integrityKey: Uint8Array;
  readonly dataKeys: ReadonlyMap<number, Uint8Array>;
  readonly recipients: readonly Uint8Array[];
}

export function buildKeyBlob({ uuid, integrityKey, dataKeys, recipients }: BlobOptions): Buffer {
  const blob = Buffer.alloc(65_536);
  const vmk = randomBytes(32);
  const epochs = [...dataKeys.keys()].sort((a, b) => a - b);
  blob.write('PQBLKKEY', 0, 'latin1');
  blob.writeUInt16LE(1, 8);
  blob.writeUInt16LE(1, 10);
  blob.writeUInt16LE(recipients.length, 12);
  blob.writeUInt16LE(40 * (1 + epochs.length), 14);
  blob.writeBigUInt64LE(1n, 16);
  blob.set(uuid, 24);
  blob.writeUInt32LE(epochs[0] ?? 0, 40);
  blob.writeUInt16LE(1, 48);
  blob.writeUInt16LE(1, 50);
  recipients.forEach((ek, index) => {
    blob.set(buildSlot(uuid, vmk, ek), 4096 * (1 + index));
  });
  const table = Buffer.alloc(40 * (1 + epochs.length));
  table.set(integrityKey, 0);
  table.writeUInt32LE(epochs.length, 32);
  epochs.forEach((epoch, index) => {
    table.writeUInt32LE(epoch, 40 * (1 + index));
    table.set(dataKeys.get(epoch) ?? Buffer.alloc(0), 40 * (1 + index) + 8);
  });
  const prk = hmac(sha3(Buffer.from('pqblk/v1 vmk')), vmk);
  const nonce = randomBytes(12);
  const wrap = expandOne(prk, 'pqblk/v1 wrap', lp(uuid));
  const sealed = seal(wrap, nonce, blob.subarray(0, 128), table);
  blob.set(nonce, 128);
  blob.set(sealed.tag, 140);
  blob.set(sealed.ciphertext, 160);
  const macKey = expandOne(prk, 'pqblk/v1 key area mac', lp(uuid));
  blob.set(hmac(macKey, blob.subarray(0, 4096 * (1 + recipients.length))), 4064);
  return blob;
}

function buildSlot(uuid: Uint8Array, vmk: Uint8Array, ek: Uint8Array): Buffer {
  const wide = ek.length === 1568;
  const { cipherText, sharedSecret } = (wide ? ml_kem1024 : ml_kem768).encapsulate(ek);
  const slot = Buffer.alloc(4096);
  slot.write('PQSL', 0, 'latin1');
  slot.writeUInt16LE(1, 4);
  slot[6] = 1; // active
  slot[7] = 1; // primary
  slot[8] = 1; // software
  slot.writeUInt16LE(wide ? 2 : 1, 10);
  slot.writeUInt16LE(1, 12);
  slot.writeUInt16LE(1, 14);
  slot.set(randomBytes(16), 16);
  slot.writeBigUInt64LE(1_700_000_000n, 32);
  slot.writeUInt16LE(5, 48);
  slot.write('laptop'.slice(0, 5), 64, 'latin1');
  slot.writeUInt16LE(ek.length, 52);
  slot.writeUInt16LE(cipherText.length, 54);
  slot.set(ek, 512);
  slot.set(cipherText, 2112);
  const numbers = slot.subarray(10, 16);
  const prk = hmac(sha3(Buffer.from('pqblk/v1'), numbers), sharedSecret);
  const context = [lp(uuid), lp(slot.subarray(16, 32)), lp(sha3(ek)), lp(sha3(cipherText))];
  slot.set(expandOne(prk, 'pqblk/v1 commit', ...context), 4004);
  slot.set(randomBytes(12), 4036);
  const kek = expandOne(prk, 'pqblk/v1 kek', ...context);
  const sealed = seal(kek, slot.subarray(4036, 4048), slot.subarray(0, 4036), vmk);
  slot.set(sealed.ciphertext, 4048);
  slot.set(sealed.tag, 4080);
  return slot;
}
