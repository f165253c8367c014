// The second reader as a command, for tests and for a REPL: nothing here runs by itself.
//
//   runReader(['IMAGE', '--secret-key', FILE], print)       a raw ML-KEM decapsulation key
//   runReader(['IMAGE', '--keys', FILE.json], print)        {"integrityKey": hex, "dataKeys": {"1": hex}}
//   more: --fast (node:crypto opens the sectors), --open-every N (sampling), --sha3 (of the content)
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { hex, ReaderError } from './bytes.js';
import { sha3_256 } from './crypto.js';
import { openSealed, openWithPrivateKey, type ReaderOptions, type SealedImage } from './reader.js';
import { verifyRefcounts } from './refcounts.js';

interface KeyDocument {
  readonly integrityKey: string;
  readonly dataKeys: Readonly<Record<string, string>>;
}

const unhex = (text: string) => Uint8Array.from(Buffer.from(text, 'hex'));

/** Prints one line of JSON. Returns 0 when all holds, 1 when something does not, 2 for a bad call. */
export function runReader(args: string[], print: (line: string) => void): number {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      'secret-key': { type: 'string' },
      keys: { type: 'string' },
      fast: { type: 'boolean', default: false },
      'open-every': { type: 'string', default: '1' },
      sha3: { type: 'boolean', default: false },
    },
  });
  const [path] = positionals;
  const openEvery = Number(values['open-every']);
  if (!path || !(openEvery >= 1) || (!values['secret-key'] && !values.keys)) return 2;
  const options: ReaderOptions = { aead: values.fast ? 'fast' : 'noble' };
  try {
    const image = values['secret-key']
      ? openWithPrivateKey(path, Uint8Array.from(readFileSync(values['secret-key'])), options)
      : openSealed(path, readKeys(values.keys ?? ''), options);
    const report = summarize(image, openEvery, values.sha3);
    image.close();
    print(JSON.stringify(report));
    return report.damaged.length === 0 && report.refcounts.errors.length === 0 ? 0 : 1;
  } catch (error) {
    if (!(error instanceof ReaderError)) throw error;
    print(JSON.stringify({ fault: error.fault, message: error.message }));
    return 1;
  }
}

function readKeys(path: string) {
  const document = JSON.parse(readFileSync(path, 'utf8')) as KeyDocument;
  const dataKeys = Object.entries(document.dataKeys).map(
    ([epoch, key]) => [Number(epoch), unhex(key)] as const,
  );
  return { integrityKey: unhex(document.integrityKey), dataKeys: new Map(dataKeys) };
}

function summarize(image: SealedImage, openEvery: number, sha3: boolean) {
  const states = { never: 0, data: 0, zero: 0, damaged: 0 };
  const damaged: string[] = [];
  for (const view of image.walk({ openEvery })) {
    states[view.state] += 1;
    if (view.reason) damaged.push(view.reason);
  }
  let content: string | undefined;
  if (sha3 && damaged.length === 0) {
    const hash = sha3_256.create();
    image.readAll((bytes) => hash.update(bytes));
    content = hex(hash.digest());
  }
  return {
    uuid: hex(image.header.uuid),
    suite: image.header.suite,
    size: image.header.size,
    clusterBytes: image.geometry.clusterBytes,
    closedCleanly: image.closedCleanly,
    blocks: image.blocks.length,
    sessions: [...image.sessions.sessions.keys()],
    keyAreaGeneration: Number(image.keyArea.generations[0]),
    states,
    damaged,
    refcounts: verifyRefcounts(image),
    sha3: content,
  };
}
