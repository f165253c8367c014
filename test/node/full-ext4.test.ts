// A raw disk in the page cache of a full ext4. A call that should make zeros fails at a hole, and has
// dropped by then what the cache had of the range; what is older must not come to light (the kernel
// is the real one: Linux before 6.14 writes the cache out first, and there this cannot fail).
import { rmSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, onTestFinished, type TestContext, test } from 'vitest';
import { openDisk } from '../../src/index.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const HOLE = 64 * KIB;
const DATA = 192 * KIB;
const { SmallFs } = await import(fileURLToPath(new URL('../soak/places.mjs', import.meta.url)));

function smallFs({ skip }: TestContext): { path: string; fill(left: number): void } {
  const fs = new SmallFs(64 * MIB);
  onTestFinished(() => fs.remove());
  if (!fs.problem) return fs;
  console.log(`SKIP: no small ext4: ${fs.problem}`);
  skip();
  throw new Error('skip() does not return');
}

/** Every other part of it a hole; what is there is 1 on the medium. */
async function holey(path: string, parts: number): Promise<void> {
  const file = await open(path, 'w');
  await file.truncate(parts * (HOLE + DATA));
  for (let i = 0; i < parts; i++) {
    await file.write(Buffer.alloc(DATA, 1), 0, DATA, i * (HOLE + DATA) + HOLE);
  }
  await file.sync();
  await file.close();
}

async function fillUp(fs: { path: string; fill(left: number): void }): Promise<void> {
  fs.fill(0);
  const file = await open(join(fs.path, 'rest'), 'w');
  const some = Buffer.alloc(4 * KIB, 3);
  try {
    for (;;) await file.write(some);
  } catch (error) {
    expect((error as NodeJS.ErrnoException).code).toBe('ENOSPC');
  }
  await file.sync().catch(() => {});
  await file.close();
}

test.for(['writeZeroes', 'discard'] as const)(
  '%s leaves zeros, and brings nothing old back',
  async (how, context) => {
    const fs = smallFs(context);
    const parts = 32;
    const path = join(fs.path, 'disk');
    await holey(path, parts);
    await fillUp(fs);
    {
      await using disk = await openDisk(path, { format: 'raw', cache: 'writeback' });
      const seen = Buffer.alloc(HOLE + DATA);
      const zeros = Buffer.alloc(seen.length);
      for (let i = 0; i < parts; i++) {
        const at = i * seen.length;
        await disk.write(Buffer.alloc(DATA, 2), at + HOLE); // acknowledged, and in the cache alone
        await disk[how](at, seen.length); // where something stands zeros need no room
        await disk.read(seen, at);
        expect(seen.equals(zeros), `part ${i}`).toBe(true);
      }
    }
    rmSync(path);
  },
);
