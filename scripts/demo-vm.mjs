// `npm run demo:vm`: a Debian kernel whose root filesystem is a sealed disk over vhost-user-blk.
//
// The guest boots from it on two queues, writes and syncs; its server is killed with SIGKILL in the
// middle of that, and another takes its place; the guest notices nothing and powers off. Then the
// host opens the disk and compares what is in it with what the guest said it wrote. The processor is
// emulated unless `--kvm` says otherwise. The exit code is 1 when any proof fails.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { fsckComplaint } from './demo/ext4.mjs';
import { fetchGuest, makeInitramfs, makeRootfs, run } from './demo/guest.mjs';
import { commandLine } from './demo/pqblk.mjs';
import * as report from './demo/report.mjs';

const MiB = 2 ** 20;
const ROOT_BYTES = 256 * MiB;
const BOOT_LIMIT_MS = 240_000;
const KILLS = 2;
const FILES = 24;
const MAIN = fileURLToPath(new URL('../dist/cli/main.js', import.meta.url));

// KVM inside of a virtual machine may exist and still not run a guest: it has to be asked for.
const ACCELERATOR = process.argv.includes('--kvm') ? 'kvm' : 'tcg';
const QEMU = 'qemu-system-x86_64';
if (spawnSync(QEMU, ['--version']).status !== 0) {
  console.error(`demo:vm: ${QEMU} is missing: apt-get install qemu-system-x86`);
  process.exit(1);
}
const dir = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'pqblk-vm-'));
const at = (name) => join(dir, name);
const children = new Set();
const cleanUp = () => {
  for (const child of children) child.kill('SIGKILL');
  rmSync(dir, { recursive: true, force: true });
};
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));
process.on('exit', cleanUp);

const pqblk = commandLine({ PQBLK_KEYS: at('keys') });

// What the guest does: files of random bytes, each synced before its checksum is told.
const GUEST_SCRIPT = [
  'echo "GUEST queues $(ls /sys/block/vda/mq | wc -l)"',
  'echo "GUEST serial $(cat /sys/block/vda/serial)"',
  'echo "GUEST root $(mount | grep " / ")"',
  `for i in $(seq 1 ${FILES}); do`,
  '  dd if=/dev/urandom of=/data/$i bs=64k count=48 2>/dev/null && sync',
  '  echo "GUEST file $i $(md5sum < /data/$i | cut -d" " -f1)"',
  'done',
  'echo 3 > /proc/sys/vm/drop_caches',
  'echo "GUEST again $(cat /data/* | md5sum | cut -d" " -f1)"',
  'echo "GUEST interrupts $(grep virtio /proc/interrupts | grep req | wc -l)"',
  'rm /data/1; sync; fstrim / && echo "GUEST trimmed"',
  'dmesg | grep -iE "i/o error|ext4-fs error" && echo "GUEST complained"',
  'mount -o remount,ro /; sync; poweroff -f',
];

/** A process whose lines on stdout are looked at as they come. */
function start(file, args, env = {}) {
  const stdio = ['ignore', 'pipe', 'pipe'];
  const child = spawn(file, args, { env: { ...process.env, ...env }, stdio });
  children.add(child);
  child.lines = createInterface({ input: child.stdout });
  child.complaint = '';
  child.stderr.on('data', (text) => {
    child.complaint += text;
  });
  child.ended = once(child, 'close').then(() => children.delete(child));
  return child;
}

async function serve() {
  const words = ['serve', at('disk.sealed'), '--key', 'vm', '--vhost-user', at('s')];
  const child = start(process.execPath, [MAIN, ...words, '--queues', '2', '--cache', 'writeback'], {
    PQBLK_KEYS: at('keys'),
  });
  const ready = await Promise.race([once(child.lines, 'line'), child.ended]);
  if (!Array.isArray(ready)) throw new Error(`the server did not start: ${child.complaint}`);
  return child;
}

function boot(guest) {
  const memory = 'memory-backend-memfd,id=ram,size=256M,share=on';
  return start(QEMU, [
    ...['-nodefaults', '-no-reboot', '-display', 'none', '-serial', 'stdio'],
    ...['-accel', ACCELERATOR, '-cpu', 'qemu64', '-smp', '2', '-m', '256M'],
    ...['-object', memory, '-machine', 'q35,memory-backend=ram'],
    ...['-chardev', `socket,id=disk,path=${at('s')},reconnect=1`],
    ...['-device', 'vhost-user-blk-pci,chardev=disk,num-queues=2'],
    ...['-kernel', guest.kernel, '-initrd', at('initramfs')],
    ...['-append', 'console=ttyS0 quiet panic=-1'],
  ]);
}

function prepare() {
  report.heading('A sealed disk with a root filesystem in it');
  const guest = fetchGuest();
  makeInitramfs(guest, at('early'), at('initramfs'));
  makeRootfs(guest, at('tree'), at('root.raw'), ROOT_BYTES, GUEST_SCRIPT);
  pqblk.text(['key', 'gen', 'vm', '--no-passphrase']);
  const words = ['import', at('root.raw'), at('disk.sealed'), '--key', 'vm'];
  report.command(words.map((word) => word.replace(`${dir}/`, '')));
  pqblk.text(words);
  rmSync(at('root.raw'));
  report.done(`Linux ${guest.version}, ${ROOT_BYTES / MiB} MiB of ext4, sealed`);
  return guest;
}

/** Boots, kills the server now and then, and returns what the guest said until it powered off. */
async function live(guest) {
  report.heading('The guest runs from it; its server is killed twice');
  let server = await serve();
  const vm = boot(guest);
  const said = { files: new Map() };
  let kills = 0;
  let killing = Promise.resolve();
  const replace = async () => {
    server.kill('SIGKILL');
    await server.ended;
    await sleep(300);
    server = await serve();
  };
  vm.lines.on('line', (line) => {
    const [, what, rest] = /GUEST (\w+) ?(.*?)\r?$/.exec(line) ?? [];
    if (process.env.PQBLK_VERBOSE) console.log(line);
    if (what === undefined) return;
    if (what !== 'file') {
      said[what] = rest;
      return;
    }
    const [number, sum] = rest.split(' ');
    said.files.set(Number(number), sum);
    if (Number(number) === 6 * (kills + 1) && kills < KILLS) {
      kills += 1;
      killing = killing.then(replace); // while the next file is being written
    }
  });
  const timer = setTimeout(() => vm.kill('SIGKILL'), BOOT_LIMIT_MS);
  await vm.ended;
  clearTimeout(timer);
  await killing;
  server.kill('SIGTERM');
  await server.ended;
  report.prove(said.queues === '2', 'the guest sees a disk with 2 queues', `${vm.complaint}`);
  report.prove(/\/dev\/vda on \/|\/dev\/root/.test(said.root ?? ''), 'its root is that disk');
  report.prove(said.files.size === FILES, `it wrote and synced ${FILES} files`);
  report.prove(kills === KILLS, `its server was killed ${kills} times meanwhile, with SIGKILL`);
  report.prove(said.complained === undefined, 'the guest saw no I/O error');
  report.prove(said.trimmed !== undefined, 'it trimmed its filesystem');
  report.prove(server.exitCode === 0, 'the last server ended cleanly', server.complaint);
  return said;
}

function compare(said) {
  report.heading('What the host finds in the disk');
  pqblk.text(['export', at('disk.sealed'), at('out.raw'), '--key', 'vm']);
  const complaint = fsckComplaint(at('out.raw'));
  report.prove(complaint === '', 'e2fsck finds nothing to complain about', complaint);
  let wrong = 0;
  for (const [number, sum] of said.files) {
    if (number === 1) continue; // removed before the trim
    run('debugfs', ['-R', `dump /data/${number} ${at('file')}`, at('out.raw')]);
    if (run('md5sum', [at('file')]).split(' ')[0] !== sum) wrong += 1;
  }
  report.prove(
    wrong === 0,
    `${said.files.size - 1} files are what the guest wrote`,
    `${wrong} not`,
  );
  // A server that is killed leaves behind the space it had set aside: no error, but not in use.
  pqblk.try(['check', at('disk.sealed'), '--key', 'vm', '--repair']);
  const check = pqblk.try(['check', at('disk.sealed'), '--key', 'vm']);
  report.prove(check.code === 0, 'every sector of the sealed disk authenticates', check.stderr);
}

report.title('pqblk: a guest whose root filesystem is a sealed disk', dir);
const guest = prepare();
compare(await live(guest));
report.verdict();
process.exit(report.failed() ? 1 : 0);
