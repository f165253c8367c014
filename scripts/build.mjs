// Builds what `npm run build` promises: the Node addon (CMake through cmake-js), dist/ (tsc, and rolldown
// for the command line), and the command line's bytecode, which the first two make.
//
//   node scripts/build.mjs [native|ts|bytecode]...      all when nothing is named
//
// Nothing is downloaded: package.json's binary.napi_versions makes cmake-js take the headers from
// node-api-headers. `cmake-js build` is used and not `compile`, whose answer to a compile error is to
// delete the build directory and start again.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { makeBytecode } from './build/bytecode.mjs';
import { joinCommandLine } from './build/command-line.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const COMMAND_LINE = join(root, 'dist', 'cli');
const require = createRequire(import.meta.url);

function run(file, args) {
  const { status, error } = spawnSync(file, args, { cwd: root, stdio: 'inherit' });
  if (error) throw error;
  return status ?? 1;
}

function buildNative() {
  const cmakeJs = join(dirname(require.resolve('cmake-js/package.json')), 'bin', 'cmake-js');
  const out = join(root, 'build', 'release');
  const common = [
    ...['--directory', root, '--out', out, '--config', 'Release'],
    ...['--log-level', process.env.PQBLK_VERBOSE ? 'info' : 'error'],
  ];
  const build = ['--target', 'pqblk_node', '--parallel', String(availableParallelism())];
  // cmake-js configures only where no cache is; a configure that failed leaves one behind.
  const configured = ['build.ninja', 'Makefile'].some((file) => existsSync(join(out, file)));
  const status =
    (configured ? 0 : run(process.execPath, [cmakeJs, 'configure', ...common])) ||
    run(process.execPath, [cmakeJs, 'build', ...common, ...build]);
  if (status !== 0) {
    console.error(
      'pqblk: the native build failed. `scripts/setup` installs the libraries it needs.',
    );
  }
  return status;
}

async function buildTypeScript() {
  const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin', 'tsc');
  const status = run(process.execPath, [tsc, '-p', 'tsconfig.build.json']);
  if (status === 0) await joinCommandLine(COMMAND_LINE);
  return status;
}

function keepBytecode() {
  return makeBytecode(COMMAND_LINE) ? 0 : 1;
}

const steps = { native: buildNative, ts: buildTypeScript, bytecode: keepBytecode };
const wanted = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(steps);
for (const name of wanted) {
  const step = steps[name];
  if (!step) {
    console.error(`build.mjs: unknown part '${name}'; expected ${Object.keys(steps).join(' or ')}`);
    process.exit(2);
  }
  const status = await step();
  if (status !== 0) process.exit(status);
}
