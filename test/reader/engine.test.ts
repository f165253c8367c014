// The second reader on what the engine wrote: two programs, in two languages, that share docs/format.md
// and nothing else, agree on every byte.
import { createDisk, liboqs, openDisk, softwareIdentity } from '../../src/index.js';
import { fingerprintOf, Kem } from '../../src/keys/ml-kem.js';
import { Secret } from '../../src/keys/secret.js';
import { type WriterOptions, type WrittenDisk, writerCases } from './engine-cases.js';

const SUITES = { 1: 'AES-256-GCM', 2: 'ChaCha20-Poly1305' } as const;

async function opened(path: string, options: WriterOptions): Promise<WrittenDisk> {
  using identity = softwareIdentity(
    Kem.mlKem768,
    Secret.copyOf(options.decapsulationKey),
    fingerprintOf(options.encapsulationKey),
  );
  const disk = await openDisk(path, { format: 'sealed', cache: 'writeback', identity });
  return {
    write: (offset, bytes) => disk.write(bytes, offset),
    // Both ways of zeroing, by turns: they take different records.
    zero: (offset, length) => disk.writeZeroes(offset, length, { unmap: (offset / 512) % 2 === 0 }),
    flush: () => disk.flush(),
    close: () => disk.close(),
  };
}

writerCases({
  async create(path, options) {
    await createDisk(path, {
      format: 'sealed',
      size: options.size,
      clusterSize: 2 ** options.clusterBits,
      suite: SUITES[options.suite],
      overwrite: true,
      recipients: [
        {
          provider: liboqs,
          kem: Kem.mlKem768,
          encapsulationKey: options.encapsulationKey,
          label: 'reader',
        },
      ],
    });
    return opened(path, options);
  },
  open: opened,
});
