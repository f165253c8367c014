// The second reader: are the refcounts of an image those of its references?
//
// Counts the references of header, regions, refcount structures, L1, L2, data and entry clusters of
// the *final* mapping, and compares them with the 16-bit refcounts. A count too low is data loss to
// come; one too high is a leak, which a crash may leave. Images with internal snapshots are refused:
// their tables would have to be walked too.
import { ensure, Fields } from './bytes.js';
import { headerRegions } from './header.js';
import type { SealedImage } from './reader.js';

export interface RefcountReport {
  /** Host clusters with at least one reference. */
  readonly referenced: number;
  /** Refcount below the references, or a COPIED flag that does not say what the refcount says. */
  readonly errors: readonly string[];
  /** Host offsets of clusters whose refcount is above their references. */
  readonly leaks: readonly number[];
}

export function verifyRefcounts(image: SealedImage): RefcountReport {
  ensure(image.header.snapshots === 0, 'refcounts', 'the image has internal snapshots');
  const refcounts = readRefcounts(image);
  const references = countReferences(image);
  const errors = [...references.misplaced];
  for (const [cluster, count] of references.counts) {
    const refcount = refcounts.get(cluster) ?? 0;
    const what = `cluster ${cluster}: refcount ${refcount}`;
    if (refcount < count) errors.push(`${what}, ${count} references`);
    const copied = references.copied.get(cluster);
    if (copied !== undefined && copied !== (refcount === 1)) {
      errors.push(`${what}, but COPIED is ${copied ? 'set' : 'clear'}`);
    }
  }
  const leaks: number[] = [];
  for (const [cluster, refcount] of refcounts) {
    if (refcount > (references.counts.get(cluster) ?? 0)) {
      leaks.push(cluster * image.geometry.clusterBytes);
    }
  }
  return { referenced: references.counts.size, errors, leaks };
}

/** Host cluster → refcount, where it is not zero; the refcount blocks count as referenced. */
function readRefcounts(image: SealedImage): Map<number, number> {
  const { clusterBytes } = image.geometry;
  const perBlock = clusterBytes / 2;
  const refcounts = new Map<number, number>();
  refcountBlocks(image).forEach((offset, index) => {
    if (offset === 0) return;
    const block = new Fields(image.readHost(offset, clusterBytes), 'refcounts');
    for (let at = 0; at < perBlock; at += 1) {
      const refcount = block.u16(at * 2);
      if (refcount > 0) refcounts.set(index * perBlock + at, refcount);
    }
  });
  return refcounts;
}

/** Offsets of the refcount blocks by index; 0 where there is none. */
function refcountBlocks(image: SealedImage): number[] {
  const { refcountTableOffset, refcountTableClusters } = image.header;
  const { clusterBytes } = image.geometry;
  const length = refcountTableClusters * clusterBytes;
  const whole = refcountTableOffset + length <= image.fileBytes;
  ensure(whole, 'refcounts', 'the refcount table goes beyond the end of the file');
  const table = new Fields(image.readHost(refcountTableOffset, length), 'refcounts');
  return Array.from({ length: length / 8 }, (_, index) => {
    const offset = table.u64(index * 8);
    ensure(offset % clusterBytes === 0, 'refcounts', `refcount block ${index} at ${offset}`);
    return offset;
  });
}

interface References {
  readonly counts: Map<number, number>;
  /** Of clusters that an L1 or L2 entry names. */
  readonly copied: Map<number, boolean>;
  readonly misplaced: string[];
}

function countReferences(image: SealedImage): References {
  const { clusterBytes, n } = image.geometry;
  const found: References = { counts: new Map(), copied: new Map(), misplaced: [] };
  const add = (offset: number, what: string, copied?: boolean) => {
    const cluster = offset / clusterBytes;
    found.counts.set(cluster, (found.counts.get(cluster) ?? 0) + 1);
    if (copied !== undefined) found.copied.set(cluster, copied);
    if (offset >= image.fileBytes) found.misplaced.push(`${what} at ${offset} is beyond the file`);
  };
  for (const { name, offset, length } of headerRegions(image.header)) {
    for (let at = offset; at < offset + length; at += clusterBytes) add(at, name);
  }
  for (const offset of refcountBlocks(image)) if (offset !== 0) add(offset, 'refcount block');
  for (let l1 = 0; l1 < image.header.l1Size; l1 += 1) {
    const table = image.l1Entry(l1);
    if (table.host !== 0) add(table.host, `L2 table ${l1}`, table.copied);
    if (table.host === 0 && image.fold.mappings.size === 0) continue;
    for (let index = 0; index < n; index += 1) {
      const slot = l1 * n + index;
      if (table.host === 0 && !image.fold.mappings.has(slot)) continue;
      const { host, copied } = image.finalMapping(slot);
      if (host !== 0) add(host, `slot ${slot}`, copied);
    }
  }
  return found;
}
