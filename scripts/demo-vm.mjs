// `npm run demo:vm`: a Debian kernel whose root filesystem is a sealed disk over vhost-user-blk.
//
// The guest boots from it on two queues, writes and syncs; its server is killed with SIGKILL in the
// middle of that, and another takes its place; the guest notices nothing and powers off. Then the
// host opens the disk and compares what is in it with what the guest said it wrote. The processor is
// emulated unless `--kvm` says otherwise. The exit code is 1 when any proof fails.
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fsckComplaint } from './demo/ext4.mjs';
import {
  fetchGuest,
  findQemu,
  machine,
  makeInitramfs,
  makeRootfs,
  QEMU,
  ROOT_ON_VDA,
  run,
} from './demo/guest.mjs';
import { commandLine } from './demo/pqblk.mjs';
import { start, startPqblk, workplace } from './demo/processes.mjs';
import * as report from './demo/report.mjs';

const MiB = 2 ** 20;
const ROOT_BYTES = 256 * MiB;
const BOOT_LIMIT_MS = 240_000;
const KILLS = 2;
const FILES = 24;

const dir = workplace('pqblk-vm-');
const at = (name) => join(dir, name);
findQemu('demo:vm');

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

const serve = () =>
  startPqblk(
    [
      ...['serve', at('disk.sealed'), '--key', 'vm', '--vhost-user', at('s'), '--queues', '2'],
      ...['--cache', 'writeback'],
    ],
    { PQBLK_KEYS: at('keys') },
  );

const boot = (guest) =>
  start(QEMU, [
    ...machine(guest, at('initramfs')),
    ...['-chardev', `socket,id=disk,path=${at('s')},reconnect=1`],
    ...['-device', 'vhost-user-blk-pci,chardev=disk,num-queues=2'],
  ]);

function prepare() {
  report.heading('A sealed disk with a root filesystem in it');
  const guest = fetchGuest();
  makeInitramfs(guest, at('early'), at('initramfs'), ROOT_ON_VDA);
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
  const check = pqblk.try(['check', at('disk.sealed'), '--key', 'vm']);
  report.prove(
    check.code === 0,
    'every sector of the sealed disk authenticates, and no space is lost',
    check.stderr,
  );
}

report.title('pqblk: a guest whose root filesystem is a sealed disk', dir);
const guest = prepare();
compare(await live(guest));
report.verdict();
process.exit(report.failed() ? 1 : 0);
