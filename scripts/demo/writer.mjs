// The process that gets killed: writes rounds of patterns to a disk, flushes, and prints the number
// of each round after its flush. It never ends by itself.
//
//   node writer.mjs TARGET_JSON FIRST_ROUND
import { writeSync } from 'node:fs';
import { BLOCK, makeWrite, writesOf } from './patterns.mjs';
import { openTarget } from './target.mjs';

const target = JSON.parse(process.argv[2]);
const { disk } = await openTarget(target);
for (let round = Number(process.argv[3]); ; round++) {
  const writes = writesOf(round, target.blocks).map((write) =>
    disk.write(makeWrite(write, round), target.from + write.block * BLOCK),
  );
  await Promise.all(writes);
  await disk.flush();
  writeSync(1, `${round}\n`); // at once: what waits in a stream dies with the process
}
