// The adversary against the second reader: every byte class of a sealed image is changed in turn, and
// the outcome must be a fault, or what docs/format.md says of redundant copies. This also shows that
// the reader's checks can fail, without which it would be no oracle.
import { ml_kem768 } from '@noble/post-quantum/ml-kem.js';
import { beforeAll, describe, expect, it } from 'vitest';
import { ImageBuilder, mapped, record, zeroEntry } from './builder.js';
import { content, faultOf, flipped, SECTOR, scratch, withImage, withSaved } from './fixture.js';
import { openWithPrivateKey } from './reader.js';

const path = scratch();
const image = path('image');
const MIB = 2 ** 20;
const { publicKey, secretKey } = ml_kem768.keygen();
const backing = { name: 'base.qcow2' };

let builder: ImageBuilder;
let logged: { at: number; payloadAt: number };

/** Sectors 0 to 3 at home (version 1), sector 3 also in the log (version 2). */
beforeAll(() => {
  builder = new ImageBuilder({ size: 4 * MIB, recipients: [publicKey], backing });
  builder.addSession(1);
  builder.addSession(2);
  for (const sector of [0, 1, 2, 3]) builder.writeHome(sector, content(sector, 1));
  builder.writeLogHeader({ sessionId: 2 });
  const { entry, ciphertext } = builder.seal(3, content(3, 2), 2);
  logged = builder.block({ records: [record.wd(0, 3, entry)], payload: [ciphertext] });
  builder.save(image);
});

const range = (start: number, count: number) => Array.from({ length: count }, (_, i) => start + i);

const faultWith = (offsets: number[], mask = 0x55) =>
  flipped(image, offsets, mask, () => faultOf(() => withSaved(builder, image, () => 0)));

const stateWith = (sector: number, offsets: number[], mask = 0x55) =>
  flipped(image, offsets, mask, () =>
    withSaved(builder, image, (opened) => opened.inspect(sector).state),
  );

/** The version that sector 3 has while these bytes are changed. */
const versionWith = (offsets: number[], mask = 0x55) =>
  flipped(image, offsets, mask, () =>
    withSaved(builder, image, (opened) => Buffer.from(opened.content(3)).readUInt32BE(4)),
  );

it('opens and reads what nobody changed', () => {
  withSaved(builder, image, (opened) => {
    expect([0, 1, 2].map((sector) => opened.inspect(sector).state)).toEqual(Array(3).fill('data'));
    expect(Buffer.from(opened.content(3)).equals(content(3, 2))).toBe(true);
  });
});

describe('the header', () => {
  it.each([0x01, 0x80])('does not open with any one of its 512 bytes changed by %i', (mask) => {
    for (const offset of range(0, 512)) {
      if (offset === 79 && mask === 1) continue; // the dirty bit
      const fault = faultWith([offset], mask);
      const faults = ['header', 'header-mac', 'regions', 'key-area', 'wrong-key', 'tables'];
      expect(faults, `byte ${offset}`).toContain(fault);
    }
  });

  it('does not open, whoever made its MAC, with regions that overlap or are not there', () => {
    const cases = [
      (b: ImageBuilder) => ({ sessionB: b.places.sessionA }),
      (b: ImageBuilder) => ({ keyB: b.places.keyA + b.clusterBytes }),
      (b: ImageBuilder) => ({ log: b.places.l1 }),
      () => ({ sessionA: 0 }),
      (b: ImageBuilder) => ({ keyB: b.places.keyB + SECTOR }),
      () => ({ log: 2 ** 40 }),
    ];
    for (const [index, change] of cases.entries()) {
      const other = new ImageBuilder({ size: MIB });
      Object.assign(other.places, change(other));
      const fault = faultOf(() => withImage(other, path('regions'), () => 0));
      expect(fault, `case ${index}`).toBe('regions');
    }
  });

  it('does not open with another backing name', () => {
    for (const offset of range(640, backing.name.length)) {
      expect(faultWith([offset])).toBe('header-mac');
    }
  });

  it('does not open with the integrity key of another disk', () => {
    const keys = { ...builder.keys, integrityKey: Buffer.alloc(32, 1) };
    const open = () => withSaved({ ...builder, keys } as unknown as ImageBuilder, image, () => 0);
    expect(faultOf(open)).toBe('header-mac');
  });
});

describe('the key area', () => {
  it('stands the loss of either copy, not of both', () => {
    const { keyA, keyB } = builder.places;
    const classes = [0, 8, 15, 16, 20, 32, 63, SECTOR, SECTOR + 30_000, SECTOR + 65_535];
    for (const at of classes) {
      expect(faultWith([keyA + at]), `A ${at}`).toBeUndefined();
      expect(faultWith([keyB + at]), `B ${at}`).toBeUndefined();
      expect(faultWith([keyA + at, keyB + at]), `both ${at}`).toBe('key-area');
    }
  });

  it('takes the copy of the higher generation that opens, whatever its number', () => {
    const other = new ImageBuilder({ size: MIB, recipients: [publicKey] });
    const good = other.get(other.places.keyA + SECTOR, 65_536);
    const claims = Buffer.from(good);
    claims[16] = 9; // a generation that the MAC does not know
    other.putKeyArea(claims, [5n, 5n]);
    const bad = other.get(other.places.keyA, 69_632);
    other.putKeyArea(good, [2n ** 64n - 1n, 2n ** 64n - 1n]);
    other.put(other.places.keyA, bad);
    other.save(path('generations'));
    const open = () => openWithPrivateKey(path('generations'), secretKey);
    const opened = open();
    expect([opened.keyArea.generations, opened.keyArea.valid]).toEqual([
      [9n, 1n],
      [true, true],
    ]);
    opened.close();
    flipped(path('generations'), [other.places.keyB + 40], 1, () => {
      expect(faultOf(open)).toBe('key-area'); // now the copy that lies is all there is
    });
  });

  it('does not open with any field of the blob changed, though its checksum holds', () => {
    const other = new ImageBuilder({ size: MIB, recipients: [publicKey] });
    const blob = other.get(other.places.keyA + SECTOR, 65_536);
    const slot = 4096;
    const head = [
      0, 8, 10, 12, 14, 16, 24, 40, 44, 48, 50, 52, 56, 64, 127, 128, 140, 160, 200, 4064,
    ];
    const inSlot = [0, 4, 6, 7, 8, 10, 12, 14, 16, 32, 40, 48, 50, 52, 54, 64, 192, 512, 2112];
    const tail = [4004, 4035, 4036, 4048, 4080, 4095];
    const classes = [...head, ...[...inSlot, ...tail].map((at) => slot + at), 2 * slot, 65_535];
    for (const at of classes) {
      const changed = Buffer.from(blob);
      changed[at] = (changed[at] ?? 0) ^ 0x10;
      other.putKeyArea(changed, [1n, 1n]);
      other.save(path('blob'));
      const fault = faultOf(() => openWithPrivateKey(path('blob'), secretKey).close());
      expect(['key-area', 'wrong-key'], `byte ${at}`).toContain(fault);
    }
  });
});

describe('the session table', () => {
  it('stands damage to one copy of an entry', () => {
    for (const at of [0, 4, 8, 16, 48, 96, 127]) {
      const offset = 128 + at; // session 1
      expect(stateWith(0, [builder.places.sessionA + offset])).toBe('data');
      expect(stateWith(0, [builder.places.sessionB + offset])).toBe('data');
    }
  });

  it('loses the sectors of a session whose entry is bad in both, at every byte', () => {
    const { sessionA, sessionB } = builder.places;
    for (const at of range(128, 128)) {
      expect(stateWith(0, [sessionA + at, sessionB + at]), `byte ${at}`).toBe('damaged');
    }
  });

  it('is refused when both heads are bad, and when it lacks the session of the log', () => {
    const { sessionA, sessionB } = builder.places;
    for (const at of [0, 8, 12, 16, 95, 96, 127]) {
      expect(faultWith([sessionA + at, sessionB + at])).toBe('sessions');
    }
    expect(faultWith([sessionA + 256 + 20, sessionB + 256 + 20])).toBe('log');
  });

  it('is refused when its copies disagree on a session', () => {
    const other = new ImageBuilder({ size: MIB });
    other.addSession(1);
    const before = other.get(other.places.sessionA, SECTOR);
    other.addSession(1); // a new salt, in the next place
    const after = other.get(other.places.sessionA, SECTOR);
    const spliced = Buffer.concat([before.subarray(0, 256), Buffer.alloc(SECTOR - 256)]);
    other.put(other.places.sessionA, spliced);
    after.copy(after, 128, 256, 384);
    after.fill(0, 256);
    other.put(other.places.sessionB, after);
    expect(faultOf(() => withImage(other, path('spliced'), () => 0))).toBe('sessions');
  });
});

describe('sectors and entries', () => {
  it('does not read a sector with any byte of its entry changed', () => {
    for (const mask of [0x01, 0x40, 0x80, 0xc0]) {
      for (const offset of range(builder.entryOffset(0), 32)) {
        expect(stateWith(0, [offset], mask), `byte ${offset} by ${mask}`).toBe('damaged');
      }
    }
  });

  it('does not take an entry that is in none of the three forms', () => {
    const other = new ImageBuilder({ size: MIB });
    other.addSession(1);
    const forms: [at: number, word: number][] = [
      [28, 0xc000_0000], // no such state
      [28, 0x4000_0000], // data of no session
      [28, 0x8000_0001], // zero, with a session
      [28, 0x0000_0001], // never, with a session
      [0, 0x0000_0001], // never, with a tag
      [24, 0x0000_0001], // never, with a nonce
    ];
    for (const [sector, [at, word]] of forms.entries()) {
      const entry = Buffer.alloc(32);
      entry.writeUInt32BE(word, at);
      other.setEntry(sector, entry);
    }
    const tagged = zeroEntry();
    tagged[5] = 1;
    other.setEntry(forms.length, tagged);
    withImage(other, path('forms'), (opened) => {
      const states = [...forms, tagged].map((_, sector) => opened.inspect(sector).state);
      expect(states).toEqual(Array(7).fill('damaged'));
    });
  });

  it('does not read a sector with a byte of its ciphertext changed, and harms no neighbour', () => {
    const host = builder.hostOf(builder.place(0).dataSlot);
    for (const at of [0, 1, 511, 512, 2048, 4095]) {
      expect(stateWith(0, [host + at], 1)).toBe('damaged');
      expect(stateWith(1, [host + at], 1)).toBe('data');
    }
  });

  it('does not read sectors that were swapped with their entries', () => {
    const other = new ImageBuilder({ size: MIB });
    other.addSession(1);
    const sealed = [0, 1].map((sector) => other.seal(sector, content(sector)));
    for (const [index, { entry, ciphertext }] of sealed.entries()) {
      other.setData(1 - index, ciphertext);
      other.setEntry(1 - index, entry);
    }
    withImage(other, path('swapped'), (opened) => {
      expect([0, 1].map((sector) => opened.inspect(sector).state)).toEqual(['damaged', 'damaged']);
    });
  });

  it('does not read clusters that were swapped in the L2 table', () => {
    const other = new ImageBuilder({ size: MIB });
    other.addSession(1);
    const slots = [0, 16].map((sector) => {
      other.writeHome(sector, content(sector));
      return other.place(sector).dataSlot;
    });
    const hosts = slots.map((slot) => other.hostOf(slot));
    other.setSlot(slots[0] ?? 0, mapped(hosts[1] ?? 0));
    other.setSlot(slots[1] ?? 0, mapped(hosts[0] ?? 0));
    withImage(other, path('mapped'), (opened) => {
      expect([0, 16].map((sector) => opened.inspect(sector).state)).toEqual(['damaged', 'damaged']);
    });
  });

  it('refuses bits in L1 and L2 entries that must be zero', () => {
    const { dataSlot } = builder.place(0);
    const [l1, l2] = [builder.places.l1, builder.slotAt(dataSlot)];
    for (const [offset, mask] of [
      [l2, 0x40], // compressed
      [l2, 0x20],
      [l2 + 6, 0x10], // not aligned
      [l2 + 7, 0x02],
      [l1, 0x01],
      [l1 + 7, 0x01],
    ] as const) {
      expect(stateWith(0, [offset], mask), `byte ${offset} by ${mask}`).toBe('damaged');
    }
  });
});

describe('the log', () => {
  it('is refused when both headers have any byte changed', () => {
    const { log } = builder.places;
    for (const at of range(0, 160)) {
      expect(faultWith([log + at, log + SECTOR + at]), `byte ${at}`).toBe('log');
    }
  });

  it('ends before a block with any byte of its header or records changed', () => {
    for (const at of range(logged.at, 96 + 48)) {
      expect(versionWith([at]), `byte ${at - logged.at}`).toBe(1);
    }
  });

  it('ends before a block with its payload changed', () => {
    for (const at of [0, 2048, 4095]) expect(versionWith([logged.payloadAt + at])).toBe(1);
  });

  it('does not mind what no MAC covers', () => {
    expect(versionWith([logged.at + 96 + 48, logged.at + 4095])).toBe(2);
  });
});
