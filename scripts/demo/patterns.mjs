// Blocks whose content says where and when they were written, so that a reader needs no memory of
// the writer: block number, round, and bytes that follow from both. A mixture of two versions, or a
// block in the wrong place, cannot pass for either.
//
// Which blocks a round writes follows from its number too: reader and killed writer agree on it.

export const BLOCK = 4096;
export const WRITES_PER_ROUND = 32;
export const BLOCKS_PER_WRITE_MAX = 8;

/** xorshift32: fast, and the same in both processes. */
function* numbers(seed) {
  let x = (seed * 2654435761 + 1) >>> 0 || 1;
  for (;;) {
    x ^= x << 13;
    x >>>= 0;
    x ^= x >>> 17;
    x ^= x << 5;
    x >>>= 0;
    yield x;
  }
}

/** The writes of a round: {block, count}. They do not overlap: one version per block and round. */
export function writesOf(round, blocks) {
  const next = numbers(round);
  const taken = new Set();
  const writes = [];
  while (writes.length < WRITES_PER_ROUND) {
    const count = 1 + (next.next().value % BLOCKS_PER_WRITE_MAX);
    const block = next.next().value % (blocks - count);
    const own = Array.from({ length: count }, (_, index) => block + index);
    if (own.some((one) => taken.has(one))) continue;
    for (const one of own) taken.add(one);
    writes.push({ block, count });
  }
  return writes;
}

/** Fills 4096 bytes with the one content of (block, round). */
export function fillBlock(bytes, block, round) {
  const words = new Uint32Array(bytes.buffer, bytes.byteOffset, BLOCK / 4);
  let x = ((block + 1) * 2654435761 + round * 40503) >>> 0 || 1;
  for (let at = 0; at < words.length; at++) {
    x ^= x << 13;
    x >>>= 0;
    x ^= x >>> 17;
    x ^= x << 5;
    x >>>= 0;
    words[at] = x;
  }
  words[0] = block;
  words[1] = round;
}

export function makeWrite({ block, count }, round) {
  const bytes = new Uint8Array(count * BLOCK);
  for (let index = 0; index < count; index++) {
    fillBlock(bytes.subarray(index * BLOCK, (index + 1) * BLOCK), block + index, round);
  }
  return bytes;
}

/**
 * The round a block was written in, 0 for a block of zeros, or -1 for anything that no writer ever
 * wrote there.
 */
export function roundIn(bytes, block) {
  if (bytes.every((byte) => byte === 0)) return 0;
  const [foundBlock, round] = new Uint32Array(bytes.buffer, bytes.byteOffset, 2);
  if (foundBlock !== block) return -1;
  const expected = new Uint8Array(BLOCK);
  fillBlock(expected, block, round);
  return Buffer.compare(expected, bytes) === 0 ? round : -1;
}
