// A real ext4 disk from real files of this machine: the demo's input.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const MiB = 2 ** 20;
export const DISK_BYTES = 512 * MiB;
// What the files may take: enough to be real, few enough to be quick.
const FILES_BYTES = 288 * MiB;
const FILES_COUNT = 16_000;
const ENOUGH_BYTES = 64 * MiB;
const BYTES_PER_INODE = 16_384;

const root = fileURLToPath(new URL('../..', import.meta.url));
const CANDIDATES = [
  ...python('/usr/lib'),
  '/usr/lib/gcc',
  '/usr/share/doc',
  '/usr/include',
  '/usr/share/perl',
  '/usr/share/locale',
  '/usr/share/man',
  join(root, 'node_modules'),
  '/usr/share',
];

function python(lib) {
  return existsSync(lib)
    ? readdirSync(lib)
        .filter((name) => name.startsWith('python3'))
        .map((name) => join(lib, name))
    : [];
}

function run(file, args) {
  const { status, stdout, stderr, error } = spawnSync(file, args, { encoding: 'utf8' });
  if (error) throw error;
  if (status !== 0) throw new Error(`${file} ${args.join(' ')}: exit ${status}\n${stderr}`);
  return stdout;
}

/** What a directory takes: bytes in 4 KiB blocks, as ext4 will store it, and inodes. */
function sizeOf(dir) {
  const du = (unit) => {
    const { stdout } = spawnSync('du', ['-s', unit, dir], { encoding: 'utf8' });
    return Number.parseInt(stdout, 10) || Number.POSITIVE_INFINITY;
  };
  return { bytes: du('--block-size=4096') * 4096, count: du('--inodes') };
}

/** Copies as many of the candidates as fit below `into`; returns their names. */
function gather(into) {
  mkdirSync(into);
  const taken = [];
  let [bytes, count] = [0, 0];
  for (const dir of CANDIDATES.filter((path) => existsSync(path) && statSync(path).isDirectory())) {
    const size = sizeOf(dir);
    if (bytes + size.bytes > FILES_BYTES || count + size.count > FILES_COUNT) continue;
    if (taken.some((other) => dir.startsWith(`${other}/`))) continue;
    run('cp', ['-a', '--reflink=auto', dir, join(into, `${taken.length}-${basename(dir)}`)]);
    taken.push(dir);
    bytes += size.bytes;
    count += size.count;
  }
  if (bytes < ENOUGH_BYTES) throw new Error('too few real files on this machine to fill a disk');
  return taken;
}

/** Makes `image`, 512 MiB of ext4 holding real files; returns where they come from and how many. */
export function makeExt4(image, staging) {
  const taken = gather(staging);
  const files = run('find', [staging, '-type', 'f', '-printf', '.']).length;
  writeFileSync(image, '');
  truncateSync(image, DISK_BYTES);
  run('mkfs.ext4', [
    '-q',
    '-F',
    '-L',
    'pqblk-demo',
    '-i',
    `${BYTES_PER_INODE}`,
    '-d',
    staging,
    image,
  ]);
  return { taken, files };
}

/** What e2fsck -fn says of a filesystem: '' when it is clean. */
export function fsckComplaint(image) {
  const { status, stdout, stderr } = spawnSync('e2fsck', ['-fn', image], { encoding: 'utf8' });
  return status === 0 ? '' : `exit ${status}: ${stderr}${stdout}`;
}
