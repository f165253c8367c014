// What a figure was measured on: processor, memory, kernel, disks, versions, commit, load.
import { spawnSync } from 'node:child_process';
import { readFileSync, statfsSync, statSync } from 'node:fs';
import { arch, availableParallelism, cpus, loadavg, release, totalmem } from 'node:os';

const FLAGS = ['aes', 'avx2', 'vaes', 'vpclmulqdq', 'avx512f', 'sha_ni'];

const PROGRAMS = {
  fio: ['--version'],
  'qemu-storage-daemon': ['--version'],
  gocryptfs: ['-version'],
  nbdkit: ['--version'],
  openssl: ['version'],
};
const LIBRARIES = ['libipsec-mb-dev', 'liburing-dev', 'libssl-dev'];

function output(file, args, cwd) {
  const { status, stdout } = spawnSync(file, args, { encoding: 'utf8', cwd });
  return status === 0 ? stdout.trim() : undefined;
}

function text(path) {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}

/** MAJOR:MINOR, as the kernel's tables name a device. */
export const deviceName = (dev) =>
  `${(dev >> 8) & 0xfff}:${(dev & 0xff) | ((dev >> 12) & 0xfff00)}`;

/**
 * The mount of `device` among findmnt's lines MAJ:MIN SOURCE FSTYPE, which are several where one was
 * mounted over another; else the last, which is the one on top.
 */
export function mountOf(text, device) {
  const mounts = text.split('\n').map((line) => line.trim().split(/\s+/));
  const [, source, fileSystem] = mounts.findLast(([name]) => name === device) ?? mounts.at(-1);
  return { source, fileSystem };
}

/** The file system of a directory, and the device below it where there is one. */
function place(directory) {
  const device = deviceName(statSync(directory).dev);
  const mounts = output('findmnt', ['-nro', 'MAJ:MIN,SOURCE,FSTYPE', '-T', directory]);
  const queue = (name) =>
    text(`/sys/dev/block/${device}/queue/${name}`) ??
    text(`/sys/dev/block/${device}/../queue/${name}`);
  const fs = statfsSync(directory);
  return {
    ...mountOf(mounts ?? '', device),
    freeBytes: fs.bavail * fs.bsize,
    writeCache: queue('write_cache'),
    logicalBlockSize: Number(queue('logical_block_size')) || undefined,
    scheduler: queue('scheduler'),
  };
}

function versions() {
  const found = { node: process.versions.node };
  for (const [program, args] of Object.entries(PROGRAMS)) {
    const line = output(program, args)?.split('\n')[0];
    found[program] = /\d+\.\d[\w.~+-]*/.exec(line ?? '')?.[0] ?? 'not installed';
  }
  for (const library of LIBRARIES) {
    const status = output('dpkg-query', ['--status', library]);
    found[library] = /^Version: (.*)$/m.exec(status ?? '')?.[1] ?? 'unknown';
  }
  return found;
}

export function machineFacts(root, places) {
  const flags = /^flags\s*: (.*)$/m.exec(text('/proc/cpuinfo') ?? '')?.[1].split(' ') ?? [];
  const changed = output('git', ['status', '--porcelain'], root);
  return {
    cpu: cpus()[0]?.model.trim(),
    cores: availableParallelism(),
    architecture: arch(),
    flags: FLAGS.filter((flag) => flags.includes(flag)),
    hypervisor: flags.includes('hypervisor'),
    memoryBytes: totalmem(),
    kernel: release(),
    governor: text('/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor'),
    places: Object.fromEntries(Object.entries(places).map(([name, path]) => [name, place(path)])),
    versions: versions(),
    commit: output('git', ['rev-parse', 'HEAD'], root),
    changedFiles: changed ? changed.split('\n').length : 0,
  };
}

export const load = () => loadavg()[0];
