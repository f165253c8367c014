// Settings of the TypeScript suites: what is collected, and how long a test may take.
//
// Tests run in forked processes because the addon, its rings and file locks are per-process facts:
// one file's leak or crash must not reach another's. PQBLK_SOAK=1 lengthens the timeouts only; what
// a test repeats for longer is up to the test (it reads PQBLK_SOAK_SECONDS).
import { defineConfig } from 'vitest/config';

const soak = process.env.PQBLK_SOAK === '1';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 2,
    testTimeout: soak ? 3_600_000 : 480_000,
    hookTimeout: 480_000,
    teardownTimeout: 20_000,
    passWithNoTests: false,
  },
});
