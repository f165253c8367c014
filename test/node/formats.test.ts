// Every format through the public API: a flat model, closing and reopening, checking, copying.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import {
  type CreateDiskOptions,
  checkDisk,
  createDisk,
  type DiskFormat,
  diskInfo,
  exportFile,
  importFile,
  KeyStore,
  type OpenDiskOptions,
  openDisk,
} from '../../src/index.js';
import { person } from '../keys/support.js';
import { DIST, expectKind, randomBuffer, randomNumbers, scratch, WRITER } from './support.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const directory = scratch();
const owner = await person('owner');
const stranger = await person('stranger');

interface Case {
  name: string;
  create: Omit<CreateDiskOptions, 'size'>;
}

const CASES: Case[] = [
  { name: 'raw', create: { format: 'raw' } },
  { name: 'qcow2', create: { format: 'qcow2' } },
  { name: 'qcow2, 4 KiB clusters', create: { format: 'qcow2', clusterSize: 4 * KIB } },
  { name: 'sealed', create: { format: 'sealed' } },
  {
    name: 'sealed, ChaCha20, 16 KiB clusters, small log',
    create: {
      format: 'sealed',
      suite: 'ChaCha20-Poly1305',
      clusterSize: 16 * KIB,
      logBytes: 256 * KIB,
    },
  },
];

let made = 0;
async function make(create: Case['create'], size: number): Promise<string> {
  made += 1;
  const path = join(directory, `disk-${made}`);
  const recipients = create.format === 'sealed' ? { recipients: [owner.recipient] } : {};
  await createDisk(path, { ...create, ...recipients, size });
  return path;
}

const keysFor = (format: DiskFormat) => (format === 'sealed' ? { identity: owner.identity } : {});

function open(path: string, format: DiskFormat, options: Partial<OpenDiskOptions> = {}) {
  return openDisk(path, { format, ...keysFor(format), ...options });
}

describe.each(CASES)('$name', ({ create }) => {
  const { format } = create;

  test('agrees with a flat buffer, also after reopening', async () => {
    const size = 6 * MIB + 512;
    const path = await make(create, size);
    const model = Buffer.alloc(size);
    const random = randomNumbers(20260);
    for (let life = 0; life < 3; life++) {
      await using disk = await open(path, format, { queues: 2 });
      expect(disk.size).toBe(size);
      const before = Buffer.alloc(size);
      await disk.read(before, 0);
      expect(before.equals(model), `life ${life}`).toBe(true);
      for (let round = 0; round < 12; round++) {
        const work: Promise<void>[] = [];
        for (let at = random(size / 2); at < size && work.length < 30; ) {
          const length = Math.min(1 + random(random(8) === 0 ? MIB : 9000), size - at);
          if (random(6) === 0) {
            work.push(disk.writeZeroes(at, length, { unmap: random(2) === 0 }));
            model.fill(0, at, at + length);
          } else {
            const data = randomBuffer(length);
            work.push(disk.write(data, at, { fua: random(12) === 0 }));
            data.copy(model, at);
          }
          at += length + (random(2) === 0 ? 0 : random(5000));
        }
        if (random(3) === 0) work.push(disk.flush());
        await Promise.all(work);
        const from = random(size);
        const some = Buffer.alloc(1 + random(size - from));
        await disk.read(some, from);
        expect(some.equals(model.subarray(from, from + some.length))).toBe(true);
      }
    }
    const check = await checkDisk(path, { format, ...keysFor(format) });
    expect(check).toMatchObject({ clean: true, corruptions: 0, leaks: 0, sectorsBad: 0 });
    if (format === 'sealed') expect(check.sectorsVerified).toBeGreaterThan(1000);
  });

  test('grows, and the new part reads as zeros', async () => {
    const path = await make(create, 2 * MIB);
    {
      await using disk = await open(path, format);
      await disk.write(Buffer.alloc(MIB, 1), 0);
      await disk.resize(64 * MIB);
      const end = Buffer.alloc(MIB, 9);
      await disk.read(end, 63 * MIB);
      expect(end.every((byte) => byte === 0)).toBe(true);
      await disk.write(Buffer.from('end'), 64 * MIB - 3);
    }
    await using disk = await open(path, format, { readOnly: true });
    expect(disk.size).toBe(64 * MIB);
    const found = Buffer.alloc(3);
    await disk.read(found, 64 * MIB - 3);
    expect(found.toString()).toBe('end');
  });

  test('import and export keep content and holes', async () => {
    const source = join(directory, `source-${made}.raw`);
    const size = 24 * MIB;
    const content = Buffer.alloc(size);
    randomBuffer(3 * MIB + 777).copy(content, 5 * MIB + 100);
    randomBuffer(4096).copy(content, size - 4096);
    writeFileSync(source, content);
    const path = await make(create, size);
    {
      await using disk = await open(path, format);
      const seen: number[] = [];
      const copied = await importFile(source, disk, {
        format: 'raw',
        targetIsZero: true,
        onProgress: (done, total) => {
          expect(total).toBe(size);
          seen.push(done);
        },
      });
      expect(copied.copiedBytes).toBeLessThan(4 * MIB);
      expect(copied.copiedBytes + copied.zeroBytes).toBe(size);
      expect(seen.at(-1)).toBe(size);
    }
    await using disk = await open(path, format, { readOnly: true });
    const raw = join(directory, `out-${made}.raw`);
    await exportFile(disk, raw, { format: 'raw' });
    expect(readFileSync(raw).equals(content)).toBe(true);
    expect(statSync(raw).blocks * 512).toBeLessThan(6 * MIB);
    const qcow2 = join(directory, `out-${made}.qcow2`);
    await exportFile(disk, qcow2, { format: 'qcow2' });
    const compare = ['compare', '-f', 'raw', '-F', 'qcow2', source, qcow2];
    expect(spawnSync('qemu-img', compare, { encoding: 'utf8' }).stdout).toContain('identical');
    await expectKind(exportFile(disk, raw, { format: 'raw' }), 'exists');
    const stop = AbortSignal.abort();
    const other = join(directory, `stopped-${made}`);
    await expectKind(exportFile(disk, other, { format: 'raw', signal: stop }), 'canceled');
    expect(existsSync(other)).toBe(false);
  });

  test('info describes it without a key', async () => {
    const path = await make(create, 8 * MIB);
    const info = await diskInfo(path);
    expect(info).toMatchObject({ format, size: 8 * MIB, path });
    await using disk = await open(path, format);
    expect((await diskInfo(path)).lockHolder?.pid).toBe(process.pid);
    expect(disk.facts.format).toBe(format);
  });
});

describe('creating', () => {
  test('refusals name their reason, and leave nothing behind', async () => {
    const path = join(directory, 'refused');
    const refused = async (options: CreateDiskOptions, kind: Parameters<typeof expectKind>[1]) => {
      await expectKind(createDisk(path, options), kind);
      expect(existsSync(path)).toBe(false);
    };
    await refused({ format: 'raw', size: 100 }, 'invalid_argument');
    await refused({ format: 'raw', size: 0 }, 'invalid_argument');
    await refused({ format: 'qcow2', size: MIB, clusterSize: 3000 }, 'invalid_argument');
    await refused({ format: 'sealed', size: MIB, recipients: [] }, 'no_key');
    await refused({ format: 'raw', size: 2 ** 46, preallocation: 'full' }, 'no_space');
    await expectKind(createDisk('/etc/pqblk-disk', { format: 'raw', size: MIB }), 'permission');
    await createDisk(path, { format: 'raw', size: MIB });
    await expectKind(createDisk(path, { format: 'raw', size: MIB }), 'exists');
    await createDisk(path, { format: 'qcow2', size: MIB, overwrite: true });
    expect((await diskInfo(path)).format).toBe('qcow2');
  });

  test('full preallocation reports progress and stops on request', async () => {
    const path = join(directory, 'full');
    const seen: number[] = [];
    await createDisk(path, {
      format: 'raw',
      size: 32 * MIB,
      preallocation: 'full',
      onProgress: (done) => seen.push(done),
    });
    expect(seen.at(-1)).toBe(32 * MIB);
    expect(statSync(path).blocks * 512).toBeGreaterThanOrEqual(32 * MIB);
    const stop = new AbortController();
    const stopped = join(directory, 'stopped');
    const work = createDisk(stopped, {
      format: 'raw',
      size: 1024 * MIB,
      preallocation: 'full',
      signal: stop.signal,
      onProgress: () => stop.abort(),
    });
    await expectKind(work, 'canceled');
    expect(existsSync(stopped)).toBe(false);
  });
});

describe('sealed disks', () => {
  const sealed = { format: 'sealed' as const };

  test('nobody without the key gets in', async () => {
    const path = await make(sealed, 4 * MIB);
    await expectKind(openDisk(path, sealed), 'no_key');
    await expectKind(openDisk(path, { ...sealed, identity: stranger.identity }), 'no_slot');
    await expectKind(openDisk(path, { format: 'qcow2' }), 'unsupported');
    await expectKind(checkDisk(path, sealed), 'no_key');
    await using disk = await open(path, 'sealed');
    expect(disk.facts.suite).toBe('AES-256-GCM');
  });

  test('the file holds no plaintext', async () => {
    const path = await make(sealed, 4 * MIB);
    const secret = Buffer.from('the quick brown fox jumps over the lazy dog'.repeat(100));
    {
      await using disk = await open(path, 'sealed');
      await disk.write(secret, 12_345);
      await disk.flush();
      await disk.write(secret, 12_345);
    }
    expect(readFileSync(path).indexOf(secret.subarray(0, 20))).toBe(-1);
  });

  test('one flipped bit of ciphertext is an integrity error, and nothing comes out', async () => {
    const path = await make(sealed, 4 * MIB);
    {
      await using disk = await open(path, 'sealed');
      await disk.write(randomBuffer(2 * MIB), 0);
    }
    const image = readFileSync(path);
    const before = await checkDisk(path, { ...sealed, identity: owner.identity });
    expect(before.clean).toBe(true);
    // Guest data is the last that looks like noise; clusters reserved behind it are empty.
    let at = image.length - 4096;
    while (new Set(image.subarray(at, at + 4096)).size < 200) at -= 4096;
    image[at] = (image[at] as number) ^ 1;
    writeFileSync(path, image);
    const after = await checkDisk(path, { ...sealed, identity: owner.identity });
    expect(after.sectorsBad).toBe(1);
    const sector = (after.badSectors[0] as number) * 4096;
    for (const cache of ['none', 'writeback'] as const) {
      await using disk = await open(path, 'sealed', { readOnly: true, cache });
      const buffer = Buffer.alloc(4096, 0x5a);
      await expectKind(disk.read(buffer, sector), 'integrity');
      expect(buffer.every((byte) => byte === 0x5a || byte === 0)).toBe(true);
      expect(disk.stats().backend.integrityFailures).toBeGreaterThan(0);
    }
  });

  test('a writer that is killed loses nothing that was flushed', async () => {
    const store = new KeyStore(join(directory, 'keys'));
    await store.generate('writer', { noPassphrase: true });
    const path = join(directory, 'killed');
    const recipients = [await store.recipient('writer')];
    await createDisk(path, { ...sealed, size: 4 * MIB, logBytes: 256 * KIB, recipients });
    for (let life = 0; life < 4; life++) {
      const safe = await killedAfter(path, store.path, 60 + 90 * life);
      using identity = await store.unlock('writer');
      await using disk = await openDisk(path, { ...sealed, identity });
      const sectors = disk.size / 4096;
      const found = Buffer.alloc(4096);
      for (let n = Math.max(0, safe - sectors); n < safe; n++) {
        await disk.read(found, (n % sectors) * 4096);
        // The next round may have overwritten it already, unflushed: then it is that round's value.
        const values = [n % 251, (n + sectors) % 251];
        expect(values, `sector of write ${n}`).toContain(found[0]);
        expect(found.every((byte) => byte === found[0])).toBe(true);
      }
    }
  });
});

/** Runs the writer, kills it once so many flushes were told, and says how many writes are safe. */
function killedAfter(path: string, store: string, flushes: number): Promise<number> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [WRITER, DIST, path, store, 'writer']);
    let told = '';
    let errors = '';
    child.stdout.on('data', (text) => {
      told += text;
      if (told.split('\n').length > flushes) child.kill('SIGKILL');
    });
    child.stderr.on('data', (text) => {
      errors += text;
    });
    child.on('close', (_code, signal) => {
      const lines = told.split('\n').filter((line) => line !== '');
      if (signal === 'SIGKILL') resolve(Number(lines.at(-1)));
      else reject(new Error(`the writer ended by itself: ${errors}`));
    });
  });
}
