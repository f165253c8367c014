// `npm run test:vm`: a guest under load on a sealed disk, whose server and whose power are taken away.
//
//   1. The disk is plugged into the running guest, taken out and plugged in again.
//   2. fio writes with checksums on both queues, and with an fsync again and again; the server is
//      killed with SIGKILL in the middle of that. The guest goes on, and every checksum holds.
//   3. The machine is saved under the same load and goes on in another QEMU: what the server wrote into
//      the guest's memory meanwhile was told (LOG_SHMFD).
//   4. fstrim, and the host has the space back.
//   5. The guest says what it has synced, file by file, under load; QEMU and the server are killed
//      together. The journal replays, on the host and in the guest, and all that was synced is there.
//
// The processor is emulated unless `--kvm` says otherwise. The exit code is 1 when any proof fails.
import { rmSync, statSync } from 'node:fs';
import { get } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { QmpConnection } from '../dist/index.js';
import { fsckComplaint } from './demo/ext4.mjs';
import {
  fetchGuest,
  findQemu,
  machine,
  makeInitramfs,
  makeTools,
  QEMU,
  run,
} from './demo/guest.mjs';
import { commandLine } from './demo/pqblk.mjs';
import { start, startPqblk, workplace } from './demo/processes.mjs';
import * as report from './demo/report.mjs';

const MiB = 2 ** 20;
const PATIENCE_MS = 300_000; // for one boot and all that it is for
const WRITES_BEFORE_KILL = 300;
const SYNCED_BEFORE_CRASH = 40;
const TRIMMED_BYTES = 16 * MiB;
const CHECKPOINT_MS = 60_000;
const CONSOLE_LINES = 40; // of the guest, told when it ends too early

const dir = workplace('pqblk-test-vm-');
const at = (name) => join(dir, name);
findQemu('test:vm');
// On a real disk if there is one: there a flush takes its time, and what came later completes before it.
const DISK = join(workplace('pqblk-test-vm-disk-', tmpdir()), 'disk.sealed');
const environment = { PQBLK_KEYS: at('keys') };
const pqblk = commandLine(environment);

const FIO =
  'chroot /tools fio --directory=/data --thread --ioengine=libaio --direct=1 --rw=randwrite --bs=4k ' +
  '--cpus_allowed=0,1 --cpus_allowed_policy=split --fallocate=none --randseed=7 --verify_fatal=1';
const KEPT = '--name=kept --size=4m --verify=crc32c --iodepth=8';
const LOADS = {
  load: '--name=load --size=12m --numjobs=2 --iodepth=16 --verify=crc32c',
  fsyncs: '--name=fsyncs --size=2m --numjobs=4 --iodepth=8 --fsync=4 --verify=crc32c',
  moved: '--name=moved --size=12m --numjobs=2 --iodepth=16 --verify=crc32c',
};
const NOISE = '--name=noise --size=8m --iodepth=8 --time_based --runtime=200';

const PREPARE = [
  'dmesg -n 1',
  'say() { echo "GUEST $*"; }',
  'trap "say failed; poweroff -f" EXIT',
  'until [ -b /dev/vda ]; do sleep 0.1; done; mkdir -p /tools',
  'mount -t ext4 -o ro /dev/vda /tools; mount -t devtmpfs dev /tools/dev',
  'mount -t proc proc /tools/proc; mount -t sysfs sys /tools/sys; mount -t tmpfs tmp /tools/tmp',
  'arrives() { until [ -b /dev/vdb ]; do sleep 0.1; done; }',
  'load() { what=$1; shift; say $what-begins',
  `  ${FIO} "$@" > /$what 2>&1 && say $what-holds || { say $what-fails; tail -5 /$what; }; }`,
];

const FIRST_LIFE = [
  ...PREPARE,
  'say awaits',
  'arrives; say plugged $(ls /sys/block/vdb/mq | wc -l)',
  'chroot /tools mkfs.ext4 -q -E nodiscard /dev/vdb && mount -t ext4 /dev/vdb /tools/data',
  'echo kept > /tools/data/note; umount /tools/data; say releases',
  'while [ -b /dev/vdb ]; do sleep 0.1; done; say unplugged',
  'arrives; mount -t ext4 /dev/vdb /tools/data; say note $(cat /tools/data/note)',
  `load kept ${KEPT}`,
  ...Object.entries(LOADS).map(([name, options]) => `load ${name} ${options}`),
  'sync; say full; sleep 1',
  'rm /tools/data/load* /tools/data/fsyncs* /tools/data/moved*; sync; fstrim /tools/data; sync; say trimmed',
  'dmesg | grep -iE "i/o error|ext4-fs error" && say complains',
  `mkdir /tools/data/j; ${FIO} ${NOISE} > /noise 2>&1 &`,
  'i=0; while :; do i=$((i+1)); f=/tools/data/j/$i',
  '  dd if=/dev/urandom of=$f bs=4k count=5 conv=fsync 2>/dev/null || say unsynced $i',
  '  say synced $i $(md5sum < $f | cut -d" " -f1)',
  'done',
];

const SECOND_LIFE = [
  ...PREPARE,
  'arrives; mount -t ext4 /dev/vdb /tools/data && say mounted',
  'dmesg | grep -q "EXT4-fs (vdb): recovery complete" && say recovered',
  'for f in /tools/data/j/*; do say found $(basename $f) $(md5sum < $f | cut -d" " -f1); done',
  `load kept ${KEPT} --verify_only`,
  'umount /tools/data; chroot /tools e2fsck -fn /dev/vdb > /fsck 2>&1 && say clean || cat /fsck',
  'dmesg | grep -iE "i/o error|ext4-fs error" && say complains',
  'trap - EXIT; sync; poweroff -f',
];

/** What a guest told so far, whichever QEMU it lives in; `heard(what)` waits for more. */
class Story {
  said = new Map();
  files = new Map();
  console = [];
  over = '';
  wake = () => {};

  tell(line) {
    if (process.env.PQBLK_VERBOSE) console.log(line);
    this.console.push(line);
    this.console.splice(0, this.console.length - CONSOLE_LINES);
    const [, what, rest] = /GUEST (\S+) ?(.*?)\r?$/.exec(line) ?? [];
    if (what === undefined) return;
    this.said.set(what, rest);
    if (what === 'synced' || what === 'found') {
      const [number, sum] = rest.split(' ');
      this.files.set(Number(number), sum);
    }
    this.wake();
  }

  async heard(...whats) {
    while (!whats.some((what) => this.said.has(what))) {
      if (this.over || this.said.has('failed')) {
        const why = this.over || 'the guest gave up';
        throw new Error(`“${whats}” was never said: ${why}\n${this.console.join('\n')}`);
      }
      await new Promise((resolve) => {
        this.wake = resolve;
      });
    }
    return this.said.get(whats.find((what) => this.said.has(what)));
  }
}

const MONITOR = ['-qmp', `unix:${at('qmp')},server=on,wait=off`];

/** `-device` and so on for the disk, as pqblk attach plugs it in. */
const withDisk = (id) => [
  ...['-chardev', `socket,id=${id}-vhost,path=${at('s')},reconnect=1`],
  ...['-device', `vhost-user-blk-pci,id=${id},chardev=${id}-vhost,num-queues=2,bus=rp1`],
];

/** A QEMU that tells `story`, until it ends or its time is over. */
function boot(story, initramfs, args) {
  const vm = start(QEMU, [
    ...machine(guest, initramfs),
    ...['-drive', `if=none,id=tools,format=raw,read-only=on,file=${at('tools.raw')}`],
    ...['-device', 'virtio-blk-pci,drive=tools', ...args],
  ]);
  vm.lines.on('line', (line) => story.tell(line));
  const timer = setTimeout(() => vm.kill('SIGKILL'), PATIENCE_MS);
  vm.ended = vm.ended.then(() => {
    clearTimeout(timer);
    if (vm.moves) return;
    if (vm.complaint) console.error(vm.complaint);
    story.over = `QEMU ended with ${vm.signalCode ?? vm.exitCode}`;
    story.wake();
  });
  return vm;
}

const serve = () =>
  startPqblk(
    [
      ...['serve', DISK, '--key', 'vm', '--vhost-user', at('s'), '--queues', '2'],
      ...['--cache', 'writeback', '--stats', at('stats')],
    ],
    environment,
  );

/** Writes of each queue since the server's start. */
async function writesOfQueues() {
  const response = await new Promise((resolve, reject) => {
    get({ socketPath: at('stats'), path: '/stats' }, resolve).on('error', reject);
  });
  const chunks = [];
  for await (const chunk of response) chunks.push(chunk);
  const [disk] = JSON.parse(Buffer.concat(chunks).toString()).disks;
  return disk.queues.map(({ writes }) => writes);
}

/** Kills the server once it has done some more, and starts another. */
async function killServer(server) {
  const total = async () => (await writesOfQueues()).reduce((sum, n) => sum + n, 0);
  const before = await total();
  const end = performance.now() + PATIENCE_MS;
  while ((await total()) < before + WRITES_BEFORE_KILL) {
    if (performance.now() > end)
      throw new Error('the load has stopped before the server was killed');
    await sleep(20);
  }
  const queues = await writesOfQueues();
  server.kill('SIGKILL');
  await server.ended;
  await sleep(300);
  return { server: await serve(), queues };
}

/** Plugs the disk in, out and in again; returns the server that has it then. */
async function hotplug(story) {
  report.heading('The disk is plugged into a running guest');
  await story.heard('awaits');
  const monitor = ['--qmp', at('qmp')];
  const options = ['--key', 'vm', '--queues', '2', '--cache', 'writeback'];
  const serving = await startPqblk(
    ['attach', DISK, ...options, ...monitor, '--id', 'disk'],
    environment,
  );
  report.prove((await story.heard('plugged')) === '2', 'pqblk attach: the guest sees 2 queues');
  await story.heard('releases');
  const out = pqblk.try(['detach', 'disk', ...monitor]);
  report.prove(out.code === 0, 'pqblk detach: QEMU says that it is gone', out.stderr);
  await story.heard('unplugged');
  await serving.ended;
  report.prove(
    serving.exitCode === 0,
    'so does the guest, and attach has ended',
    serving.complaint,
  );
  const server = await serve();
  pqblk.text(['attach', '--server', at('s'), ...monitor, '--id', 'again', '--queues', '2']);
  const note = await story.heard('note');
  report.prove(note === 'kept', 'plugged in again from pqblk serve, it has what was written');
  return server;
}

/** Loads with checksums while servers are killed; returns the last server. */
async function loads(story, first) {
  report.heading('fio verifies what it writes, and the server is killed meanwhile');
  let server = first;
  report.prove(await verdict(story, 'kept'), 'fio: random writes, crc32c, 8 in flight');
  for (const [name, kills] of [
    ['load', 2],
    ['fsyncs', 4],
  ]) {
    await story.heard(`${name}-begins`);
    const queues = [];
    for (let kill = 0; kill < kills; kill++) {
      const killed = await killServer(server);
      server = killed.server;
      queues.push(killed.queues);
    }
    const during = !story.said.has(`${name}-holds`);
    report.prove(during, `${name}: the server was killed ${kills} times, with SIGKILL`);
    report.prove(
      queues.every((writes) => writes.every((count) => count > 0)),
      `${name}: both queues wrote (${queues.map((writes) => writes.join(' + ')).join(', ')})`,
    );
    report.prove(await verdict(story, name), `${name}: every checksum holds`);
  }
  return server;
}

/** Saves the machine to a file while it is under load, and resumes it in another QEMU. */
async function move(story, vm) {
  report.heading('The machine moves to another QEMU');
  await story.heard('moved-begins');
  await sleep(500);
  const monitor = await QmpConnection.connect(at('qmp'));
  await monitor.execute('migrate', { uri: `exec:cat > ${at('state')}` });
  const state = async () => (await monitor.execute('query-migrate')).status;
  while (!/completed|failed/.test(await state())) await sleep(50);
  report.prove((await state()) === 'completed', 'it is saved, under load');
  report.prove(!story.said.has('moved-holds'), 'which goes on meanwhile');
  vm.moves = true;
  await monitor.execute('quit');
  monitor.close();
  await vm.ended;
  const incoming = ['-incoming', `exec:cat ${at('state')}`];
  const next = boot(story, at('first'), [...MONITOR, ...withDisk('again'), ...incoming]);
  report.prove(await verdict(story, 'moved'), 'resumed: every checksum holds');
  rmSync(at('state'));
  return next;
}

async function verdict(story, name) {
  await story.heard(`${name}-holds`, `${name}-fails`);
  return story.said.has(`${name}-holds`);
}

async function trim(story) {
  report.heading('fstrim');
  const blocks = () => statSync(DISK).blocks * 512;
  await story.heard('full');
  const before = blocks();
  await story.heard('trimmed');
  // Clusters are given back by the next checkpoint, which the load that follows brings about.
  const end = performance.now() + CHECKPOINT_MS;
  while (before - blocks() < TRIMMED_BYTES && performance.now() < end) await sleep(100);
  const [had, back] = [before, before - blocks()].map((bytes) => (bytes / MiB).toFixed(1));
  report.prove(before - blocks() >= TRIMMED_BYTES, `the host has ${back} of ${had} MiB back`);
}

async function powerLoss({ said, files }, vm, server) {
  report.heading('Power loss');
  while (files.size < SYNCED_BEFORE_CRASH) await sleep(50);
  for (const child of [vm, server]) child.kill('SIGKILL');
  await Promise.all([vm.ended, server.ended]);
  report.prove(!said.has('complains'), 'until then the guest saw no I/O error');
  report.done(`QEMU and server killed; ${files.size} files were synced under load`);
  pqblk.text(['export', DISK, at('crashed.raw'), '--key', 'vm']);
  const replay = run('sh', ['-c', `e2fsck -fp ${at('crashed.raw')} 2>&1; echo "exit $?"`]);
  report.prove(/recovering journal/.test(replay), 'the journal is there to replay', replay);
  report.prove(/exit [01]\n/.test(replay), 'e2fsck replays it on the host', replay);
  const complaint = fsckComplaint(at('crashed.raw'));
  report.prove(complaint === '', 'and finds nothing to complain about', complaint);
  return files;
}

async function secondLife(synced) {
  report.heading('The guest boots again');
  const server = await serve();
  const story = new Story();
  await boot(story, at('second'), withDisk('disk')).ended;
  server.kill('SIGTERM');
  await server.ended;
  const { said, files } = story;
  report.prove(said.has('mounted') && said.has('recovered'), 'it replays the journal and mounts');
  const lost = [...synced].filter(([number, sum]) => files.get(number) !== sum);
  report.prove(lost.length === 0, `all ${synced.size} synced files are there, with their content`);
  report.prove(said.has('kept-holds'), 'fio verifies what it wrote in the first life');
  report.prove(said.has('clean'), 'e2fsck in the guest is content');
  report.prove(!said.has('complains'), 'the guest saw no I/O error');
  report.prove(server.exitCode === 0, 'the server ended cleanly', server.complaint);
  const check = pqblk.try(['check', DISK, '--key', 'vm']);
  report.prove(
    check.code === 0,
    'every sector of the sealed disk authenticates, and no space is lost',
    check.stderr,
  );
}

report.title('pqblk: a guest under load, its server killed, its power lost', dir);
const guest = fetchGuest();
report.done(`Linux ${guest.version}`);
makeInitramfs(guest, at('early-1'), at('first'), FIRST_LIFE);
makeInitramfs(guest, at('early-2'), at('second'), SECOND_LIFE);
makeTools(at('tools'), at('tools.raw'), 160 * MiB, ['fio', 'mkfs.ext4', 'e2fsck']);
pqblk.text(['key', 'gen', 'vm', '--no-passphrase']);
pqblk.text(['create', DISK, '128M', '--key', 'vm']);
const story = new Story();
const vm = boot(story, at('first'), MONITOR);
const last = await loads(story, await hotplug(story));
const moved = await move(story, vm);
await trim(story);
await secondLife(await powerLoss(story, moved, last));
report.verdict();
process.exit(report.failed() ? 1 : 0);
