// A real guest: a Debian kernel whose root filesystem is a sealed disk over vhost-user-blk. It writes and
// syncs, its server is killed in the middle of that and another goes on; its disk grows and a second one
// is plugged in and out while it runs. The long version is scripts/test-vm.mjs.
//
// The processor is emulated, which takes its time on a machine that does other things too: every wait
// is for what the guest says, and only the whole has a limit.
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { expect, it, type TestContext } from 'vitest';
// @ts-expect-error: JavaScript without declarations
import * as guests from '../../scripts/demo/guest.mjs';
import { MAIN, peer, pqblk, pqblkJson, scratch } from '../cli/helpers.js';
import { running, serve } from '../cli/serving.js';

const MiB = 2 ** 20;
const LIMIT_MS = 600_000;
const ROOT_BYTES = 32 * MiB;
const DATA_BYTES = 8 * MiB;
const GROWN_BYTES = 40 * MiB;
const FILES = 12;
const KILL_AT = 4; // while the next file is being written

const dir = scratch();
const at = (name: string) => join(dir, name);
const keys = ['--key', 'vm', '--store', at('keys')];

const SCRIPT = [
  'dmesg -n 1; say() { echo "GUEST $*"; }',
  'say queues $(ls /sys/block/vda/mq | wc -l)',
  `for i in $(seq 1 ${FILES}); do`,
  '  dd if=/dev/urandom of=/data/$i bs=64k count=8 2>/dev/null && sync',
  '  say file $i $(md5sum < /data/$i | cut -d" " -f1)',
  'done',
  'echo 3 > /proc/sys/vm/drop_caches; say again $(cat /data/* | md5sum | cut -d" " -f1)',
  `until [ $(cat /sys/block/vda/size) = ${GROWN_BYTES / 512} ]; do sleep 0.1; done; say grown`,
  'until [ -b /dev/vdb ]; do sleep 0.1; done; say plugged $(cat /sys/block/vdb/size)',
  'dd if=/data/1 of=/dev/vdb bs=64k conv=fsync 2>/dev/null; say written',
  'while [ -b /dev/vdb ]; do sleep 0.1; done; say unplugged',
  'dmesg | grep -iE "i/o error|ext4-fs error" && say complains',
  'mount -o remount,ro /; sync; poweroff -f',
];

/** Linux and busybox, fetched by scripts/setup --test; the test is skipped where there are none. */
function prepare(context: TestContext) {
  const emulator = spawnSync(guests.QEMU, ['--version']).status === 0;
  if (!emulator || !guests.haveGuest()) {
    console.log('SKIP: a real guest needs QEMU and a kernel; scripts/setup --test fetches them');
    context.skip();
  }
  const guest = guests.fetchGuest();
  guests.makeInitramfs(guest, at('early'), at('initramfs'), guests.ROOT_ON_VDA);
  guests.makeRootfs(guest, at('tree'), at('root.raw'), ROOT_BYTES, SCRIPT);
  return guest;
}

/** What the guest says; `said(what)` waits for it. */
class Story {
  readonly files = new Map<string, string>();
  readonly #said = new Map<string, string>();
  readonly #lines: string[] = [];
  #over = false;
  #wake = () => {};

  constructor(vm: ChildProcess) {
    if (vm.stdout === null || vm.stderr === null) throw new Error('not piped');
    for (const stream of [vm.stdout, vm.stderr]) {
      createInterface({ input: stream }).on('line', (line) => this.#tell(line));
    }
    vm.on('close', () => {
      this.#over = true;
      this.#wake();
    });
  }

  #tell(line: string) {
    this.#lines.push(line);
    const [, what, rest] = /GUEST (\S+) ?(.*?)\r?$/.exec(line) ?? [];
    if (what === undefined || rest === undefined) return;
    const [number, sum] = rest.split(' ');
    if (what === 'file') this.files.set(String(number), String(sum));
    this.#said.set(what === 'file' ? `file ${number}` : what, rest);
    this.#wake();
  }

  has(what: string): boolean {
    return this.#said.has(what);
  }

  async said(what: string): Promise<string> {
    for (;;) {
      const rest = this.#said.get(what);
      if (rest !== undefined) return rest;
      if (this.#over) throw new Error(`no “${what}” from the guest:\n${this.#lines.join('\n')}`);
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }
}

function boot(guest: unknown): ChildProcess {
  const vm = spawn(
    guests.QEMU,
    [
      ...guests.machine(guest, at('initramfs')),
      ...['-qmp', `unix:${at('qmp')},server=on,wait=off`],
      ...['-chardev', `socket,id=root,path=${at('s')},reconnect=1`],
      ...['-device', 'vhost-user-blk-pci,chardev=root,num-queues=2'],
    ],
    { stdio: ['ignore', 'pipe', 'pipe'] },
  );
  running.add(vm);
  return vm;
}

/** Plugs a second disk into the running guest, which writes to it, and takes it out again. */
async function hotplug(story: Story) {
  const words = ['attach', at('data.sealed'), ...keys, '--qmp', at('qmp'), '--id', 'data'];
  const attach = spawn(process.execPath, [MAIN, ...words], { stdio: 'ignore' });
  running.add(attach);
  const ended = once(attach, 'close');
  expect(await story.said('plugged')).toBe(String(DATA_BYTES / 512));
  await story.said('written');
  expect(await pqblk('detach', 'data', '--qmp', at('qmp'))).toMatchObject({ code: 0, stderr: '' });
  await story.said('unplugged');
  expect((await ended)[0]).toBe(0);
  running.delete(attach);
}

/** What the host finds in the two disks. */
async function compare({ files }: Story) {
  await pqblkJson('export', at('root.sealed'), at('out.raw'), ...keys);
  peer('e2fsck', '-fn', at('out.raw'));
  for (const [number, sum] of files) {
    peer('debugfs', '-R', `dump /data/${number} ${at('file')}`, at('out.raw'));
    expect(peer('md5sum', at('file')).split(' ')[0]).toBe(sum);
    if (number !== '1') continue;
    await pqblkJson('export', at('data.sealed'), at('data.raw'), ...keys);
    const first = readFileSync(at('file'));
    expect(readFileSync(at('data.raw')).subarray(0, first.length).equals(first)).toBe(true);
  }
  // Nor has the server that was killed left space behind that nobody can use.
  const whole = { clean: true, leaks: 0 };
  expect(await pqblkJson('check', at('root.sealed'), ...keys)).toMatchObject(whole);
}

it(
  'boots from a sealed disk, and loses nothing when its server is killed',
  async (context) => {
    const guest = prepare(context);
    await pqblkJson('key', 'gen', 'vm', '--no-passphrase', '--store', at('keys'));
    await pqblkJson('import', at('root.raw'), at('root.sealed'), ...keys);
    await pqblkJson('create', at('data.sealed'), String(DATA_BYTES), ...keys);
    const how = ['--vhost-user', at('s'), '--queues', '2', '--cache', 'writeback'];
    const first = await serve(at('root.sealed'), ...keys, ...how);
    const begin = performance.now();
    const vm = boot(guest);
    const off = once(vm, 'close');
    const story = new Story(vm);
    expect(await story.said('queues')).toBe('2');
    const booted = performance.now();

    await story.said(`file ${KILL_AT}`);
    first.child.kill('SIGKILL');
    const during = !story.has('again');
    const server = await serve(at('root.sealed'), ...keys, ...how);
    await story.said('again');
    expect([during, story.files.size]).toEqual([true, FILES]);

    expect(await pqblkJson('resize', at('root.sealed'), String(GROWN_BYTES))).toMatchObject({
      served: true,
    });
    await story.said('grown');
    await hotplug(story);
    await off;
    running.delete(vm);
    const seconds = (ms: number) => `${(ms / 1000).toFixed(0)} s`;
    const now = performance.now();
    console.log(
      `NOTE: a guest: booted in ${seconds(booted - begin)}, off at ${seconds(now - begin)}`,
    );
    expect(story.has('complains')).toBe(false);
    expect(await server.end()).toBe(0);
    await compare(story);
  },
  LIMIT_MS,
);
