// Writes sector after sector to a sealed disk and says after each flush how many are safe, until it is
// killed. argv: dist/index.js, the disk's path, the key store, the key's name.
import { writeSync } from 'node:fs';

const [dist, path, storePath, key] = process.argv.slice(2);
const { KeyStore, openDisk } = await import(dist);
const identity = await new KeyStore(storePath).unlock(key);
const disk = await openDisk(path, { format: 'sealed', identity });
const sectors = disk.size / 4096;
for (let i = 0; ; i += 16) {
  const batch = [];
  for (let n = i; n < i + 16; n++) {
    batch.push(disk.write(Buffer.alloc(4096, n % 251), (n % sectors) * 4096));
  }
  await Promise.all(batch);
  await disk.flush();
  writeSync(1, `${i + 16}\n`);
}
