// Formats every C++ and TypeScript file in place, or, as `node scripts/format.mjs --check-cxx`,
// names the C++ files that clang-format would change. Biome checks the other half itself.
//
// Paths given after the options limit both to files below them.
import { spawnSync } from 'node:child_process';
import { readdirSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const check = process.argv.includes('--check-cxx');
const paths = process.argv.slice(2).filter((argument) => argument !== '--check-cxx');

function cxxFilesBelow(path) {
  const stat = statSync(join(root, path), { throwIfNoEntry: false });
  if (!stat) return [];
  if (!stat.isDirectory()) return /\.(cc|h)$/.test(path) ? [path] : [];
  return readdirSync(join(root, path)).flatMap((name) => cxxFilesBelow(join(path, name)));
}

function run(file, args, stdio = 'inherit') {
  const result = spawnSync(file, args, { cwd: root, stdio, encoding: 'utf8' });
  if (result.error) throw result.error;
  return result;
}

const roots = paths.length > 0 ? paths : ['native', 'test/native', 'test/fuzz'];
const files = roots.flatMap(cxxFilesBelow);

if (check) {
  const wrong = files.filter((file) => {
    return run('clang-format', ['--dry-run', '-Werror', file], 'pipe').status !== 0;
  });
  for (const file of wrong) console.error(`${file}: not formatted; run npm run format`);
  process.exit(wrong.length > 0 ? 1 : 0);
}

const status = files.length > 0 ? run('clang-format', ['-i', ...files]).status : 0;
const biome = join(root, 'node_modules', '.bin', 'biome');
process.exit(
  status || run(biome, ['check', '--write', ...(paths.length > 0 ? paths : ['.'])]).status || 0,
);
