// Sealed disks from the command line: several recipients, the right and the wrong key, damage, locks.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import {
  type BenchResult,
  type CheckResult,
  type DiskInfo,
  KeyStore,
  openDisk,
} from '../../src/index.js';
import { exitCode, MAIN, peer, pqblk, pqblkJson, program, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const MiB = 2 ** 20;
const source = at('source.raw');
const store = ['--store', at('keys')];

beforeAll(async () => {
  peer('qemu-img', 'create', '-q', '-f', 'raw', source, '16M');
  peer('qemu-io', '-f', 'raw', '-c', 'write -q -P 7 1M 3M', '-c', 'write -q -P 9 9M 70k', source);
  for (const name of ['alice', 'bob', 'mallory']) {
    await pqblkJson('key', 'gen', name, '--no-passphrase', ...store);
  }
});

async function sealedDisk(name: string, ...keys: string[]): Promise<string> {
  const path = at(name);
  await pqblkJson('import', source, path, ...store, ...keys.flatMap((key) => ['--key', key]));
  return path;
}

describe('a sealed disk', () => {
  it('opens for each of its recipients, and for nobody else', async () => {
    const disk = await sealedDisk('two.sealed', 'alice', 'bob');
    for (const key of ['alice', 'bob']) {
      const out = at(`${key}.raw`);
      await pqblkJson('export', disk, out, '--key', key, ...store);
      peer('cmp', source, out);
    }
    const wrong = await pqblk('export', disk, at('m.raw'), '--key', 'mallory', ...store);
    expect(wrong.code).toBe(exitCode('no_slot'));
    expect(existsSync(at('m.raw'))).toBe(false);
  });

  it('is found the key it is sealed to, or says who has one', async () => {
    const disk = await sealedDisk('one.sealed', 'bob');
    await pqblkJson('export', disk, at('found.qcow2'), ...store);
    peer('qemu-img', 'compare', '-q', source, at('found.qcow2'));
    const { code, stderr } = await pqblk('check', disk, '--store', at('empty-store'));
    expect(code).toBe(exitCode('no_key'));
    expect(stderr).toContain('bob');
  });

  it('is made for somebody whose private key is not here', async () => {
    await pqblk('key', 'export', 'bob', '--public', '-o', at('bob.pub'), ...store);
    const disk = at('gift.sealed');
    const elsewhere = ['--store', at('other-keys')];
    await pqblkJson('import', source, disk, '--key', at('bob.pub'), ...elsewhere);
    await pqblkJson('export', disk, at('gift.raw'), ...store);
    peer('cmp', source, at('gift.raw'));
  });

  it('shows suite, KEM, slots and fingerprints without a key', async () => {
    const disk = at('shown.sealed');
    const suite = ['--suite', 'chacha20-poly1305', '--cluster-size', '16k', '--log-size', '8M'];
    const keys = ['--key', 'alice', '--key', 'bob'];
    await pqblkJson('create', disk, '1G', ...keys, ...suite, ...store);
    const info = await pqblkJson<DiskInfo>('info', disk);
    expect(info).toMatchObject({ format: 'sealed', size: 1024 * MiB, clusterSize: 16384 });
    expect(info.sealed).toMatchObject({
      suite: 'ChaCha20-Poly1305',
      clean: true,
      logBytes: 8 * MiB,
    });
    const { keys: known } = await pqblkJson<{ keys: { fingerprint: string }[] }>(
      ...(['key', 'list', ...store] as const),
    );
    const slots = info.sealed?.keyArea?.slots ?? [];
    expect(slots.map(({ label }) => label)).toEqual(['alice', 'bob']);
    expect(slots[0]).toMatchObject({ kem: 'ML-KEM-768', role: 'primary', state: 'active' });
    expect(known.map(({ fingerprint }) => fingerprint)).toContain(slots[1]?.fingerprint);
    expect((await pqblk('info', disk)).stdout).toMatch(/^encryption +ChaCha20-Poly1305$/m);
  });

  it('keeps its content when it grows', async () => {
    const disk = await sealedDisk('grown.sealed', 'alice');
    expect(await pqblkJson('resize', disk, '+16M', ...store)).toMatchObject({ after: 32 * MiB });
    await pqblkJson('export', disk, at('grown.raw'), ...store);
    peer('cmp', '-n', `${16 * MiB}`, source, at('grown.raw'));
    expect(await pqblkJson<CheckResult>('check', disk, ...store)).toMatchObject({ clean: true });
  });

  it('is refused by qemu-img, which would read ciphertext', async () => {
    const disk = await sealedDisk('foreign.qcow2', 'alice');
    expect(() => peer('qemu-img', 'check', disk)).toThrow(/sealed disk \(pqblk\)/);
    const plain = await pqblk('export', disk, at('plain.raw'));
    expect(plain.code).toBe(exitCode('unsupported'));
  });

  it('is measured', async () => {
    const disk = await sealedDisk('bench.sealed', 'alice');
    const load = ['--rw', 'randrw', '--size', '2M', '--iodepth', '16', '--seed', '1'];
    const result = await pqblkJson<BenchResult & { disk: object }>(
      'bench',
      disk,
      ...load,
      ...store,
    );
    expect(result.disk).toMatchObject({ format: 'sealed', suite: 'AES-256-GCM' });
    expect(result.read.ops + result.write.ops).toBe(512);
    expect(await pqblkJson<CheckResult>('check', disk, ...store)).toMatchObject({ clean: true });
  });
});

describe('damage', () => {
  it('is found by check and refused by export, with exit code 5', async () => {
    const disk = await sealedDisk('flipped.sealed', 'alice');
    const bytes = readFileSync(disk);
    const needle = dataOffset(bytes, 2 * MiB);
    bytes.writeUInt8(bytes.readUInt8(needle + 17) ^ 1, needle + 17);
    writeFileSync(disk, bytes);
    const { code, stdout } = await pqblk('check', disk, '--json', ...store);
    expect(code).toBe(exitCode('integrity'));
    expect(JSON.parse(stdout)).toMatchObject({ sectorsBad: 1, badSectors: [(2 * MiB) / 4096] });
    const refused = await pqblk('export', disk, at('flipped.raw'), ...store);
    expect(refused.code).toBe(exitCode('integrity'));
    expect(existsSync(at('flipped.raw'))).toBe(false);
  });

  it('of both copies of the key area has an exit code of its own', async () => {
    const disk = await sealedDisk('keyless.sealed', 'alice');
    const bytes = readFileSync(disk);
    const extension = bytes.indexOf(Buffer.from('PQB1')) + 8;
    for (const copy of [32, 40])
      bytes.fill(
        0,
        Number(bytes.readBigUInt64BE(extension + copy)),
        Number(bytes.readBigUInt64BE(extension + copy)) + 4096,
      );
    writeFileSync(disk, bytes);
    const { code } = await pqblk('export', disk, at('k.raw'), '--key', 'alice', ...store);
    expect(code).toBe(exitCode('key_area_damaged'));
  });

  it('of one copy of the key area is found by check, and mended when asked', async () => {
    const disk = await sealedDisk('half-keyless.sealed', 'alice');
    const bytes = readFileSync(disk);
    const at = Number(bytes.readBigUInt64BE(bytes.indexOf(Buffer.from('PQB1')) + 8 + 32));
    bytes[at + 4200] = (bytes[at + 4200] as number) ^ 1;
    writeFileSync(disk, bytes);
    const check = ['check', disk, '--key', 'alice', '--json', ...store];
    const found = await pqblk(...check);
    expect(found.code).toBe(exitCode('corrupt'));
    expect(JSON.parse(found.stdout)).toMatchObject({ clean: false, corruptions: 1 });
    expect((await pqblk(...check, '--repair')).code).toBe(0);
    expect((await pqblk(...check)).code).toBe(0);
    const info = await pqblk('info', disk, '--json');
    expect(JSON.parse(info.stdout).sealed.keyAreaCopyDamaged).toEqual([false, false]);
  });

  it('does not come to a file for whose place an impossible disk is wanted', async () => {
    const path = at('precious.sealed');
    writeFileSync(path, 'precious');
    const { code } = await pqblk('create', path, '8191T', '--key', 'alice', '--force', ...store);
    expect(code).toBe(exitCode('out_of_range'));
    expect(readFileSync(path, 'utf8')).toBe('precious');
  });

  it('is not what a refused resize leaves behind', async () => {
    const disk = await sealedDisk('refused.sealed', 'alice');
    const { code, stderr } = await pqblk('resize', disk, '8191T', '--key', 'alice', ...store);
    expect(code).toBe(exitCode('out_of_range'));
    expect(stderr).toContain('too large');
    const check = await pqblk('check', disk, '--key', 'alice', '--json', ...store);
    expect(JSON.parse(check.stdout)).toMatchObject({ clean: true, leaks: 0 });
  });

  it('by truncation is refused', async () => {
    const disk = await sealedDisk('short.sealed', 'alice');
    writeFileSync(disk, readFileSync(disk).subarray(0, 1000));
    const { code } = await pqblk('export', disk, at('s.raw'), '--key', 'alice', ...store);
    expect(code).not.toBe(0);
    expect(existsSync(at('s.raw'))).toBe(false);
  });
});

/** Host offset of guest byte `guest` (docs/format.md section 4). */
function dataOffset(image: Buffer, guest: number): number {
  const mask = 0x00ff_ffff_ffff_fe00n;
  const cluster = 2 ** image.readUInt32BE(20);
  const data = cluster / 8 - cluster / 8 / 128;
  const index = Math.floor(guest / cluster);
  const l1 = Number(image.readBigUInt64BE(40)) + Math.floor(index / data) * 8;
  const l2 = Number(image.readBigUInt64BE(l1) & mask) + (index % data) * 8;
  return Number(image.readBigUInt64BE(l2) & mask) + (guest % cluster);
}

describe('a lock', () => {
  it('shows its holder, refuses a second writer, and ends with the holder', async () => {
    const path = await sealedDisk('locked.sealed', 'alice');
    const keys = new KeyStore(at('keys'));
    const identity = await keys.unlock('alice');
    const disk = await openDisk(path, { format: 'sealed', identity });
    const { lockHolder } = await pqblkJson<DiskInfo>('info', path);
    expect(lockHolder).toMatchObject({ pid: process.pid });
    const { code, stderr } = program('resize', path, '+1M', ...store);
    expect(code).toBe(exitCode('locked'));
    expect(stderr).toContain(String(process.pid));
    await disk.close();
    expect(program('resize', path, '+1M', ...store).code).toBe(0);
  });
});

describe('the program', () => {
  it('stops on Ctrl-C, says so, and leaves no half-made file', async () => {
    const disk = at('long.sealed');
    await pqblkJson('create', disk, '64M', '--key', 'alice', ...store);
    const bench = ['bench', disk, '--rw', 'randwrite', '--runtime', '60', ...store];
    const child = spawn(process.execPath, [MAIN, ...bench], { stdio: ['ignore', 'pipe', 'pipe'] });
    const output = { stderr: '' };
    child.stderr.on('data', (text) => {
      output.stderr += text;
    });
    const before = statSync(disk).blocks;
    await vi.waitFor(() => expect(statSync(disk).blocks).toBeGreaterThan(before + 4096), {
      timeout: 120_000,
    });
    child.kill('SIGINT');
    const [code] = await once(child, 'close');
    expect({ code, ...output }).toMatchObject({ code: exitCode('canceled') });
    expect(output.stderr).toMatch(/^pqblk: /);
    expect(await pqblkJson<CheckResult>('check', disk, ...store)).toMatchObject({ clean: true });
    expect((await pqblkJson<DiskInfo>('info', disk)).sealed).toMatchObject({ clean: true });
  });

  it('writes nothing but the result where nobody watches', () => {
    const { code, stdout, stderr } = program('info', at('locked.sealed'), '--json');
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(JSON.parse(stdout)).toMatchObject({ format: 'sealed' });
  });
});
