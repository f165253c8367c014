// The second reader on images that were not closed cleanly: each rule of docs/format.md section 6,
// "Reading an image that was not closed cleanly", on a log built for it. The expected content comes
// from what the test wrote, never from a reader.
import { beforeEach, describe, expect, it } from 'vitest';
import { ImageBuilder, mapped, record, ZERO_FLAG, zeroEntry } from './builder.js';
import { content, faultOf, flipped, SECTOR, scratch, withImage, withSaved } from './fixture.js';
import type { SealedImage } from './reader.js';
import { verifyRefcounts } from './refcounts.js';

const path = scratch();
const image = path('image');
const MIB = 2 ** 20;

/** Which version of `content` a sector holds, or its state when it holds none. */
function versionOf(opened: SealedImage, sector: number): number | string {
  const view = opened.inspect(sector);
  if (view.state !== 'data') return view.state;
  const plain = Buffer.from(view.plaintext ?? []);
  const version = plain.readUInt32BE(4);
  return plain.equals(content(sector, version)) ? version : 'garbage';
}

let builder: ImageBuilder;

beforeEach(() => {
  builder = new ImageBuilder({ size: 8 * MIB });
  builder.addSession(1);
  builder.addSession(2);
  builder.writeLogHeader({ sessionId: 2 });
});

const versions = (...sectors: number[]) =>
  withImage(builder, image, (opened) => sectors.map((sector) => versionOf(opened, sector)));

/** A W record in a block; `landed`: its ciphertext is at the home place. */
function logW(sector: number, version: number, landed: boolean, covered = 0) {
  const sealed = builder.seal(sector, content(sector, version), 2);
  if (landed) builder.setData(sector, sealed.ciphertext);
  return builder.block({ covered, records: [record.w(sector, sealed.entry)] });
}

function logWD(sector: number, version: number, covered = 0) {
  const sealed = builder.seal(sector, content(sector, version), 2);
  const records = [record.wd(0, sector, sealed.entry)];
  return builder.block({ covered, records, payload: [sealed.ciphertext] });
}

describe('a sector', () => {
  it('is its last W when the ciphertext reached its home', () => {
    logW(3, 1, false);
    logW(3, 2, true);
    expect(versions(3)).toEqual([2]);
  });

  it('is the home entry when the newer W never reached the medium', () => {
    builder.writeHome(3, content(3, 1));
    logW(3, 2, false);
    logW(3, 3, false);
    expect(versions(3)).toEqual([1]);
  });

  it('is an older W when only that one is on the medium', () => {
    logW(3, 1, true);
    logW(3, 2, false);
    expect(versions(3)).toEqual([1]);
  });

  it('is never older than its newest covered record', () => {
    builder.writeHome(3, content(3, 1));
    logW(3, 2, false); // covered below: its data was durable, so losing it is damage
    builder.block({ covered: 1 });
    builder.writeHome(4, content(4, 1));
    logW(4, 2, false);
    expect(versions(3, 4)).toEqual(['damaged', 1]);
  });

  it('is not what an older record holds inline, once a newer one is covered', () => {
    logWD(3, 1);
    logW(3, 2, false);
    builder.block({ covered: 2 });
    expect(versions(3)).toEqual(['damaged']);
  });

  it('looks at records after C before the newest one up to C', () => {
    logWD(3, 1);
    logWD(3, 2);
    logW(3, 3, false, 2); // covers 1 and 2; 3 itself is not on the medium
    logWD(4, 7, 2);
    expect(versions(3, 4)).toEqual([2, 7]);
  });

  it('is what a WD record holds inline, whatever is at home', () => {
    builder.writeHome(3, content(3, 1));
    logWD(3, 2);
    expect(versions(3)).toEqual([2]);
  });

  it('takes several WD records of one block, in pages and order of their own', () => {
    const [a, b] = [5, 6].map((sector) => builder.seal(sector, content(sector, 9), 2));
    if (!a || !b) throw new Error('two sectors');
    const records = [record.wd(1, 5, a.entry), record.wd(0, 6, b.entry)];
    builder.block({ records, payload: [b.ciphertext, a.ciphertext], headerPages: 2 });
    expect(versions(5, 6)).toEqual([9, 9]);
  });

  it('is zero after a Z, and data again after a write', () => {
    for (const sector of [10, 11, 12]) builder.writeHome(sector, content(sector, 1));
    builder.block({ records: [record.z(10, 2)] });
    logWD(11, 2);
    expect(versions(10, 11, 12)).toEqual(['zero', 2, 1]);
  });

  it('is zero again after a Z over the rest of the disk', () => {
    logWD(700, 1);
    builder.block({ records: [record.z(0, 2048)] });
    expect(versions(0, 700, 2047)).toEqual(['zero', 'zero', 'zero']);
  });

  it('falls back to a zero or to never having been written', () => {
    builder.setEntry(3, zeroEntry());
    logW(3, 1, false);
    logW(4, 1, false);
    expect(versions(3, 4)).toEqual(['zero', 'never']);
  });

  it('is damaged when no candidate is valid', () => {
    const { ciphertext } = builder.writeHome(3, content(3, 1));
    logW(3, 2, false);
    builder.setData(3, Buffer.from(ciphertext).fill(1, 7, 8));
    expect(versions(3)).toEqual(['damaged']);
    withSaved(builder, image, (opened) => {
      expect(faultOf(() => opened.content(3))).toBe('sector');
      expect(faultOf(() => opened.readAll())).toBe('sector');
    });
  });
});

describe('a MAP', () => {
  /** A relocation of sector 0's cluster: sectors 0 and 1 hold version 1 at the old place. */
  function relocate(copied: readonly number[], covered: number) {
    builder.writeHome(0, content(0, 1));
    builder.writeHome(1, content(1, 1));
    const { dataSlot } = builder.place(0);
    const [from, to] = [builder.hostOf(dataSlot), builder.allocate(1)];
    for (const sector of copied) {
      builder.put(to + sector * SECTOR, builder.get(from + sector * SECTOR, SECTOR));
    }
    builder.block({ records: [record.map('data', dataSlot, mapped(to), mapped(from))] });
    builder.block({ covered });
    return { from, to, dataSlot };
  }

  it('that is not covered leaves both clusters to look in', () => {
    relocate([0], 0);
    expect(versions(0, 1)).toEqual([1, 1]);
  });

  it('that is covered leaves the new one only', () => {
    relocate([0], 1);
    expect(versions(0, 1)).toEqual([1, 'damaged']);
  });

  it('that was the last but one does not count', () => {
    const { to, dataSlot } = relocate([0, 1], 1);
    const next = builder.allocate(1);
    const map = record.map('data', dataSlot, mapped(next), mapped(to));
    const sealed = builder.seal(0, content(0, 2), 2);
    builder.put(next, sealed.ciphertext);
    builder.block({ covered: 1, records: [map, record.w(0, sealed.entry)] });
    builder.put(to, Buffer.alloc(SECTOR)); // what the old cluster held of sector 0 no longer matters
    expect(versions(0, 1)).toEqual([2, 1]);
  });

  it('of both kinds makes room for a first write that the tables do not know yet', () => {
    const { dataSlot, entrySlot, dataAt } = builder.place(300);
    const [data, entries] = [builder.allocate(1), builder.allocate(1)];
    const sealed = builder.seal(300, content(300, 4), 2);
    builder.put(data + dataAt, sealed.ciphertext);
    const records = [
      record.map('data', dataSlot, mapped(data), 0n),
      record.map('entry', entrySlot, mapped(entries), 0n),
      record.w(300, sealed.entry),
    ];
    builder.block({ records });
    expect(versions(300, 301)).toEqual([4, 'never']);
    withSaved(builder, image, (opened) => {
      expect(opened.homeMapping(dataSlot).host).toBe(0);
      expect(opened.finalMapping(dataSlot).host).toBe(data);
      expect(verifyRefcounts(opened)).toMatchObject({ errors: [], leaks: [] });
    });
  });

  it('of kind entry to the zero flag zeroes all its sectors, those written later excepted', () => {
    const small = new ImageBuilder({ clusterBits: 12, size: 4 * MIB });
    builder = small;
    small.addSession(1);
    small.addSession(2);
    small.writeLogHeader({ sessionId: 2 });
    for (const sector of [127, 128, 255, 256]) small.writeHome(sector, content(sector, 1));
    const { entrySlot } = small.place(128);
    const old = mapped(small.hostOf(entrySlot));
    small.block({ records: [record.map('entry', entrySlot, ZERO_FLAG, old)] });
    logWD(200, 2);
    expect(versions(127, 128, 200, 255, 256)).toEqual([1, 'zero', 2, 'zero', 1]);
  });

  it('of kind entry from the zero flag to a cluster leaves zeros', () => {
    const { entrySlot } = builder.place(0);
    builder.setSlot(entrySlot, ZERO_FLAG);
    const entries = builder.allocate(1);
    builder.block({ records: [record.map('entry', entrySlot, mapped(entries), ZERO_FLAG)] });
    logWD(1, 2);
    expect(versions(0, 1)).toEqual(['zero', 2]);
  });

  it('of kind entry from a cluster to its copy keeps what the old one says', () => {
    builder.writeHome(0, content(0, 1));
    const { entrySlot } = builder.place(0);
    const old = mapped(builder.hostOf(entrySlot));
    const copy = builder.allocate(1); // not copied yet
    builder.block({ records: [record.map('entry', entrySlot, mapped(copy), old)] });
    expect(versions(0)).toEqual([1]);
  });
});

describe('the log', () => {
  it('ends at a WD whose ciphertext is torn, and so do all blocks after it', () => {
    builder.writeHome(3, content(3, 1));
    logWD(3, 2);
    const torn = logWD(3, 3);
    logWD(3, 4);
    builder.put(torn.payloadAt + 512, Buffer.alloc(512));
    expect(versions(3)).toEqual([2]);
    withSaved(builder, image, (opened) => expect(opened.blocks).toHaveLength(1));
  });

  it('is read across a skip block and around the ring', () => {
    const start = builder.ringPages - 3;
    const before = Buffer.alloc(16, 5);
    builder.writeLogHeader({ sessionId: 2, page: start, sequence: 40, before });
    logWD(3, 1); // 2 pages
    builder.block({ skip: true }); // the last page
    logWD(3, 2);
    expect(versions(3)).toEqual([2]);
    withSaved(builder, image, (opened) => {
      const blocks = opened.blocks.map(({ sequence, page, skip }) => ({ sequence, page, skip }));
      expect(blocks).toEqual([
        { sequence: 40, page: start, skip: false },
        { sequence: 41, page: start + 2, skip: true },
        { sequence: 42, page: 0, skip: false },
      ]);
    });
  });

  it('may be full to its last page, and is read once only', () => {
    for (let page = 0; page < builder.ringPages; page += 2) logWD(page, 1);
    withImage(builder, image, (opened) => {
      expect(opened.blocks).toHaveLength(builder.ringPages / 2);
      expect(versionOf(opened, 60)).toBe(1);
    });
  });

  it('does not go on with blocks of an older generation', () => {
    logWD(3, 1);
    logWD(3, 2);
    builder.writeLogHeader({ sessionId: 2, sequence: 3 });
    logWD(3, 3); // over the first of the old blocks; the second one is still there
    expect(versions(3)).toEqual([3]);
    withSaved(builder, image, (opened) => expect(opened.blocks).toHaveLength(1));
  });

  it('ends before a block of another history, though its own MAC holds', () => {
    for (const other of [{ before: Buffer.alloc(16, 1) }, { generation: 6 }]) {
      builder.writeLogHeader({ sessionId: 2 });
      logWD(3, 1);
      builder.block(other);
      logWD(3, 3);
      expect(versions(3)).toEqual([1]);
    }
  });

  it('ends before a block that would run over the tail', () => {
    builder.writeLogHeader({ sessionId: 2, page: 10 });
    logWD(3, 1);
    builder.block({ skip: true });
    builder.block({ skip: true }); // from page 0, over pages 10 and 11
    withImage(builder, image, (opened) => expect(opened.blocks).toHaveLength(2));
  });

  it('is empty when its header names no session, whatever the ring holds', () => {
    builder.writeHome(3, content(3, 1));
    logWD(3, 2);
    builder.writeLogHeader({ sessionId: 0 });
    expect(versions(3)).toEqual([1]);
    withSaved(builder, image, (opened) => expect(opened.closedCleanly).toBe(true));
  });

  it('takes the header with the higher serial, and the other one when that one is torn', () => {
    builder.writeHome(3, content(3, 1));
    builder.writeLogHeader({ sessionId: 0, serial: 8 });
    const older = builder.get(builder.places.log, 160);
    builder.writeLogHeader({ sessionId: 2, serial: 9 });
    builder.put(builder.places.log, older);
    logWD(3, 2);
    expect(versions(3)).toEqual([2]);
    flipped(image, [builder.places.log + SECTOR + 40], 1, () => {
      withSaved(builder, image, (opened) => expect(versionOf(opened, 3)).toBe(1));
    });
  });

  it('begins at its first block when the header that named it is gone', () => {
    builder.writeHome(3, content(3, 1));
    builder.writeLogHeader({ sessionId: 2, generation: 8 });
    logWD(3, 2);
    logWD(3, 3);
    const leave = (generation: number) => {
      builder.writeLogHeader({ sessionId: 0, generation });
      expect(versions(3)).toEqual([1]); // as long as both copies are there
      builder.put(builder.places.log + SECTOR, Buffer.alloc(160));
    };
    leave(7);
    expect(versions(3)).toEqual([3]);
    for (const generation of [8, 9]) {
      leave(generation);
      expect(versions(3)).toEqual([1]);
    }
    leave(6); // not the one before: what lies between nobody knows
    expect(faultOf(() => versions(3))).toBe('log');
    leave(7);
    builder.addSession(4); // somebody has written since
    expect(faultOf(() => versions(3))).toBe('log');
  });

  it('is a fault when it has gone round since the header that is left', () => {
    const last = builder.ringPages - 2;
    builder.writeHome(3, content(3, 1));
    builder.writeLogHeader({ sessionId: 2, page: last, sequence: 40 });
    const { at } = logWD(3, 2);
    logWD(3, 3); // at the ring's begin
    builder.put(builder.places.log + SECTOR, Buffer.alloc(160));
    expect(versions(3)).toEqual([3]);
    builder.put(at, Buffer.alloc(SECTOR)); // as if it had been written over
    expect(faultOf(() => versions(3))).toBe('log');
    builder.put(builder.places.log + SECTOR, builder.get(builder.places.log, 160));
    expect(versions(3)).toEqual([1]);
  });

  it('is a fault when a later block says that one was durable which is not found', () => {
    builder.writeHome(3, content(3, 1));
    builder.writeLogHeader({ sessionId: 2 });
    logWD(3, 2);
    const { at } = logWD(3, 3);
    logWD(4, 4, 2); // covers both
    builder.put(builder.places.log + SECTOR, Buffer.alloc(160));
    expect(versions(3)).toEqual([3]);
    builder.put(at, Buffer.alloc(SECTOR));
    expect(faultOf(() => versions(3))).toBe('log');
    builder.put(builder.places.log + SECTOR, builder.get(builder.places.log, 160));
    expect(versions(3)).toEqual([2]);
  });

  it('takes records beyond the size of a header that is older than the growth', () => {
    logWD(3, 1);
    logWD(2048, 2);
    builder.block({ records: [record.z(builder.mappable - 1, 1)] });
    logWD(4, 3);
    expect(versions(3, 4)).toEqual([1, 3]);
  });

  it('with records that make no sense under a good MAC is a fault of the image', () => {
    const { entry, ciphertext } = builder.seal(3, content(3), 2);
    const { dataSlot, entrySlot } = builder.place(0);
    const bad = [
      [record.w(builder.mappable, entry)], // beyond what the tables map
      [record.z(builder.mappable - 1, 2)],
      [record.z(0, 0)],
      [record.wd(1, 3, entry)], // no such payload page
      [record.w(3, zeroEntry())],
      [record.map('entry', dataSlot, 0n, 0n)],
      [record.map('data', entrySlot, 0n, 0n)],
      [record.map('data', dataSlot, mapped(4096), 0n)], // not aligned
      [record.map('data', 8192 * 9, 0n, 0n)], // no such L2 table
      [Buffer.alloc(24, 9)], // no such type
      [record.w(3, entry).subarray(0, 40)], // cut short
    ];
    for (const [index, records] of bad.entries()) {
      builder.writeLogHeader({ sessionId: 2 });
      builder.block({ records, payload: [ciphertext] });
      const fault = faultOf(() => withImage(builder, image, () => 0));
      expect(['log', 'tables'], `case ${index}`).toContain(fault);
    }
  });

  it('is authenticated under the suite of the disk', () => {
    builder = new ImageBuilder({ size: MIB, suite: 2 });
    builder.addSession(1);
    builder.addSession(2);
    builder.writeLogHeader({ sessionId: 2 });
    logWD(3, 2);
    expect(versions(3)).toEqual([2]);
  });
});
