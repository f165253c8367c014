// Room cli/: disks and copies of them among those that a command over many disks is about.
//
// A copy has the UUID of its disk, and a host remembers one master key for a UUID: once that of either was
// changed, the other opens no more without a word from the operator. Which of them is the disk only he knows.

import { PqblkError } from '../errors.js';
import { diskInfo } from '../index.js';
import type { Candidate } from './inventory.js';

const LOOKED_AT_ONCE = 8;

/** `work` for each, so many at once; the results in the order of the items. */
export async function forAll<T, R>(
  items: readonly T[],
  work: (item: T) => Promise<R>,
): Promise<R[]> {
  const results: R[] = new Array(items.length);
  const waiting = items.entries();
  const worker = async () => {
    for (const [index, item] of waiting) results[index] = await work(item);
  };
  await Promise.all(Array.from({ length: LOOKED_AT_ONCE }, worker));
  return results;
}

/** Of each path that is one volume with others: a sentence that names them. */
export function copiesAmong(
  disks: readonly { readonly path: string; readonly volumeUuid?: string | undefined }[],
): Map<string, string> {
  const volumes = new Map<string, string[]>();
  for (const { path, volumeUuid } of disks) {
    if (volumeUuid === undefined) continue;
    volumes.set(volumeUuid, [...(volumes.get(volumeUuid) ?? []), path]);
  }
  const found = new Map<string, string>();
  for (const [uuid, paths] of volumes) {
    for (const path of paths) {
      const others = paths.filter((other) => other !== path);
      if (others.length > 0) found.set(path, `a copy: ${others.join(', ')} is volume ${uuid} too`);
    }
  }
  return found;
}

/** The same, those that are copies of each other with an error of kind `ambiguous`. */
export async function refuseCopies(disks: readonly Candidate[]): Promise<Candidate[]> {
  const volumes = await forAll(disks, async ({ path, error }) => {
    const info = error ? undefined : await diskInfo(path, 'sealed').catch(() => undefined);
    return { path, volumeUuid: info?.sealed?.uuid }; // what is wrong, whoever changes it says
  });
  const copies = copiesAmong(volumes);
  return disks.map((disk) => {
    const copy = copies.get(disk.path);
    return copy === undefined || disk.error ? disk : { ...disk, error: aboutCopy(disk.path, copy) };
  });
}

const aboutCopy = (path: string, copy: string) =>
  new PqblkError('ambiguous', copy, {
    path,
    hint:
      'name the disk and not its copies, which this host would believe no more; a copy that is to be a disk ' +
      'of its own is made with `pqblk export` and `pqblk import`',
  });
