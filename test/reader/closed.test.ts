// The second reader on images that were closed cleanly, built from docs/format.md by builder.ts.
import { writeFileSync } from 'node:fs';
import { ml_kem768, ml_kem1024 } from '@noble/post-quantum/ml-kem.js';
import { describe, expect, it } from 'vitest';
import { ImageBuilder, ZERO_FLAG, zeroEntry } from './builder.js';
import { runReader } from './cli.js';
import { content, faultOf, SECTOR, scratch, withImage, withSaved } from './fixture.js';
import { featureNames } from './header.js';
import { openWithPrivateKey } from './reader.js';
import { verifyRefcounts } from './refcounts.js';

const path = scratch();
const MIB = 2 ** 20;

const matrix = [9, 12, 13, 16, 18, 21, 22].flatMap((clusterBits) =>
  ([1, 2] as const).map((suite) => ({ clusterBits, suite })),
);

describe.each(matrix)('clusters of 2^$clusterBits, suite $suite', ({ clusterBits, suite }) => {
  if (clusterBits < 12 || clusterBits > 21) {
    it('are refused', () => {
      const builder = new ImageBuilder({ size: MIB, suite });
      builder.save(path('bits'));
      const bytes = Buffer.alloc(4);
      bytes.writeUInt32BE(clusterBits);
      builder.patch(path('bits'), 20, bytes);
      expect(faultOf(() => withSaved(builder, path('bits'), () => 0))).toBe('header');
    });
    return;
  }

  it('return what was written, zeros and holes', () => {
    // Beyond the first L2 table where clusters are small, and with a partial last sector.
    const size = 40 * MIB + 512;
    const builder = new ImageBuilder({ clusterBits, suite, size });
    builder.addSession(1);
    builder.addSession(2 ** 30 - 1);
    const sectors = size / SECTOR;
    const last = Math.floor(sectors);
    const written = [0, 1, 7, 508, 1023, 5000, last];
    for (const sector of written) {
      builder.writeHome(sector, content(sector), sector % 2 === 0 ? 1 : 2 ** 30 - 1);
    }
    builder.setEntry(9, zeroEntry());
    withImage(
      builder,
      path('closed'),
      (image) => {
        expect(image.closedCleanly).toBe(true);
        const all = Buffer.from(image.readAll());
        expect(all.length).toBe(size);
        for (const sector of written) {
          const expected = content(sector).subarray(0, size - sector * SECTOR);
          const actual = all.subarray(sector * SECTOR, (sector + 1) * SECTOR);
          expect(actual.equals(expected), `sector ${sector}`).toBe(true);
          actual.fill(0);
        }
        expect(all.equals(Buffer.alloc(size))).toBe(true);
        expect(image.inspect(9)).toEqual({ sector: 9, state: 'zero' });
        expect(image.inspect(10)).toEqual({ sector: 10, state: 'never' });
        expect(image.inspect(1)).toMatchObject({ sessionId: 2 ** 30 - 1, epoch: 1 });
        expect(verifyRefcounts(image)).toMatchObject({ errors: [], leaks: [] });
      },
      { aead: 'fast' },
    );
  });
});

describe('a closed image', () => {
  it('reads the same with noble and with the fast option', () => {
    const builder = new ImageBuilder({ size: MIB });
    builder.addSession(1);
    for (let sector = 0; sector < 64; sector += 1) builder.writeHome(sector, content(sector));
    builder.save(path('both'));
    const [slow, fast] = (['noble', 'fast'] as const).map((aead) =>
      withSaved(builder, path('both'), (image) => Buffer.from(image.readAll()), { aead }),
    );
    expect(fast && slow?.equals(fast)).toBe(true);
  });

  it('reads sectors that were never written from its backing', () => {
    const backing = { name: 'base.qcow2', uuid: Buffer.alloc(16, 7) };
    const builder = new ImageBuilder({ size: MIB, backing });
    builder.addSession(1);
    builder.writeHome(3, content(3));
    builder.setEntry(4, zeroEntry());
    const look = { backing: (sector: number) => content(sector, 99) };
    withImage(
      builder,
      path('overlay'),
      (image) => {
        expect(Buffer.from(image.header.backingName).toString()).toBe('base.qcow2');
        expect(Buffer.from(image.content(2)).equals(content(2, 99))).toBe(true);
        expect(Buffer.from(image.content(3)).equals(content(3))).toBe(true);
        expect(Buffer.from(image.content(4)).equals(Buffer.alloc(SECTOR))).toBe(true);
      },
      look,
    );
  });

  it('takes the zero flag of an entry cluster as zero for all its sectors', () => {
    const builder = new ImageBuilder({ clusterBits: 12, size: 4 * MIB });
    const { entrySlot } = builder.place(130);
    builder.setSlot(entrySlot, ZERO_FLAG);
    withImage(builder, path('zeroflag'), (image) => {
      const states = [127, 128, 255, 256].map((sector) => image.inspect(sector).state);
      expect(states).toEqual(['never', 'zero', 'zero', 'never']);
    });
  });

  it('names its feature bit, and dirty and corrupt bits do not concern the MAC', () => {
    const builder = new ImageBuilder({ size: MIB });
    builder.features = 3n;
    withImage(builder, path('dirty'), (image) => {
      expect(featureNames(image.header).get('0:56')).toBe('sealed disk (pqblk): keys needed');
      expect([image.header.dirty, image.header.corrupt]).toEqual([true, true]);
      expect(image.closedCleanly).toBe(true);
    });
  });

  it('uses the data key of the epoch of each session', () => {
    const dataKeys = new Map([1, 5].map((epoch) => [epoch, Buffer.alloc(32, epoch)]));
    const builder = new ImageBuilder({ size: MIB, dataKeys });
    builder.addSession(1, 1);
    builder.addSession(2, 5);
    builder.writeHome(0, content(0), 1);
    builder.writeHome(1, content(1), 2);
    withImage(builder, path('epochs'), (image) => {
      expect(image.inspect(1)).toMatchObject({ state: 'data', sessionId: 2, epoch: 5 });
      expect(Buffer.from(image.readAll()).subarray(0, SECTOR).equals(content(0))).toBe(true);
    });
    dataKeys.delete(5);
    withSaved(builder, path('epochs'), (image) => {
      expect(image.inspect(0).state).toBe('data');
      expect(image.inspect(1)).toMatchObject({ state: 'damaged' });
    });
  });

  it('finds leaks, refcounts that are too low, and wrong COPIED flags', () => {
    const builder = new ImageBuilder({ size: MIB });
    builder.addSession(1);
    builder.writeHome(0, content(0));
    const leaked = builder.allocate(1);
    const host = builder.hostOf(builder.place(0).dataSlot);
    builder.refcounts.set(host, 0);
    const entries = builder.hostOf(builder.place(0).entrySlot);
    builder.refcounts.set(entries, 2);
    withImage(builder, path('refcounts'), (image) => {
      const report = verifyRefcounts(image);
      expect([...report.leaks].sort((a, b) => a - b)).toEqual(
        [leaked, entries].sort((a, b) => a - b),
      );
      expect(report.errors).toHaveLength(3); // too low, COPIED at 0, COPIED at 2
    });
  });
});

describe('a private key', () => {
  const kems = [
    { name: 'ML-KEM-768', kem: ml_kem768 },
    { name: 'ML-KEM-1024', kem: ml_kem1024 },
  ];

  it.each(kems)('of $name opens the image, another one does not', ({ kem }) => {
    const [other, own, stranger] = [ml_kem768.keygen(), kem.keygen(), kem.keygen()];
    const recipients = [other.publicKey, own.publicKey];
    const builder = new ImageBuilder({ size: MIB, recipients });
    builder.addSession(1);
    builder.writeHome(5, content(5));
    builder.save(path('private'));
    for (const { secretKey } of [own, other]) {
      const image = openWithPrivateKey(path('private'), secretKey);
      expect(Buffer.from(image.content(5)).equals(content(5))).toBe(true);
      image.close();
    }
    const open = () => openWithPrivateKey(path('private'), stranger.secretKey);
    expect(faultOf(open)).toBe('wrong-key');
  });

  it('opens it through the command, which reports what it found', () => {
    const { publicKey, secretKey } = ml_kem768.keygen();
    const builder = new ImageBuilder({ size: MIB, recipients: [publicKey] });
    builder.addSession(1);
    builder.writeHome(5, content(5));
    builder.save(path('cli'));
    writeFileSync(path('cli.key'), secretKey);
    const lines: string[] = [];
    const print = (line: string) => lines.push(line);
    const args = [path('cli'), '--secret-key', path('cli.key'), '--sha3'];
    expect(runReader(args, print)).toBe(0);
    const dataKeys = Object.fromEntries(
      [...builder.dataKeys].map(([epoch, key]) => [epoch, Buffer.from(key).toString('hex')]),
    );
    const integrityKey = builder.integrityKey.toString('hex');
    writeFileSync(path('cli.json'), JSON.stringify({ integrityKey, dataKeys }));
    expect(runReader([path('cli'), '--keys', path('cli.json'), '--fast', '--sha3'], print)).toBe(0);
    const [a, b] = lines.map((line) => JSON.parse(line));
    expect(a).toEqual(b);
    expect(a).toMatchObject({ states: { never: 255, data: 1, zero: 0 }, closedCleanly: true });
    expect(runReader([path('cli')], print)).toBe(2);
  });
});
