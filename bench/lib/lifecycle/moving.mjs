// Lifecycle: work that goes over a whole disk: importing, checking, rotating its data key.
import { copyFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { checkDisk, rotateDataKey } from '../../../dist/index.js';
import { timeOnce } from '../api-time.mjs';
import { KEY } from '../bench.mjs';
import { makeDisk, makeNoise } from '../disks.mjs';
import { qemuImg } from '../qemu.mjs';

const MiB = 2 ** 20;
const COROUTINES = '8'; // of qemu-img convert: its most useful number here
const GUEST = { rw: 'randrw', readPercent: 70, blockSize: 4096, iodepth: 32 };

const sizeIn = (bench, place) => (bench.quick ? 256 : place === 'ram' ? 1024 : 512) * MiB;

/** MB of the disk's content a second. */
const speed = (size, milliseconds) => size / 1e3 / milliseconds;

/** A copy of a file, on the medium when it ends: what the place itself can do. */
const copyArgs = (bench, place, from, to) => [
  ...[`if=${from}`, `of=${to}`, 'bs=1M', 'conv=fsync', 'status=none'],
  ...(bench.direct[place] && place === 'disk' ? ['iflag=direct', 'oflag=direct'] : []),
];

/** An empty LUKS image, made beforehand: QEMU first measures its KDF for seconds. */
async function makeLuks(bench, path, size, secret) {
  if (bench.needs('qemu-img')) return undefined;
  const luks = 'encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10';
  const key = ['--object', `secret,id=key,file=${secret}`];
  await qemuImg(bench, ['create', '-q', '-f', 'qcow2', ...key, '-o', luks, path, `${size}`]);
  return path;
}

async function compareImport(bench, place) {
  const size = sizeIn(bench, place);
  const source = await makeNoise(bench, join(bench[place], 'source.raw'), size);
  const secret = join(bench[place], 'secret');
  await writeFile(secret, 'correct horse battery staple', { mode: 0o600 });
  const into = (name, missing, start, template) => {
    const target = join(bench[place], name.endsWith('sealed') ? 'new.sealed' : 'new.qcow2');
    const run = async () => {
      try {
        if (template) await copyFile(template, target);
        return speed(size, await timeOnce(() => start(target)));
      } finally {
        await rm(target, { force: true });
      }
    };
    return { name, missing, run };
  };
  const cache = bench.direct[place] && place === 'disk' ? 'none' : 'writeback';
  const convert = (...words) =>
    bench.run('qemu-img', [
      ...['convert', '-q', '-f', 'raw', '-t', cache, '-T', cache, '-W', '-m', COROUTINES],
      ...words,
    ]);
  const emptyLuks = await makeLuks(bench, join(bench[place], 'empty.luks'), size, secret);
  const toLuks = async (target) => {
    const image = `driver=qcow2,encrypt.key-secret=key,file.filename=${target}`;
    const key = ['--object', `secret,id=key,file=${secret}`];
    await convert(...key, '-n', '--target-image-opts', source, image);
  };
  await bench.compare({
    group: `import ${size / MiB} MiB, ${bench.where[place]}`,
    about: 'A raw file of noise into a new disk, whole commands, MB of content a second.',
    unit: 'MB/s',
    base: 'dd, a plain copy',
    contenders: [
      into('dd, a plain copy', undefined, (target) =>
        bench.run('dd', copyArgs(bench, place, source, target)),
      ),
      into('qemu-img convert, qcow2', bench.needs('qemu-img'), (target) =>
        convert('-O', 'qcow2', source, target),
      ),
      into('qemu-img convert, qcow2 + LUKS', bench.needs('qemu-img'), toLuks, emptyLuks),
      into('pqblk import, qcow2', undefined, (target) => bench.pqblk('import', source, target)),
      into('pqblk import, sealed', undefined, (target) =>
        bench.pqblk('import', source, target, '--key', KEY),
      ),
    ],
    targets: [{ name: 'pqblk import, sealed', to: 'qemu-img convert, qcow2 + LUKS', atLeast: 1 }],
  });
  for (const path of [source, ...(emptyLuks ? [emptyLuks] : [])]) await rm(path);
}

async function compareCheck(bench) {
  const size = sizeIn(bench, 'ram');
  const paths = {};
  for (const format of ['qcow2', 'sealed']) {
    const disk = await makeDisk(bench, bench.ram, format, { size, name: 'checked' });
    paths[format] = disk.facts.path;
    await disk.close();
  }
  const identity = await bench.identity();
  const api = (format, keys) => async () => {
    const { errors = 0 } = await checkDisk(paths[format], { format, ...keys });
    if (errors > 0) throw new Error(`${errors} errors in a disk that is whole`);
  };
  const timed = (call) => () => timeOnce(call);
  const callOf = (format, keys) =>
    `await checkDisk('${paths[format]}', { format: '${format}'${keys} })`;
  await bench.compare({
    group: `check a full disk of ${size / MiB} MiB, RAM`,
    about:
      'qcow2: structure and reference counts. sealed: these, and the tag of every sector; beside it ' +
      'what a hash of as many bytes costs. Whole commands but for checkDisk().',
    unit: 'ms',
    better: 'less',
    base: 'qemu-img check, qcow2',
    contenders: [
      {
        name: 'qemu-img check, qcow2',
        missing: bench.needs('qemu-img'),
        run: timed(() => bench.run('qemu-img', ['check', '-q', '-f', 'qcow2', paths.qcow2])),
      },
      { name: 'checkDisk(), qcow2', call: callOf('qcow2', ''), run: timed(api('qcow2', {})) },
      { name: 'pqblk check, qcow2', run: timed(() => bench.pqblk('check', paths.qcow2)) },
      {
        ...{ name: 'checkDisk(), sealed', call: callOf('sealed', ', identity') },
        run: timed(api('sealed', { identity })),
      },
      {
        name: 'pqblk check, sealed',
        run: timed(() => bench.pqblk('check', paths.sealed, '--key', KEY)),
      },
      {
        name: 'openssl sha256 of the file',
        missing: bench.needs('openssl'),
        run: timed(() => bench.run('openssl', ['dgst', '-sha256', paths.qcow2])),
      },
    ],
  });
  for (const path of Object.values(paths)) await rm(path);
}

/** Offline: nobody else uses the disk. */
async function compareRotation(bench, place) {
  const size = sizeIn(bench, place);
  const disk = await makeDisk(bench, bench[place], 'sealed', { size, name: 'rotated' });
  const source = await makeNoise(bench, join(bench[place], 'copied.raw'), size);
  const target = join(bench[place], 'copy.raw');
  const identity = await bench.identity();
  const copy = () => bench.run('dd', copyArgs(bench, place, source, target));
  await bench.compare({
    group: `rotate-data-key of ${size / MiB} MiB, ${bench.where[place]}`,
    about:
      'MB of content a second: every sector read, opened, sealed under the next key and written, ' +
      'looked at again, the old key forgotten. The plain copy ends on the medium as well.',
    unit: 'MB/s',
    base: 'dd, a plain copy',
    contenders: [
      { name: 'dd, a plain copy', run: async () => speed(size, await timeOnce(copy)) },
      {
        name: 'rotateDataKey()',
        call: `await rotateDataKey(disk, { identity })  // ${disk.facts.path}`,
        run: async () => speed(size, await timeOnce(() => rotateDataKey(disk, { identity }))),
      },
    ],
    // In memory the cipher is slower than a copy, and is what the rotation is to be compared with.
    targets:
      place === 'disk' ? [{ name: 'rotateDataKey()', to: 'dd, a plain copy', atLeast: 0.7 }] : [],
  });
  await disk.close();
  for (const path of [disk.facts.path, source, target]) await rm(path, { force: true });
}

/** Rotates until told to stop. A rotation that is stopped is gone on with the next time. */
async function rotateAgainAndAgain(disk, options, signal) {
  while (!signal.aborted) {
    try {
      await rotateDataKey(disk, { ...options, signal });
    } catch (error) {
      if (error.code !== 'PQBLK_INTERRUPTED') throw error;
    }
  }
}

/** Online: what a guest keeps of its IOPS while the key changes under it. */
async function compareOnline(bench) {
  const size = sizeIn(bench, 'ram');
  const disk = await makeDisk(bench, bench.ram, 'sealed', { size, name: 'online' });
  const identity = await bench.identity();
  const guest = async () => {
    const spec = { ...GUEST, runtimeMs: bench.seconds * 1000 };
    bench.loadCommand(disk, spec);
    const { read, write } = await disk.bench(spec);
    return { value: read.iops + write.iops, p50: read.latencyMicroseconds.p50 };
  };
  const rotating = async () => {
    const stop = new AbortController();
    const rotation = rotateAgainAndAgain(disk, { identity, share: 0.2 }, stop.signal);
    const failed = rotation.catch((error) => error);
    const measured = await guest().finally(() => stop.abort());
    const error = await failed;
    if (error) throw error;
    return measured;
  };
  await bench.compare({
    group: 'a guest while the data key is rotated, RAM',
    about:
      '4 KiB, 70 % reads, 32 in flight; the rotation works a fifth of the time, as by default.',
    unit: 'IOPS',
    base: 'guest alone',
    contenders: [
      { name: 'guest alone', run: guest },
      {
        name: 'guest, rotation under way',
        call: 'rotateDataKey(disk, { identity, share: 0.2, signal })  // meanwhile, again and again',
        run: rotating,
      },
    ],
    targets: [{ name: 'guest, rotation under way', to: 'guest alone', atLeast: 0.7 }],
  });
  await disk.close();
  await rm(disk.facts.path);
}

export async function moving(bench) {
  if (!bench.quick) {
    for (const place of ['ram', 'disk']) await compareImport(bench, place);
    await compareCheck(bench);
    await compareRotation(bench, 'ram');
  }
  await compareRotation(bench, 'disk');
  await compareOnline(bench);
}
