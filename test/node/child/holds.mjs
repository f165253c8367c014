// Opens a sealed disk with a key under a passphrase, uses it, and closes it; says `open` and `closed`, and
// waits for a line after each. argv: DIST DISK STORE PASSPHRASE_FILE
import { once } from 'node:events';

const [dist, path, directory, passphraseFile] = process.argv.slice(2);
const { KeyStore, openDisk, readPassphrase } = await import(dist);

async function use() {
  const passphrase = await readPassphrase({ from: 'file', path: passphraseFile });
  const identity = await new KeyStore(directory).unlock('alice', passphrase);
  passphrase.wipe();
  const disk = await openDisk(path, { format: 'sealed', identity });
  identity[Symbol.dispose]();
  await disk.write(Buffer.alloc(65_536, 1), 0);
  await disk.read(Buffer.alloc(65_536), 0);
  await disk.flush();
  await say('open');
  await disk.close();
}

async function say(word) {
  console.log(word);
  await once(process.stdin, 'data');
}

await use();
await say('closed');
process.exit(0);
