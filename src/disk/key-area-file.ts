// Room disk/: the key area of a disk that nobody has open.
//
// Each call takes the disk's lock for itself, so that a second process never writes a disk that is
// served; the generation that the caller read tells whether somebody was quicker in between.
import { PqblkError } from '../errors.js';
import type { KeyAreaCopies, KeyAreaPlace } from '../keys/index.js';
import { calling, native } from '../native.js';

interface RawCopies {
  readonly uuid: Uint8Array;
  readonly keyArea: Uint8Array;
  readonly keyAreaGeneration: number;
  readonly keyAreaCopyDamaged: readonly [boolean, boolean];
  readonly keyAreaCopiesDiffer: boolean;
}

/** The key area of the sealed disk at `path`. `locked` names the process that has it open. */
export function keyAreaOf(path: string): KeyAreaPlace {
  return {
    async read(): Promise<KeyAreaCopies> {
      const info = await calling(() => native().diskInfo({ path, format: 'sealed' }));
      const raw = info.sealed as RawCopies;
      return {
        volumeUuid: Uint8Array.from(raw.uuid),
        blob: raw.keyArea,
        generation: raw.keyAreaGeneration,
        damaged: raw.keyAreaCopyDamaged,
        differ: raw.keyAreaCopiesDiffer,
      };
    },
    async probe(expectedGeneration) {
      await calling(() => native().replaceKeyArea({ path, expectedGeneration }));
    },
    async replaceOlder(keyArea, expectedGeneration) {
      await calling(() => native().replaceKeyArea({ path, keyArea, expectedGeneration }));
    },
    async level(expectedGeneration) {
      await calling(() => native().replaceKeyArea({ path, expectedGeneration, level: true }));
    },
  };
}

/** The newest intact copy of a sealed disk's key area, 64 KiB. Kind `key_area_damaged`. */
export async function readKeyArea(path: string): Promise<Uint8Array> {
  const { blob } = await keyAreaOf(path).read();
  if (blob.length > 0) return blob;
  throw new PqblkError('key_area_damaged', 'both copies of the key area are damaged', { path });
}
