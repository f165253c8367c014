// Opens a sealed disk, uses it, and closes it; says `open` and `closed`, and waits for a line after each.
// argv: DIST DISK STORE PASSPHRASE_FILE|- [CODE_FILE]: with alice's key, or a recovery code
import { once } from 'node:events';

const [dist, path, directory, passphraseFile, codeFile] = process.argv.slice(2);
const { describeKeyArea, KeyStore, openDisk, readKeyArea, readPassphrase } = await import(dist);
const { parseRecoveryCode, recoveryIdentity } = await import(dist);

async function identityOf() {
  if (codeFile !== undefined) {
    const typed = await readPassphrase({ from: 'file', path: codeFile });
    const secret = parseRecoveryCode(typed);
    typed.wipe();
    const identity = await recoveryIdentity(secret, describeKeyArea(await readKeyArea(path)).slots);
    secret.wipe();
    return identity;
  }
  const store = new KeyStore(directory);
  if (passphraseFile === '-') return await store.unlock('alice');
  const passphrase = await readPassphrase({ from: 'file', path: passphraseFile });
  try {
    return await store.unlock('alice', passphrase);
  } finally {
    passphrase.wipe();
  }
}

async function use() {
  const identity = await identityOf();
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
