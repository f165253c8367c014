// create, info, import, export, check, resize, bench on raw and qcow2 disks. The oracle is qemu-img.
import {
  existsSync,
  readdirSync,
  readFileSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type BenchResult,
  type CheckResult,
  type DiskFacts,
  type DiskInfo,
  exportFile,
  openDisk,
} from '../../src/index.js';
import { exitCode, peer, pqblk, pqblkJson, pqblkWith, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const MiB = 2 ** 20;
const source = at('source.raw');

beforeAll(() => {
  peer('qemu-img', 'create', '-q', '-f', 'raw', source, '32M');
  peer('qemu-io', '-f', 'raw', '-c', 'write -q -P 7 1M 3M', '-c', 'write -q -P 9 20M 70k', source);
});

const qemuInfo = (path: string, format = 'qcow2') =>
  JSON.parse(peer('qemu-img', 'info', '-f', format, '--output=json', path));

describe('create', () => {
  it.each([
    [['--cluster-size', '4k', '--refcount-bits', '1'], { 'refcount-bits': 1 }, 4096],
    [['--compat', '0.10'], { compat: '0.10' }, 65536],
    [['--extended-l2', '--cluster-size', '128K'], { 'extended-l2': true }, 131072],
    [['--preallocation', 'metadata'], { compat: '1.1' }, 65536],
  ])('makes a qcow2 image that qemu-img understands: %j', async (flags, data, clusterSize) => {
    const path = at(`made-${flags.join('')}.qcow2`);
    const made = await pqblkJson<DiskInfo>('create', path, '64M', '--format', 'qcow2', ...flags);
    expect(made).toMatchObject({ format: 'qcow2', size: 64 * MiB, clusterSize });
    const info = qemuInfo(path);
    expect(info).toMatchObject({ 'virtual-size': 64 * MiB, 'cluster-size': clusterSize });
    expect(info['format-specific'].data).toMatchObject(data);
    peer('qemu-img', 'check', '-q', path);
  });

  it('makes an overlay over a backing file, and reads through it when allowed', async () => {
    const base = at('base.qcow2');
    peer('qemu-img', 'convert', '-O', 'qcow2', source, base);
    const top = at('top.qcow2');
    const backing = ['--backing', base, '--backing-format', 'qcow2'];
    await pqblkJson('create', top, '32M', '--format', 'qcow2', ...backing);
    expect(qemuInfo(top)).toMatchObject({ 'backing-filename': base });
    const refused = await pqblk('export', top, at('top.raw'));
    expect(refused.code).toBe(exitCode('gate_refused'));
    expect(existsSync(at('top.raw'))).toBe(false);
    await pqblkJson('export', top, at('top.raw'), '--allow-backing', base);
    peer('cmp', source, at('top.raw'));
  });

  it('takes the space at once when asked', async () => {
    const path = at('full.raw');
    await pqblkJson('create', path, '8M', '--format', 'raw', '--preallocation', 'full');
    expect(statSync(path)).toMatchObject({ size: 8 * MiB });
    expect(statSync(path).blocks * 512).toBeGreaterThanOrEqual(8 * MiB);
  });

  it.each([
    ['a sealed disk for nobody', ['x.sealed', '1G'], 'no_key'],
    ['a size that is none', ['x.qcow2', '1Q', '--format', 'qcow2'], 'usage'],
    ['a size of odd bytes', ['x.qcow2', '1000', '--format', 'qcow2'], 'invalid_argument'],
    ['a format that is none', ['x', '1G', '--format', 'vmdk'], 'usage'],
    [
      'a cluster size that is no power of two',
      ['x.qcow2', '1G', '--format', 'qcow2', '--cluster-size', '5000'],
      'invalid_argument',
    ],
    ['a key for a plain disk', ['x.qcow2', '1G', '--format', 'qcow2', '--key', 'a'], 'usage'],
    [
      'a cluster size for a raw disk',
      ['x.raw', '1G', '--format', 'raw', '--cluster-size', '4k'],
      'usage',
    ],
    [
      'a compatibility level for a raw disk',
      ['x.raw', '1M', '--format=raw', '--compat=3'],
      'usage',
    ],
    ['a backing format without a backing', ['x.qcow2', '1M', '--backing-format=raw'], 'usage'],
    [
      'a backing file that is not there',
      ['x.qcow2', '1M', '--format=qcow2', '--backing=no.raw', '--backing-format=raw'],
      'not_found',
    ],
    [
      'more space than there is',
      ['x.raw', '4096T', '--format', 'raw', '--preallocation', 'falloc'],
      'no_space',
    ],
    ['a directory that is not there', ['no/x.raw', '1M', '--format', 'raw'], 'not_found'],
    ['a directory of the system', ['/usr/share/x.raw', '1M', '--format', 'raw'], 'permission'],
  ] as const)('refuses %s', async (_what, [path, ...rest], kind) => {
    const full = path.startsWith('/') ? path : at(path);
    const { code, stderr } = await pqblk('create', full, ...rest);
    expect({ code, stderr }).toMatchObject({ code: exitCode(kind) });
    expect(existsSync(full)).toBe(false);
  });

  it('never replaces a file unless forced', async () => {
    const path = at('precious.raw');
    writeFileSync(path, 'precious');
    const create = ['create', path, '1M', '--format', 'raw'];
    expect((await pqblk(...create)).code).toBe(exitCode('exists'));
    expect(readFileSync(path, 'utf8')).toBe('precious');
    expect((await pqblk(...create, '--force')).code).toBe(0);
    expect(statSync(path).size).toBe(MiB);
  });
});

describe('import and export', () => {
  it('keeps the file that it would replace until it is done', async () => {
    const path = at('replaced.raw');
    writeFileSync(path, 'precious');
    const stop = new AbortController();
    await using disk = await openDisk(source, { format: 'raw', readOnly: true });
    const options = { format: 'raw', overwrite: true } as const;
    const stopped = exportFile(disk, path, {
      ...options,
      signal: stop.signal,
      onProgress: () => stop.abort(),
    });
    await expect(stopped).rejects.toMatchObject({ kind: 'canceled' });
    expect(readFileSync(path, 'utf8')).toBe('precious');
    truncateSync(path, MiB);
    {
      await using _held = await openDisk(path, { format: 'raw' });
      await expect(exportFile(disk, path, options)).rejects.toMatchObject({ kind: 'locked' });
    }
    await exportFile(disk, path, options);
    peer('cmp', source, path);
    expect(readdirSync(dir).filter((name) => name.startsWith('replaced'))).toEqual([
      'replaced.raw',
    ]);
  });

  it('keeps content and holes from raw to qcow2 and back', async () => {
    const disk = at('moved.qcow2');
    const result = await pqblkJson<{ copiedBytes: number; zeroBytes: number }>(
      ...['import', source, disk, '--format', 'qcow2'],
    );
    // 3 MiB and 70 KiB of data; what the file system gave beyond may count as data too.
    expect(result.copiedBytes).toBeGreaterThanOrEqual(3 * MiB + 70 * 1024);
    expect(result.copiedBytes).toBeLessThanOrEqual(3 * MiB + 128 * 1024);
    expect(result.copiedBytes + result.zeroBytes).toBe(32 * MiB);
    peer('qemu-img', 'compare', '-q', source, disk);
    peer('qemu-img', 'check', '-q', disk);
    await pqblkJson('export', disk, at('back.raw'));
    peer('cmp', source, at('back.raw'));
    expect(statSync(at('back.raw')).blocks * 512).toBeLessThan(4 * MiB);
    await pqblkJson('export', disk, at('back.dump'), '--output-format', 'qcow2');
    peer('qemu-img', 'compare', '-q', '-F', 'qcow2', source, at('back.dump'));
  });

  it('reads what qemu-img wrote: compressed clusters, snapshots', async () => {
    const made = at('qemu.qcow2');
    peer('qemu-img', 'convert', '-c', '-O', 'qcow2', source, made);
    peer('qemu-img', 'snapshot', '-c', 'one', made);
    await pqblkJson('import', made, at('from-qemu.raw'));
    peer('cmp', source, at('from-qemu.raw'));
    expect((await pqblkJson<DiskInfo>('info', made)).qcow2).toMatchObject({ snapshots: 1 });
  });

  it('fills an empty disk that is there, and spares one that is not empty', async () => {
    const disk = at('waiting.qcow2');
    await pqblkJson('create', disk, '64M', '--format', 'qcow2');
    await pqblkJson('import', source, disk);
    const { code, stderr } = await pqblk('import', source, disk);
    expect(code).toBe(exitCode('exists'));
    expect(stderr).toContain('--force');
    await pqblkJson('import', source, disk, '--force');
    await pqblkJson('export', disk, at('waiting.raw'));
    peer('cmp', '-n', `${32 * MiB}`, source, at('waiting.raw'));
  });

  it.each([
    ['a source whose name says nothing', ['import', 'nameless', 'y.raw'], 'usage'],
    ['a source that is not there', ['import', 'absent.raw', 'y.raw'], 'not_found'],
    [
      'a raw file said to be qcow2',
      ['import', 'source.raw', 'y.raw', '--source-format', 'qcow2'],
      'invalid_argument',
    ],
    ['an output whose name says nothing', ['export', 'source.raw', 'y'], 'usage'],
    ['an output that is there', ['export', 'source.raw', 'source.raw'], 'exists'],
    ['a disk that is too small', ['import', 'source.raw', 'small.raw'], 'out_of_range'],
  ] as const)('refuses %s', async (_what, [command, from, to, ...rest], kind) => {
    writeFileSync(at('nameless'), '');
    writeFileSync(at('small.raw'), '');
    truncateSync(at('small.raw'), MiB);
    const { code, stderr } = await pqblk(command, at(from), at(to), ...rest);
    expect({ code, stderr }).toMatchObject({ code: exitCode(kind) });
    expect(existsSync(at('y.raw'))).toBe(false);
  });

  it('leaves nothing behind when it is stopped', async () => {
    const stopped = AbortSignal.abort();
    const { code } = await pqblkWith({ signal: stopped }, 'import', source, at('stopped.raw'));
    expect(code).toBe(exitCode('canceled'));
    expect(existsSync(at('stopped.raw'))).toBe(false);
  });
});

describe('check', () => {
  it('finds a good image whole, and leaks in one that leaks, and mends them', async () => {
    const path = at('leaky.qcow2');
    peer('qemu-img', 'convert', '-O', 'qcow2', source, path);
    expect(await pqblkJson<CheckResult>('check', path)).toMatchObject({ clean: true });
    truncateSync(path, statSync(path).size + 65536);
    leak(path);
    const found = await pqblk('check', path, '--json');
    expect(found.code).toBe(exitCode('general'));
    expect(JSON.parse(found.stdout)).toMatchObject({ leaks: 1, corruptions: 0 });
    expect(await pqblkJson<CheckResult>('check', path, '--repair')).toMatchObject({
      leaksFixed: 1,
    });
    peer('qemu-img', 'check', '-q', path);
  });

  it('ends with the exit code of damage when the structure is damaged', async () => {
    const path = at('damaged.qcow2');
    peer('qemu-img', 'convert', '-O', 'qcow2', source, path);
    const bytes = readFileSync(path);
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0xfffffffffffe00n);
    bytes.writeBigUInt64BE(0x8000_0000_0000_0000n | (1n << 40n), l2);
    writeFileSync(path, bytes);
    const { code, stderr } = await pqblk('check', path);
    expect(code).toBe(exitCode('corrupt'));
    expect(stderr).toMatch(/^pqblk: .*damaged\.qcow2: check: /);
  });
});

/** Raises the refcount of the image's last cluster, which nothing refers to. */
function leak(path: string): void {
  const bytes = readFileSync(path);
  const table = Number(bytes.readBigUInt64BE(48));
  const block = Number(bytes.readBigUInt64BE(table));
  bytes.writeUInt16BE(1, block + (bytes.length / 65536 - 1) * 2);
  writeFileSync(path, bytes);
}

describe('resize', () => {
  it('grows by and to a size, and never shrinks', async () => {
    const path = at('grow.qcow2');
    await pqblkJson('create', path, '1M', '--format', 'qcow2');
    expect(await pqblkJson('resize', path, '+1M')).toMatchObject({ before: MiB, after: 2 * MiB });
    expect(await pqblkJson('resize', path, '4M')).toMatchObject({ after: 4 * MiB });
    expect(qemuInfo(path)).toMatchObject({ 'virtual-size': 4 * MiB });
    expect((await pqblk('resize', path, '1M')).code).toBe(exitCode('invalid_argument'));
    expect((await pqblk('resize', path, 'big')).code).toBe(exitCode('usage'));
  });
});

describe('info', () => {
  it('shows a raw file as raw, and says who holds a lock', async () => {
    const info = await pqblkJson<DiskInfo & { engine: object }>('info', source);
    expect(info).toMatchObject({ format: 'raw', size: 32 * MiB, clusterSize: 0 });
    expect(info.engine).toMatchObject({ engine: expect.stringMatching(/^(io_uring|threads)$/) });
    const text = (await pqblk('info', source)).stdout;
    expect(text).toMatch(/^lock +free$/m);
    expect(text).toMatch(/^size +32 MiB \(33554432 bytes\)$/m);
  });

  it.each([
    ['nothing', 'absent', 'not_found'],
    ['a directory', '.', 'invalid_argument'],
  ] as const)('refuses %s', async (_what, path, kind) => {
    expect((await pqblk('info', at(path))).code).toBe(exitCode(kind));
  });
});

describe('bench', () => {
  it.each(['read', 'write', 'randread', 'randwrite', 'randrw'] as const)(
    'measures %s',
    async (rw) => {
      const path = at('bench.raw');
      if (!existsSync(path)) await pqblkJson('create', path, '16M', '--format', 'raw');
      const load = ['--rw', rw, '--bs', '4k', '--iodepth', '8', '--queues', '2', '--size', '4M'];
      const result = await pqblkJson<BenchResult>('bench', path, ...load);
      expect(result.read.bytes + result.write.bytes).toBe(4 * MiB);
      expect(result.read.ops > 0).toBe(rw !== 'write' && rw !== 'randwrite');
      expect(result.write.ops > 0).toBe(rw !== 'read' && rw !== 'randread');
      expect(result.queues).toBe(2);
    },
  );

  it('shows a table', async () => {
    const { stdout } = await pqblk(
      'bench',
      at('bench.raw'),
      '--runtime',
      '0.2',
      '--engine',
      'threads',
    );
    expect(stdout).toMatch(/^raw; threads.*randread, 4 KiB, depth 32/);
    expect(stdout.split('\n')[1]).toMatch(/IOPS +MB\/s/);
  });

  it("takes an operator's word for what the device keeps", async () => {
    const classOf = async (...flags: string[]) => {
      const load = ['--size', '64k', ...flags];
      const { disk } = await pqblkJson<{ disk: DiskFacts }>('bench', at('bench.raw'), ...load);
      return disk.durabilityClass;
    };
    expect(await classOf()).not.toMatch(/^non-volatile/);
    expect(await classOf('--assume-non-volatile')).toMatch(/^(non-volatile|RAM-backed)/);
    expect(await classOf('--no-assume-non-volatile')).toMatch(/^(volatile|RAM-backed)/);
  });

  it.each([
    [['--rw', 'sideways'], 'usage'],
    [['--l2-cache-size', '0'], 'usage'],
    [['--bs', '0'], 'invalid_argument'],
    [['--iodepth', '0'], 'invalid_argument'],
    [['--queues', '65'], 'invalid_argument'],
    [['--entry-cache-size', '64T'], 'invalid_argument'],
    [['--size', '1T'], 'invalid_argument'],
  ] as const)('refuses %j', async (flags, kind) => {
    const { code, stderr } = await pqblk('bench', at('bench.raw'), '--runtime', '0.1', ...flags);
    expect({ code, stderr }).toMatchObject({ code: exitCode(kind) });
  });
});
