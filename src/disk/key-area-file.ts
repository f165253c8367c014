// Room disk/: the key area where it lies: in a file, or in the hands of whoever has it open.
//
// Of a file that nobody has open the addon replaces it, holding the disk's lock, so that a second process never
// writes a disk that is served; of one that is open its owner writes. The state that the caller read tells whether somebody was quicker in between.
import { PqblkError } from '../errors.js';
import {
  type CopyIndex,
  generationIn,
  type KeyAreaCopies,
  type KeyAreaCopy,
  type KeyAreaPlace,
  orderCopies,
} from '../keys/index.js';
import { calling, type NativeKeyAreaChange, native } from '../native.js';

/** What the addon says of the key area of a sealed disk. */
export interface RawKeyArea {
  readonly uuid: Uint8Array;
  readonly keyAreaCopies: readonly [KeyAreaCopy, KeyAreaCopy];
  readonly keyAreaState: Uint8Array;
}

type Change = (change: NativeKeyAreaChange) => Promise<void>;

export const copiesIn = ({ uuid, keyAreaCopies, keyAreaState }: RawKeyArea): KeyAreaCopies =>
  orderCopies(Uint8Array.from(uuid), keyAreaCopies, keyAreaState);

/** The key area of the sealed disk at `path`. `locked` names the process that has it open. */
export function keyAreaOf(path: string): KeyAreaPlace {
  return keyAreaPlace(path, (change) => native().replaceKeyArea({ path, ...change }));
}

/** The same where somebody has the disk open and changes it for us. */
export function keyAreaPlace(path: string, change: Change): KeyAreaPlace {
  return {
    async read(): Promise<KeyAreaCopies> {
      const info = await calling(() => native().diskInfo({ path, format: 'sealed' }));
      return copiesIn(info.sealed as RawKeyArea);
    },
    async probe(expected) {
      await calling(() => change({ expected }));
    },
    async write(copy: CopyIndex, keyArea, expected) {
      const number = Number(generationIn(keyArea));
      await calling(() => change({ keyArea, copy, number, expected }));
    },
  };
}

/** The newest whole copy of a sealed disk's key area, 64 KiB. Kind `key_area_damaged`. */
export async function readKeyArea(path: string): Promise<Uint8Array> {
  const { blob } = await keyAreaOf(path).read();
  if (blob.length > 0) return blob;
  throw new PqblkError('key_area_damaged', 'both copies of the key area are damaged', { path });
}
