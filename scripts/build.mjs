// Builds what `npm run build` promises: the Node addon (CMake through cmake-js) and dist/ (tsc, and
// rolldown for the command line).
//
//   node scripts/build.mjs [native|ts]      both when nothing is named
//
// Nothing is downloaded: package.json's binary.napi_versions makes cmake-js take the headers from
// node-api-headers. `cmake-js build` is used and not `compile`, whose answer to a compile error is to
// delete the build directory and start again.
import { spawnSync } from 'node:child_process';
import { chmodSync, copyFileSync, existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const require = createRequire(import.meta.url);

/** What is loaded together: what every run needs, and what half a dozen commands need. */
const GROUPS = [
  { name: 'start', test: /commander|dist\/(errors|package-root|cli\/sizes|keys\/waiting)/ },
  { name: 'common', minShareCount: 6 },
];

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
  if (status === 0) await joinCommandLine(join(root, 'dist', 'cli'));
  return status;
}

const CHILD_PROCESS = "require('node:child_process')";

/** Commander asks for child_process for commands that are programs of their own; pqblk has none. */
function withoutChildProcess(code, id) {
  if (!id.endsWith('commander/lib/command.js')) return null;
  if (code.split(CHILD_PROCESS).length !== 2) {
    throw new Error(`${id}: expected ${CHILD_PROCESS} once`);
  }
  return {
    code: code.replace(CHILD_PROCESS, `{ get spawn() { return ${CHILD_PROCESS}.spawn; } }`),
  };
}

/**
 * A module costs Node about a millisecond, whatever is in it, and a short run of `pqblk` would load a
 * hundred: what tsc made is joined into few files, each with what is loaded together. The library is
 * left as it is, and so are all packages but commander, which every run needs.
 */
async function joinCommandLine(directory) {
  const { rolldown } = await import('rolldown');
  const bundle = await rolldown({
    input: join(directory, 'main.js'),
    platform: 'node',
    external: (id) => !/^[./]/.test(id) && id !== 'commander',
    treeshake: { moduleSideEffects: false },
    plugins: [{ name: 'lazy-child-process', transform: withoutChildProcess }],
  });
  const { output } = await bundle.generate({
    chunkFileNames: '[name].js',
    codeSplitting: { groups: GROUPS },
    comments: { legal: true, annotation: false, jsdoc: false }, // V8 reads them at every start
  });
  await bundle.close();
  rmSync(directory, { recursive: true });
  mkdirSync(directory);
  for (const { fileName, code } of output) writeFileSync(join(directory, fileName), code);
  chmodSync(join(directory, 'main.js'), 0o755);
  const commander = dirname(require.resolve('commander'));
  copyFileSync(join(commander, 'LICENSE'), join(directory, 'LICENSE.commander'));
}

const steps = { native: buildNative, ts: buildTypeScript };
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
