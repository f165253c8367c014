// A small Debian guest for the demo and for test-vm.mjs: a real kernel, busybox, and an initramfs that
// knows just enough to see virtio disks.
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
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const QEMU = 'qemu-system-x86_64';
// Not a multiple of 256 KiB: QEMU before 9.0 looks at dirty pages one by one then. Where it takes 64 at
// once it forgets to tell an emulated processor that they count as clean again, does not see what that
// writes next, and one guest in three comes out of a migration with corrupt memory.
const MEMORY = `${256 * 1024 + 8}K`;
// KVM inside of a virtual machine may exist and still not run a guest: it has to be asked for.
const ACCELERATOR = process.argv.includes('--kvm') ? 'kvm' : 'tcg';

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

/** Ends the program `name` where there is no QEMU. */
export function findQemu(name) {
  if (spawnSync(QEMU, ['--version']).status === 0) return;
  console.error(`${name}: ${QEMU} is missing: apt-get install qemu-system-x86`);
  process.exit(1);
}

export const haveGuest = () => existsSync(join(CACHE, 'root', 'complete'));

/** Fetches and unpacks the kernel and busybox, once; returns where they are. */
export function fetchGuest() {
  const root = join(CACHE, 'root');
  if (!haveGuest()) {
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

function writeInit(dir, script) {
  const head = [
    '#!/bin/sh',
    '/bin/busybox --install -s /bin',
    'mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev',
  ];
  writeFileSync(join(dir, 'init'), `${[...head, ...script].join('\n')}\n`);
  chmodSync(join(dir, 'init'), 0o755);
}

function makeFilesystem(dir, image, bytes) {
  run('truncate', ['-s', `${bytes}`, image]);
  run('mkfs.ext4', ['-q', '-F', '-L', 'pqblk-guest', '-d', dir, image]);
}

/** Goes on in the root filesystem on the first disk. */
export const ROOT_ON_VDA = [
  'for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; sleep 1; done',
  'mount -t ext4 /dev/vda /root || { echo "GUEST no root"; poweroff -f; }',
  'exec switch_root /root /init',
];

/** An initramfs whose init inserts the modules for virtio disks and ext4 and goes on with `script`. */
export function makeInitramfs(guest, dir, image, script) {
  addBusybox(guest, dir);
  const insert = MODULES.map((path) => {
    copyFileSync(join(guest.modules, path), join(dir, basename(path)));
    return `insmod /${basename(path)}`;
  });
  writeInit(dir, [...insert, ...script]);
  const pack = `find . | ${guest.busybox} cpio -o -H newc > ${image}`;
  run('sh', ['-c', pack], { cwd: dir });
}

/** A root filesystem of `bytes` whose init is `script`. */
export function makeRootfs(guest, dir, image, bytes, script) {
  addBusybox(guest, dir);
  writeInit(dir, script);
  makeFilesystem(dir, image, bytes);
}

/** A filesystem of this machine's `programs` and the libraries they load, to chroot into. */
export function makeTools(dir, image, bytes, programs) {
  for (const name of ['dev', 'proc', 'sys', 'tmp', 'data']) {
    mkdirSync(join(dir, name), { recursive: true });
  }
  const files = new Set();
  for (const program of programs) {
    const path = run('sh', ['-c', `PATH=$PATH:/sbin:/usr/sbin command -v ${program}`]).trim();
    files.add(path);
    for (const [library] of run('ldd', [path]).matchAll(/\/\S+/g)) files.add(library);
  }
  for (const file of files) {
    mkdirSync(join(dir, dirname(file)), { recursive: true });
    copyFileSync(file, join(dir, file));
  }
  makeFilesystem(dir, image, bytes);
}

/**
 * QEMU's arguments for a machine with two processors that boots `initramfs` and talks on stdout. Its
 * memory is shared, which a vhost-user server needs, and port `rp1` takes a disk while it runs.
 */
export function machine(guest, initramfs) {
  const memory = `memory-backend-memfd,id=ram,size=${MEMORY},share=on`;
  return [
    ...['-nodefaults', '-no-reboot', '-display', 'none', '-serial', 'stdio'],
    ...['-accel', ACCELERATOR, '-cpu', 'qemu64', '-smp', '2', '-m', MEMORY],
    ...['-object', memory, '-machine', 'q35,memory-backend=ram'],
    ...['-device', 'pcie-root-port,id=rp1,slot=1'],
    ...['-kernel', guest.kernel, '-initrd', initramfs],
    ...['-append', 'console=ttyS0 quiet panic=-1'],
  ];
}
