// A short slice of `npm run test:soak`, so that it does not rot: one steady disk, and others that are
// killed. The seed is fixed; what happens among the requests is not.
import { execFile } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterAll, expect, test } from 'vitest';

const MAIN = fileURLToPath(new URL('main.mjs', import.meta.url));
const PEER = fileURLToPath(new URL('../../build/release/tests/soak_peer', import.meta.url));
const LIMIT_MS = 900_000;
const out = mkdtempSync(join(tmpdir(), 'pqblk-soak-'));
afterAll(() => rmSync(out, { recursive: true, force: true }));

test('a slice of the soak finds nothing wrong', { timeout: LIMIT_MS }, async () => {
  if (!existsSync(PEER)) throw new Error(`${PEER} is missing; \`npm test\` builds it`);
  const words = ['--quick', '--minutes', '0.2', '--seed', '11', '--out', out];
  const ended = await promisify(execFile)(process.execPath, [MAIN, ...words], {
    timeout: LIMIT_MS,
  }).catch((error: { stdout: string; stderr: string }) => error);
  const note = ended.stdout.match(/^NOTE: .*, 0 failures.*$/m)?.[0];
  expect(note, ended.stdout + ended.stderr).toBeDefined();
  console.log(note);
  const { episodes, memory } = JSON.parse(readFileSync(join(out, 'report.json'), 'utf8'));
  expect(memory.length).toBeGreaterThan(0);
  expect(episodes.at(-1).counts.kills).toBeGreaterThan(0);
  // The steady disk's entries do not fit in its cache, at any time: they are 416 pages when it has grown.
  expect(episodes[0].counts.entryMisses).toBeGreaterThan(500);
  for (const { counts, operations } of episodes) {
    expect(counts.looks).toBeGreaterThan(0);
    expect(operations.verified).toBeGreaterThan(0);
  }
});
