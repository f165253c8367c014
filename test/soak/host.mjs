// A disk opened by the Node API and served every way at once: NBD, with TLS too, and vhost-user by the
// engine, and the API's promises and batches through bridge.mjs. argv: options as JSON. Orders on stdin: `resize BYTES`,
// `limits JSON`, `end`; answers on stdout. At its end it says how often its caches had
// to load something (`misses`).
import { createInterface } from 'node:readline';
import { KeyStore, openDisk, serveControl } from '../../dist/index.js';
import { byPromises, byQueue, serveBridge } from './bridge.mjs';

const { path, key, store, open, sockets } = JSON.parse(process.argv[2]);
const say = (event, more = {}) => console.log(JSON.stringify({ event, ...more }));
const GC_MS = 10_000; // what is garbage shall not look like a leak

const keys = key === undefined ? {} : await unlocked(new KeyStore(store));
const disk = await openDisk(path, { ...open, ...keys });
keys.identity?.[Symbol.dispose]();
const complaints = (text) => process.stderr.write(`${text}\n`);
await disk.serveNbd({ path: sockets.nbd, onReport: complaints });
const tls = { pskFile: sockets.psk };
await disk.serveNbd({ path: sockets.tls, tls, onReport: complaints });
await disk.serveVhostUser({ path: sockets.vhost, onReport: complaints });
await serveBridge(sockets.promises, disk, byPromises(disk));
await serveBridge(sockets.queue, disk, byQueue(disk, 8));
const control = open.format === 'sealed' ? await serveControl(disk) : undefined;
setInterval(() => globalThis.gc(), GC_MS).unref();
say('ready', { size: disk.size });

const orders = {
  resize: async (bytes) => {
    await disk.resize(Number(bytes));
    say('resized', { size: disk.size });
  },
  limits: async (limits) => {
    disk.setLimits(JSON.parse(limits));
    say('limited');
  },
  end: async () => {
    const { l2Misses, entryMisses } = disk.stats().backend;
    say('misses', { l2Misses, entryMisses });
    await control?.close();
    await disk.close();
    process.exit(0);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const [word, rest] = line.split(/ (.*)/s);
  try {
    await orders[word](rest);
  } catch (error) {
    complaints(`${word}: ${error.stack}`);
    say('refused', { word, kind: error.kind, message: error.message });
    if (word === 'end') process.exit(1);
  }
}

async function unlocked(keyStore) {
  return { identity: await keyStore.unlock(key), pins: keyStore.pins };
}
