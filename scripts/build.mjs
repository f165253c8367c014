// Builds what `npm run build` promises: the Node addon (CMake through cmake-js) and dist/ (tsc).
//
//   node scripts/build.mjs [native|ts]      both when nothing is named
//
// Nothing is downloaded: package.json's binary.napi_versions makes cmake-js take the headers from
// node-api-headers. `cmake-js build` is used and not `compile`, whose answer to a compile error is to
// delete the build directory and start again.
import { spawnSync } from 'node:child_process';
import { chmodSync, existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
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

function buildTypeScript() {
  const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin', 'tsc');
  const status = run(process.execPath, [tsc, '-p', 'tsconfig.build.json']);
  const command = join(root, 'dist', 'cli', 'main.js');
  if (existsSync(command)) chmodSync(command, 0o755);
  return status;
}

const steps = { native: buildNative, ts: buildTypeScript };
const wanted = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(steps);
for (const name of wanted) {
  const step = steps[name];
  if (!step) {
    console.error(`build.mjs: unknown part '${name}'; expected ${Object.keys(steps).join(' or ')}`);
    process.exit(2);
  }
  const status = step();
  if (status !== 0) process.exit(status);
}
