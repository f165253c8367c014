// Kills a writer with SIGKILL in mid-load, and finds out what its disk holds afterwards.
//
// The writer (writer.mjs, a process of its own) prints the number of each round once its flush has
// returned. Of what it printed nothing may be missing; what came later may be there or not, but
// never as a mixture.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { BLOCK, roundIn, WRITES_PER_ROUND, writesOf } from './patterns.mjs';
import { openTarget } from './target.mjs';

const WRITER = fileURLToPath(new URL('writer.mjs', import.meta.url));
const READ_BLOCKS = 256;

/** Runs a writer from `firstRound` on and kills it after `ms`; says what it had flushed by then. */
export async function killWriter(target, firstRound, ms) {
  const child = spawn(process.execPath, [WRITER, JSON.stringify(target), `${firstRound}`], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let complaint = '';
  child.stderr.on('data', (text) => {
    complaint += text;
  });
  let flushed = firstRound - 1;
  const lines = createInterface({ input: child.stdout });
  lines.on('line', (line) => {
    flushed = Number(line);
  });
  const ended = new Promise((resolve) => child.on('close', (_code, signal) => resolve(signal)));
  await Promise.race([once(lines, 'line'), ended]);
  await sleep(ms);
  child.kill('SIGKILL');
  if ((await ended) !== 'SIGKILL') throw new Error(`the writer ended by itself: ${complaint}`);
  return { flushed, writes: (flushed - firstRound + 1) * WRITES_PER_ROUND };
}

/**
 * Compares every block of the target with what the rounds that were flushed wrote (`flushedRounds`:
 * [first, last] of each killed writer). `lost`: blocks older than the last flushed write to them;
 * `torn`: blocks that hold no version at all; `newest`: the last round seen, flushed or not.
 */
export async function verify(target, flushedRounds) {
  const atLeast = oldestAllowed(target, flushedRounds);
  const { disk, openMs } = await openTarget(target);
  const found = { lost: 0, torn: 0, newest: 0, openMs };
  try {
    const bytes = new Uint8Array(READ_BLOCKS * BLOCK);
    for (let first = 0; first < target.blocks; first += READ_BLOCKS) {
      await disk.read(bytes, target.from + first * BLOCK);
      for (let index = 0; index < READ_BLOCKS; index++) {
        const block = first + index;
        const round = roundIn(bytes.subarray(index * BLOCK, (index + 1) * BLOCK), block);
        if (round < 0) found.torn += 1;
        else if (round < atLeast[block]) found.lost += 1;
        found.newest = Math.max(found.newest, round);
      }
    }
  } finally {
    await disk.close();
  }
  return found;
}

function oldestAllowed(target, flushedRounds) {
  const atLeast = new Uint32Array(target.blocks);
  for (const [first, last] of flushedRounds) {
    for (let round = first; round <= last; round++) {
      for (const { block, count } of writesOf(round, target.blocks)) {
        atLeast.fill(round, block, block + count);
      }
    }
  }
  return atLeast;
}
