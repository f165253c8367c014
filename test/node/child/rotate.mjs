// Rotates the data key of a disk and kills itself (SIGKILL) right after one step, or in the middle of
// the pass that writes.
//
//   node rotate.mjs DIST DISK STORE STEP
const [dist, path, directory, last] = process.argv.slice(2);
const { KeyStore, openDisk, rotateDataKey } = await import(dist);
const identity = await new KeyStore(directory).unlock('alice');
const disk = await openDisk(path, { format: 'sealed', identity });
await rotateDataKey(disk, {
  identity,
  bytesPerSecond: last === 'rewriting' ? 8 * 2 ** 20 : undefined,
  onProgress: () => last === 'rewriting' && process.kill(process.pid, 'SIGKILL'),
  onStep: (step) => step === last && process.kill(process.pid, 'SIGKILL'),
});
