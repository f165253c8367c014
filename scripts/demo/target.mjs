// Opens the disk that gets written, killed and verified, through the Node API as any program would.
import { KeyStore, openDisk, readPassphrase } from '../../dist/index.js';

/** `target`: {path, store, key, passphraseFile}. The caller closes `disk`. */
export async function openTarget(target) {
  const store = new KeyStore(target.store);
  const passphrase = await readPassphrase({ from: 'file', path: target.passphraseFile });
  const identity = await store.unlock(target.key, passphrase);
  passphrase.wipe();
  const started = performance.now(); // what came before is scrypt, which is slow on purpose
  try {
    const disk = await openDisk(target.path, { format: 'sealed', identity, pins: store.pins });
    return { disk, openMs: performance.now() - started };
  } finally {
    identity[Symbol.dispose]();
  }
}
