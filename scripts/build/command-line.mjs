// Joins what tsc made of the command line into few files that start quickly: dist/cli/.
//
// A module costs Node about a millisecond, whatever is in it, and a short run of `pqblk` would load a
// hundred. The files are CommonJS, for which Node does not start its loader of ECMAScript modules, and
// src/cli/launcher.cts loads them with bytecode. The library is left as it is, and so are all packages but
// commander, which every run needs.
import { chmodSync, copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

const require = createRequire(import.meta.url);

/** What is loaded together: what every run needs, and what half a dozen commands need. */
const GROUPS = [
  { name: 'start', test: /commander|dist\/(errors|package-root|cli\/sizes|keys\/waiting)/ },
  { name: 'common', minShareCount: 6 },
];

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

function* nodesOf(value) {
  if (value === null || typeof value !== 'object') return;
  if (typeof value.type === 'string') yield value;
  for (const child of Object.values(value)) yield* nodesOf(child);
}

/** Code that comes with bytecode has no `import()` of its own (a limit of V8): the launcher lends it one. */
function withLentImport(parse, code) {
  const imports = [...nodesOf(parse(code))].filter(({ type }) => type === 'ImportExpression');
  let result = code;
  for (const { start } of imports.sort((a, b) => b.start - a.start)) {
    const rest = result.slice(start);
    if (!rest.startsWith('import(')) throw new Error(`not an import(): ${rest.slice(0, 40)}`);
    result = `${result.slice(0, start)}importModule${rest.slice('import'.length)}`;
  }
  return result;
}

/** `directory`: where tsc wrote it, and where the files are put in its place. */
export async function joinCommandLine(directory) {
  const [{ rolldown }, { parseAst }] = await Promise.all([
    import('rolldown'),
    import('rolldown/parseAst'),
  ]);
  const bundle = await rolldown({
    input: { program: join(directory, 'main.js') },
    platform: 'node',
    external: (id) => !/^[./]/.test(id) && id !== 'commander',
    treeshake: { moduleSideEffects: false },
    plugins: [{ name: 'lazy-child-process', transform: withoutChildProcess }],
  });
  const { output } = await bundle.generate({
    format: 'cjs',
    entryFileNames: '[name].cjs',
    chunkFileNames: '[name].cjs',
    codeSplitting: { groups: GROUPS },
    comments: { legal: true, annotation: false, jsdoc: false }, // V8 reads them at every start
  });
  await bundle.close();
  const launcher = readFileSync(join(directory, 'launcher.cjs'));
  rmSync(directory, { recursive: true });
  mkdirSync(directory);
  for (const { fileName, code } of output) {
    writeFileSync(join(directory, fileName), withLentImport(parseAst, code));
  }
  writeFileSync(join(directory, 'main.cjs'), launcher);
  chmodSync(join(directory, 'main.cjs'), 0o755);
  const commander = dirname(require.resolve('commander'));
  copyFileSync(join(commander, 'LICENSE'), join(directory, 'LICENSE.commander'));
}
