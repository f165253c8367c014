// What every writer of sealed images must satisfy, told as tests: the second reader is the oracle of
// the bytes, a flat array is the oracle of the content.
//
// A writer is handed in behind `Writer`, so that the same cases run over the builder of these tests
// (which shows that they run, and can fail) and over the engine.
import { copyFileSync } from 'node:fs';
import { ml_kem768 } from '@noble/post-quantum/ml-kem.js';
import { describe, expect, it } from 'vitest';
import { ENTRY_BYTES, placeOf } from './entries.js';
import { SECTOR, scratch } from './fixture.js';
import { featureNames } from './header.js';
import { openWithPrivateKey, type SealedImage } from './reader.js';
import { verifyRefcounts } from './refcounts.js';

export interface WriterOptions {
  readonly size: number;
  readonly clusterBits: number;
  readonly suite: 1 | 2;
  /** An ML-KEM-768 key pair, in the forms of FIPS 203. */
  readonly encapsulationKey: Uint8Array;
  readonly decapsulationKey: Uint8Array;
}

export interface WrittenDisk {
  write(offset: number, bytes: Uint8Array): Promise<void>;
  /** Write-zeroes; whole sectors and parts of them. */
  zero(offset: number, length: number): Promise<void>;
  /** When it is done, a copy of the file holds everything that was written. */
  flush(): Promise<void>;
  /** Ends cleanly: the log is empty afterwards. */
  close(): Promise<void>;
}

export interface Writer {
  create(path: string, options: WriterOptions): Promise<WrittenDisk>;
  /** Opens what `create` made and closed. */
  open(path: string, options: WriterOptions): Promise<WrittenDisk>;
}

const MIB = 2 ** 20;
const FEATURE = 'sealed disk (pqblk): keys needed';

/** xorshift32: the same requests every time, and a seed that a failure can name. */
function randomly(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}

/** One random request to both, the disk and the array that says what it must hold. */
async function step(disk: WrittenDisk, model: Buffer, random: (below: number) => number) {
  const aligned = random(2) === 0;
  const unit = aligned ? SECTOR : 512;
  const offset = random(model.length / 512) * 512;
  const start = offset - (offset % unit);
  const length = Math.min((1 + random(aligned ? 40 : 20)) * unit, model.length - start);
  if (random(5) === 0) {
    model.fill(0, start, start + length);
    await disk.zero(start, length);
    return;
  }
  const bytes = Buffer.alloc(length);
  for (let at = 0; at < length; at += 4) bytes.writeUInt32LE(random(2 ** 31), at);
  model.set(bytes, start);
  await disk.write(start, bytes);
}

function expectContent(image: SealedImage, model: Buffer, seed: number): void {
  for (const view of image.walk()) {
    expect(view.state, `seed ${seed}: ${view.reason}`).not.toBe('damaged');
  }
  const all = Buffer.from(image.readAll());
  const first = all.findIndex((byte, at) => byte !== model[at]);
  expect(first, `seed ${seed}: sector ${Math.floor(first / SECTOR)}`).toBe(-1);
}

/** No two entries on the medium have one (session, nonce) pair: the one unforgivable error. */
function expectDistinctNonces(image: SealedImage): void {
  const seen = new Map<string, number>();
  for (let sector = 0; sector < image.geometry.sectors; sector += 1) {
    const place = placeOf(image.geometry, sector);
    const { host, zero } = image.homeMapping(place.entrySlot);
    if (host === 0 || zero) continue;
    const entry = Buffer.from(image.readHost(host + place.entryAt, ENTRY_BYTES));
    if (entry.readUInt32BE(28) >>> 30 !== 1) continue;
    const pair = entry.toString('hex', 16);
    expect(seen.get(pair), `sectors ${seen.get(pair)} and ${sector}`).toBeUndefined();
    seen.set(pair, sector);
  }
}

/** Declares the tests over one writer; test/reader/writer.test.ts shows how to hand one in. */
export function writerCases(writer: Writer): void {
  const path = scratch();
  const { publicKey, secretKey } = ml_kem768.keygen();
  const keys = { encapsulationKey: publicKey, decapsulationKey: secretKey };

  const withReader = (file: string, look: (image: SealedImage) => void) => {
    const image = openWithPrivateKey(file, secretKey, { aead: 'fast' });
    try {
      look(image);
    } finally {
      image.close();
    }
  };

  const matrix = [12, 16, 21].flatMap((clusterBits) =>
    ([1, 2] as const).map((suite) => ({ clusterBits, suite })),
  );

  describe.each(matrix)('clusters of 2^$clusterBits, suite $suite', ({ clusterBits, suite }) => {
    const options: WriterOptions = { size: 6 * MIB + 1536, clusterBits, suite, ...keys };

    it('a fresh disk is closed, empty, and every sector was never written', async () => {
      await (await writer.create(path('fresh'), options)).close();
      withReader(path('fresh'), (image) => {
        expect(image.closedCleanly).toBe(true);
        expect([image.header.dirty, image.header.corrupt]).toEqual([false, false]);
        expect(image.header.size).toBe(options.size);
        expect(image.header.clusterBits).toBe(clusterBits);
        expect(image.header.suite).toBe(suite);
        expect(featureNames(image.header).get('0:56')).toBe(FEATURE);
        expect(image.keyArea.valid).toEqual([true, true]);
        for (const view of image.walk()) expect(view.state).toBe('never');
        expect(verifyRefcounts(image)).toMatchObject({ errors: [], leaks: [] });
      });
    });

    it('holds what was written, over several lives, whenever it is closed', async () => {
      const seed = 0x5eed + clusterBits * 2 + suite;
      const random = randomly(seed);
      const model = Buffer.alloc(options.size);
      for (let life = 0; life < 3; life += 1) {
        const open = life === 0 ? writer.create : writer.open;
        const disk = await open.call(writer, path('lives'), options);
        for (let request = 0; request < 60; request += 1) await step(disk, model, random);
        await disk.close();
        withReader(path('lives'), (image) => {
          expect(image.closedCleanly).toBe(true);
          expect(image.header.dirty).toBe(false);
          expectContent(image, model, seed);
          expectDistinctNonces(image);
          expect(verifyRefcounts(image)).toMatchObject({ errors: [], leaks: [] });
        });
      }
    });

    it('holds what was flushed in a copy of the file that is taken while it is open', async () => {
      const seed = 0xc0de + clusterBits * 2 + suite;
      const random = randomly(seed);
      const model = Buffer.alloc(options.size);
      const disk = await writer.create(path('crash'), options);
      let unclean = 0;
      for (let round = 0; round < 4; round += 1) {
        for (let request = 0; request < 15; request += 1) await step(disk, model, random);
        await disk.flush();
        copyFileSync(path('crash'), path('copy'));
        withReader(path('copy'), (image) => {
          if (!image.closedCleanly) unclean += 1;
          expectContent(image, model, seed);
          expect(verifyRefcounts(image).errors).toEqual([]);
        });
      }
      await disk.close();
      expect(unclean).toBeGreaterThan(0); // else the fold was never looked at
    });
  });
}
