// Formats every C++ and TypeScript file in place, or, as `node scripts/format.mjs --check-cxx`,
// fails when clang-format would change a C++ file. Biome checks the other half itself.
import { spawnSync } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const check = process.argv.includes('--check-cxx');

function cxxFiles() {
  return ['native', 'test/native', 'test/fuzz'].flatMap((dir) => {
    try {
      return readdirSync(join(root, dir), { recursive: true })
        .filter((name) => /\.(cc|h)$/.test(name))
        .map((name) => join(dir, name));
    } catch (error) {
      if (error.code === 'ENOENT') return [];
      throw error;
    }
  });
}

function run(file, args) {
  const { status, error } = spawnSync(file, args, { cwd: root, stdio: 'inherit' });
  if (error) throw error;
  return status ?? 1;
}

const files = cxxFiles();
let status = 0;
if (files.length > 0) {
  status = run('clang-format', [...(check ? ['--dry-run', '-Werror'] : ['-i']), ...files]);
}
if (!check) status ||= run('npx', ['--no-install', 'biome', 'check', '--write', '.']);
process.exit(status);
