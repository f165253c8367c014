// Room disk/: where the key area of a disk lies, and who may write it.
//
// Of a disk that nobody has open each call takes the lock for itself, so that a second process never
// writes a disk that is served; of one that is open its owner writes. The generation that the caller read tells whether somebody was quicker in between.
import { PqblkError } from '../errors.js';
import type { KeyAreaCopies, KeyAreaPlace } from '../keys/index.js';
import { calling, type NativeKeyAreaChange, native } from '../native.js';

interface RawCopies {
  readonly uuid: Uint8Array;
  readonly keyArea: Uint8Array;
  readonly keyAreaGeneration: number;
  readonly keyAreaCopyDamaged: readonly [boolean, boolean];
  readonly keyAreaCopiesDiffer: boolean;
}

type Change = (change: NativeKeyAreaChange) => Promise<void>;

/** The key area of the sealed disk at `path`. `locked` names the process that has it open. */
export function keyAreaOf(path: string): KeyAreaPlace {
  return keyAreaPlace(path, (change) => native().replaceKeyArea({ path, ...change }));
}

/** The same where somebody has the disk open and changes it for us. */
export function keyAreaPlace(path: string, change: Change): KeyAreaPlace {
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
      await calling(() => change({ expectedGeneration }));
    },
    async replaceOlder(keyArea, expectedGeneration) {
      await calling(() => change({ keyArea, expectedGeneration }));
    },
    async level(expectedGeneration) {
      await calling(() => change({ expectedGeneration, level: true }));
    },
  };
}

/** The newest intact copy of a sealed disk's key area, 64 KiB. Kind `key_area_damaged`. */
export async function readKeyArea(path: string): Promise<Uint8Array> {
  const { blob } = await keyAreaOf(path).read();
  if (blob.length > 0) return blob;
  throw new PqblkError('key_area_damaged', 'both copies of the key area are damaged', { path });
}
