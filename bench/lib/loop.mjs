// A file system on a disk with sectors of 4096 bytes: ext4 on a loop device over a file. Needs root,
// and a kernel that has such devices.
import { spawnSync } from 'node:child_process';
import { mkdirSync, rmSync } from 'node:fs';

/** { path: a directory on it, release } or { missing: why there is none }. */
export async function fileSystemOf4kSectors(bench, directory, bytes) {
  const missing = bench.needs('losetup', 'mkfs.ext4', 'mount');
  if (missing) return { missing };
  const file = `${directory}.image`;
  const undo = [() => rmSync(file, { force: true })];
  const release = () => {
    for (let step = undo.pop(); step; step = undo.pop()) step();
  };
  bench.defer(release);
  try {
    // Written, and not sparse: allocation below the device is not what is measured.
    const count = `count=${Math.ceil(bytes / 2 ** 20)}`;
    await bench.run('dd', ['if=/dev/zero', `of=${file}`, 'bs=1M', count, 'conv=fsync']);
    const args = ['--sector-size', '4096', '--direct-io=on', '--find', '--show', file];
    const device = (await bench.run('losetup', args)).trim();
    undo.push(() => spawnSync('losetup', ['--detach', device]));
    await bench.run('mkfs.ext4', ['-q', '-F', '-E', 'nodiscard', device]);
    mkdirSync(directory);
    await bench.run('mount', [device, directory]);
    undo.push(() => spawnSync('umount', ['--lazy', directory]));
  } catch (error) {
    release();
    bench.check();
    return { missing: `no loop device: ${error.message.trim().split('\n').at(-1)}` };
  }
  return { path: directory, release };
}
