// Where a guest sector's ciphertext lies in a sealed image that was closed cleanly (docs/format.md
// section 4): what an attacker with the file can find out, and all the demo needs to aim at one byte.
import { closeSync, openSync, readSync, writeSync } from 'node:fs';

const OFFSET_MASK = 0x00fffffffffffe00n;

/** Host offset of the data of the guest byte `guest`; undefined when nothing is mapped there. */
export function hostOffsetOf(image, guest) {
  const file = openSync(image, 'r');
  const u64 = (at) => {
    const bytes = Buffer.alloc(8);
    readSync(file, bytes, 0, 8, at);
    return bytes.readBigUInt64BE();
  };
  try {
    const clusterBits = Number(u64(16) & 0xffffffffn); // the 32 bits at 20
    const clusterBytes = 2 ** clusterBits;
    const l1Table = Number(u64(40));
    const slots = clusterBytes / 8;
    const dataSlots = slots - slots / 128;
    const cluster = Math.floor(guest / clusterBytes);
    const l2Table = Number(u64(l1Table + Math.floor(cluster / dataSlots) * 8) & OFFSET_MASK);
    if (l2Table === 0) return undefined;
    const host = Number(u64(l2Table + (cluster % dataSlots) * 8) & OFFSET_MASK);
    return host === 0 ? undefined : host + (guest % clusterBytes);
  } finally {
    closeSync(file);
  }
}

export function flipByte(image, offset) {
  const file = openSync(image, 'r+');
  const byte = Buffer.alloc(1);
  readSync(file, byte, 0, 1, offset);
  byte[0] ^= 0x01;
  writeSync(file, byte, 0, 1, offset);
  closeSync(file);
}
