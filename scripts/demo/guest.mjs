// A small Debian guest for the demo: a real kernel, busybox, and an initramfs that knows just enough
// to find its root filesystem on a virtio disk.
//
// The two packages are fetched with apt-get and unpacked into build/guest, never installed.
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const CACHE = fileURLToPath(new URL('../../build/guest', import.meta.url));
// In this order: each needs those before it.
const MODULES = [
  ...['drivers/virtio/virtio_ring.ko', 'drivers/virtio/virtio.ko'],
  ...['drivers/virtio/virtio_pci_legacy_dev.ko', 'drivers/virtio/virtio_pci_modern_dev.ko'],
  ...['drivers/virtio/virtio_pci.ko', 'drivers/block/virtio_blk.ko'],
  ...['lib/crc16.ko', 'crypto/crc32c_generic.ko', 'fs/mbcache.ko', 'fs/jbd2/jbd2.ko'],
  'fs/ext4/ext4.ko',
];

export function run(file, args, options = {}) {
  const { status, stdout, stderr, error } = spawnSync(file, args, { encoding: 'utf8', ...options });
  if (error) throw error;
  if (status !== 0) throw new Error(`${file} ${args.join(' ')}: exit ${status}\n${stderr}`);
  return stdout;
}

/** Fetches and unpacks the kernel and busybox, once; returns where they are. */
export function fetchGuest() {
  const root = join(CACHE, 'root');
  if (!existsSync(join(root, 'complete'))) {
    rmSync(CACHE, { recursive: true, force: true });
    mkdirSync(root, { recursive: true });
    const kernel = /Depends: (\S+)/.exec(run('apt-cache', ['depends', 'linux-image-amd64']))?.[1];
    if (kernel === undefined) throw new Error('apt knows no linux-image-amd64: run apt-get update');
    run('apt-get', ['download', kernel, 'busybox-static'], { cwd: CACHE });
    for (const file of readdirSync(CACHE).filter((name) => name.endsWith('.deb'))) {
      run('dpkg', ['-x', join(CACHE, file), root]);
      rmSync(join(CACHE, file));
    }
    writeFileSync(join(root, 'complete'), '');
  }
  const name = readdirSync(join(root, 'boot')).find((file) => file.startsWith('vmlinuz-'));
  const version = name.slice('vmlinuz-'.length);
  return {
    version,
    kernel: join(root, 'boot', name),
    busybox: join(root, 'bin', 'busybox'),
    modules: join(root, 'lib', 'modules', version, 'kernel'),
  };
}

function addBusybox(guest, dir) {
  for (const name of ['bin', 'dev', 'proc', 'sys', 'root', 'data']) {
    mkdirSync(join(dir, name), { recursive: true });
  }
  copyFileSync(guest.busybox, join(dir, 'bin', 'busybox'));
  symlinkSync('busybox', join(dir, 'bin', 'sh'));
}

/** An initramfs whose init mounts /dev/vda and goes on there. */
export function makeInitramfs(guest, dir, image) {
  addBusybox(guest, dir);
  const insert = MODULES.map((path) => {
    copyFileSync(join(guest.modules, path), join(dir, basename(path)));
    return `insmod /${basename(path)}`;
  });
  const script = [
    '#!/bin/sh',
    '/bin/busybox --install -s /bin',
    'mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev',
    ...insert,
    'for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 1; done',
    'mount -t ext4 /dev/vda /root || { echo "GUEST no root"; poweroff -f; }',
    'exec switch_root /root /init',
  ];
  writeFileSync(join(dir, 'init'), `${script.join('\n')}\n`);
  chmodSync(join(dir, 'init'), 0o755);
  const pack = `find . | ${guest.busybox} cpio -o -H newc > ${image}`;
  run('sh', ['-c', pack], { cwd: dir });
}

/** A root filesystem of `bytes` whose init is `script`. */
export function makeRootfs(guest, dir, image, bytes, script) {
  addBusybox(guest, dir);
  const head = [
    '#!/bin/sh',
    '/bin/busybox --install -s /bin',
    'mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev',
  ];
  writeFileSync(join(dir, 'init'), `${[...head, ...script].join('\n')}\n`);
  chmodSync(join(dir, 'init'), 0o755);
  run('truncate', ['-s', `${bytes}`, image]);
  run('mkfs.ext4', ['-q', '-F', '-L', 'pqblk-guest', '-d', dir, image]);
}
