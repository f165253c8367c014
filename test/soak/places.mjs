// Where the disks of a soak lie: memory, a real disk, and a small file system of their own that can be
// filled up and can stand still (ext4 on a loop device; needs CAP_SYS_ADMIN).
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const MEMORY = existsSync('/dev/shm') ? '/dev/shm' : tmpdir();

function command(file, ...args) {
  const { status, stderr, error } = spawnSync(file, args, { encoding: 'utf8' });
  return error ? error.message : status === 0 ? '' : `${file}: ${stderr.trim()}`;
}

const folders = new Set();

/** Removes what is left; for the end of the process, whichever it is. */
export function removeAll() {
  for (const folder of folders) folder.remove();
}

/** A directory in memory or on disk. */
export class Folder {
  constructor(kind) {
    this.kind = kind;
    this.path = mkdtempSync(join(kind === 'memory' ? MEMORY : tmpdir(), 'pqblk-soak-'));
    folders.add(this);
  }
  remove() {
    rmSync(this.path, { recursive: true, force: true });
    folders.delete(this);
  }
}

/** A file system of `bytes`. `problem` says why there is none. */
export class SmallFs extends Folder {
  constructor(bytes) {
    super('memory');
    this.kind = 'small file system';
    this.folder = this.path;
    const device = join(this.folder, 'device');
    this.path = join(this.folder, 'mounted');
    mkdirSync(this.path);
    this.ballast = join(this.path, 'ballast');
    this.problem =
      command('truncate', '-s', String(bytes), device) ||
      command('mkfs.ext4', '-q', '-m', '0', device) ||
      command('mount', '-o', 'loop', device, this.path);
    this.mounted = this.problem === '';
  }

  get free() {
    const { stdout } = spawnSync('df', ['-B1', '--output=avail', this.path], { encoding: 'utf8' });
    return Number(stdout.split('\n')[1]);
  }

  /** Takes all but `left` bytes of the space, or less: the file system wants some for itself. */
  fill(left) {
    const bytes = this.free - left;
    if (bytes > 0) command('fallocate', '-l', String(bytes), this.ballast); // as much as there is
  }
  empty() {
    rmSync(this.ballast, { force: true });
  }

  /** Every write stands still for so long, as on a device that does. */
  async stall(ms) {
    const problem = command('fsfreeze', '-f', this.path);
    if (problem) return problem;
    this.stalled = true;
    try {
      await sleep(ms);
    } finally {
      this.thaw();
    }
    return '';
  }
  thaw() {
    if (this.stalled) command('fsfreeze', '-u', this.path);
    this.stalled = false;
  }

  remove() {
    this.thaw();
    if (this.mounted) command('umount', '-l', this.path);
    this.path = this.folder;
    super.remove();
  }
}
