// The directory of the package: where package.json, dist/ and build/ are.
//
// Looked for and not counted in steps: the same code runs from src/, from dist/ and out of the one file
// that the command line is built into.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

function nearestPackage(from: string): string {
  const parent = dirname(from);
  return existsSync(join(from, 'package.json')) || parent === from ? from : nearestPackage(parent);
}

/** Absolute path. */
export const packageRoot = nearestPackage(dirname(fileURLToPath(import.meta.url)));
