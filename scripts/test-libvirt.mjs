// Part of `npm run test:vm`: libvirt runs a guest from the domain that docs/vhost-user.md shows.
//
// libvirt's driver runs inside of virt-qemu-run, with all of its state below the working directory: no
// daemon, and nothing of the machine's own libvirt. The guide's XML is taken as it is, but for what a
// machine under test has: an emulated processor, less memory, a kernel on the host, and a console in a
// file. The guest's root filesystem is the sealed disk; its server is killed while the guest writes.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { fsckComplaint } from './demo/ext4.mjs';
import {
  fetchGuest,
  findQemu,
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
const ROOT_BYTES = 32 * MiB;
const PATIENCE_MS = 300_000;
const FILES = 12;
const KILL_AT = 4;
const GUIDE = fileURLToPath(new URL('../docs/vhost-user.md', import.meta.url));

const dir = workplace('pqblk-libvirt-');
const at = (name) => join(dir, name);
findQemu('test:vm');
const environment = { PQBLK_KEYS: at('keys') };
const pqblk = commandLine(environment);

const SCRIPT = [
  'say() { echo "GUEST $*"; }; say queues $(ls /sys/block/vda/mq | wc -l)',
  `for i in $(seq 1 ${FILES}); do`,
  '  dd if=/dev/urandom of=/data/$i bs=64k count=8 2>/dev/null && sync',
  '  say file $i $(md5sum < /data/$i | cut -d" " -f1)',
  'done',
  'dmesg | grep -iE "i/o error|ext4-fs error" && say complains',
  'mount -o remount,ro /; sync; say over; poweroff -f',
];

/** The guide's domain, on this machine. */
function domain(guest) {
  const shown = /```xml\n([\s\S]*?)```/.exec(readFileSync(GUIDE, 'utf8'))?.[1];
  const change = (text, from, to) => {
    if (!text?.includes(from)) throw new Error(`the guide's domain has no ${from}`);
    return text.replace(from, to);
  };
  const boot =
    `<kernel>${guest.kernel}</kernel><initrd>${at('initramfs')}</initrd>` +
    '<cmdline>console=ttyS0 quiet panic=-1</cmdline>';
  const devices =
    `<devices><emulator>/usr/bin/${QEMU}</emulator>` +
    `<serial type='file'><source path='${at('console')}'/></serial>`;
  return [
    ["type='kvm'", "type='qemu'"],
    ["<memory unit='GiB'>2<", "<memory unit='MiB'>256<"],
    ['/run/pqblk/vm.sock', at('s')],
    ['</os>', `${boot}</os>`],
    ['<devices>', devices],
  ].reduce((text, [from, to]) => change(text, from, to), shown);
}

/** QEMU as who runs this, and none of the system's cgroups and namespaces. */
const SETTINGS = [
  ...[`user = "+${process.getuid()}"`, `group = "+${process.getgid()}"`],
  ...['dynamic_ownership = 0', 'remember_owner = 0'],
  ...['security_driver = "none"', 'cgroup_controllers = [ ]', 'namespaces = [ ]'],
  'stdio_handler = "file"',
];

const serve = () =>
  startPqblk(
    ['serve', at('disk.sealed'), '--key', 'vm', '--vhost-user', at('s'), '--queues', '2'],
    environment,
  );

function prepare() {
  report.heading('A sealed disk, and the domain of docs/vhost-user.md');
  const guest = fetchGuest();
  makeInitramfs(guest, at('early'), at('initramfs'), ROOT_ON_VDA);
  makeRootfs(guest, at('tree'), at('root.raw'), ROOT_BYTES, SCRIPT);
  pqblk.text(['key', 'gen', 'vm', '--no-passphrase']);
  pqblk.text(['import', at('root.raw'), at('disk.sealed'), '--key', 'vm']);
  mkdirSync(at('root/etc'), { recursive: true });
  writeFileSync(at('root/etc/qemu.conf'), `${SETTINGS.join('\n')}\n`);
  writeFileSync(at('console'), '');
  writeFileSync(at('vm.xml'), domain(guest));
  report.done(`Linux ${guest.version}`);
}

/** The lines that the guest said so far, without their first word. */
const said = () => [...readFileSync(at('console'), 'utf8').matchAll(/^GUEST (.*?)\r?$/gm)];

async function live() {
  report.heading('libvirt runs it, and the server is killed meanwhile');
  let server = await serve();
  const vm = start('virt-qemu-run', [`--root=${at('root')}`, at('vm.xml')]);
  let over = false;
  const ended = vm.ended.then(() => {
    over = true;
  });
  const timer = setTimeout(() => {
    over = true;
  }, PATIENCE_MS);
  const wrote = (file) => said().some(([, text]) => text.startsWith(`file ${file} `));
  while (!over && !wrote(KILL_AT)) await sleep(50);
  server.kill('SIGKILL');
  await server.ended;
  const meanwhile = !wrote(FILES);
  server = await serve();
  while (!over && !said().some(([, text]) => text === 'over')) await sleep(50);
  clearTimeout(timer);
  vm.kill('SIGTERM'); // it destroys what is left of its domain
  await ended;
  server.kill('SIGTERM');
  await server.ended;
  const lines = said().map(([, text]) => text);
  const sums = new Map();
  for (const line of lines) {
    const [, file, sum] = /^file (\d+) (\w+)$/.exec(line) ?? [];
    if (file !== undefined) sums.set(file, sum);
  }
  report.prove(lines.includes('queues 2'), 'the guest sees a disk with 2 queues', vm.complaint);
  report.prove(sums.size === FILES, `it wrote and synced ${FILES} files`);
  report.prove(meanwhile, 'its server was killed meanwhile, with SIGKILL');
  report.prove(!lines.includes('complains'), 'the guest saw no I/O error');
  report.prove(vm.exitCode === 0, 'virt-qemu-run ended cleanly', vm.complaint);
  report.prove(server.exitCode === 0, 'the last server ended cleanly', server.complaint);
  return sums;
}

function compare(sums) {
  report.heading('What the host finds in the disk');
  pqblk.text(['export', at('disk.sealed'), at('out.raw'), '--key', 'vm']);
  const complaint = fsckComplaint(at('out.raw'));
  report.prove(complaint === '', 'e2fsck finds nothing to complain about', complaint);
  const wrong = [...sums].filter(([file, sum]) => {
    run('debugfs', ['-R', `dump /data/${file} ${at('file')}`, at('out.raw')]);
    return run('md5sum', [at('file')]).split(' ')[0] !== sum;
  });
  report.prove(wrong.length === 0, `${sums.size} files are what the guest wrote`, `${wrong}`);
}

report.title('pqblk: a guest of libvirt on a sealed disk', dir);
prepare();
compare(await live());
report.verdict();
process.exit(report.failed() ? 1 : 0);
