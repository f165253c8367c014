// Takes a lock of the built package, once or often.
//
//   node lock.mjs THING die|take [TIMES]
//
// `die`: is killed while it holds the lock. `take`: fails when anybody else is inside as well.
import { mkdirSync, rmdirSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';
import { takeLock } from '../../../dist/index.js';

const [of, what, times] = process.argv.slice(2);
for (let round = 0; round < Number(times ?? 1); round += 1) {
  const release = await takeLock(of, 'test', 60_000);
  if (what === 'die') process.kill(process.pid, 'SIGKILL');
  mkdirSync(`${of}.inside`);
  await setImmediate();
  rmdirSync(`${of}.inside`);
  await release();
}
