#!/usr/bin/env node
// Room cli/: the file that `pqblk` is. It loads the files that the command line is built into, each with the
// bytecode that V8 made of it before (scripts/build/bytecode.mjs): compiling is a fifth of a short run.
//
// It knows where they lie and no more. Bytecode that is missing, of another text or for another V8 is done
// without. V8 does not look whether it is whole, so the launcher does.
import crypto = require('node:crypto');
import fs = require('node:fs');
import path = require('node:path');
import vm = require('node:vm');

type Chunk = (
  exports: object,
  require: (id: string) => unknown,
  module: { exports: object },
  filename: string,
  dirname: string,
  importModule: (id: string) => Promise<unknown>,
) => void;

interface Loaded {
  readonly text: string;
  readonly script: vm.Script;
  readonly module: { exports: object };
}

const PARAMETERS = 'exports, require, module, __filename, __dirname, importModule';
const DIGEST_BYTES = 32;

/** By path. */
const loaded = new Map<string, Loaded>();

const bytecodeFile = (file: string) => `${file}.bytecode`;

const digestOf = (text: string, bytecode: Uint8Array) =>
  crypto.createHash('sha256').update(text).update(bytecode).digest();

/** Undefined: there is none, or not for this text. */
function readBytecode(file: string, text: string): Buffer | undefined {
  let bytes: Buffer;
  try {
    bytes = fs.readFileSync(bytecodeFile(file));
  } catch {
    return undefined;
  }
  const bytecode = bytes.subarray(DIGEST_BYTES);
  return digestOf(text, bytecode).equals(bytes.subarray(0, DIGEST_BYTES)) ? bytecode : undefined;
}

/** What the file exports: one that the command line is built into, or what `id` is to any other module. */
function load(id: string): unknown {
  if (!id.startsWith('./')) return require(id);
  const file = path.join(__dirname, id);
  const known = loaded.get(file);
  if (known) return known.module.exports;
  const text = fs.readFileSync(file, 'utf8');
  const script = new vm.Script(`(function (${PARAMETERS}) {${text}\n})`, {
    filename: file,
    cachedData: readBytecode(file, text),
  });
  const module = { exports: {} };
  loaded.set(file, { text, script, module });
  const chunk = script.runInThisContext() as Chunk;
  chunk(module.exports, load, module, file, __dirname, (target) => import(target));
  return module.exports;
}

/** For the build: keeps what V8 has compiled of each file so far. */
function keepBytecode(): void {
  for (const [file, { text, script }] of loaded) {
    const bytecode = script.createCachedData();
    fs.writeFileSync(bytecodeFile(file), Buffer.concat([digestOf(text, bytecode), bytecode]));
  }
}

/** For tests: by file name, whether V8 took the bytecode; undefined where there was none for it. */
function acceptedBytecode(): Map<string, boolean | undefined> {
  return new Map(
    Array.from(loaded, ([file, { script }]) => {
      const { cachedDataRejected } = script;
      return [
        path.basename(file),
        cachedDataRejected === undefined ? undefined : !cachedDataRejected,
      ];
    }),
  );
}

if (require.main === module) load('./program.cjs');

export = { load, keepBytecode, acceptedBytecode };
