// `npm run demo`: the whole product in under two minutes, on real data, with a proof at each step.
//
// A filesystem made of real files goes into a sealed disk; a writer is killed in mid-load; what it
// had flushed is still there; the filesystem comes out as it went in; a flipped bit and a wrong key
// are refused; and a table shows what it costs. Everything is made in one temporary directory, which
// is removed at the end, however it ends. The exit code is 1 when any proof fails.
import { spawnSync } from 'node:child_process';
import {
  copyFileSync,
  existsSync,
  mkdtempSync,
  rmSync,
  statfsSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fio, LOADS, pqblkBench, show } from './demo/bench.mjs';
import { killWriter, verify } from './demo/crash.mjs';
import { DISK_BYTES, fsckComplaint, makeExt4 } from './demo/ext4.mjs';
import { commandLine } from './demo/pqblk.mjs';
import * as report from './demo/report.mjs';
import { flipByte, hostOffsetOf } from './demo/sealed-map.mjs';

const MiB = 2 ** 20;
/** The disk is larger than the filesystem in it: the killed writer works in the part behind. */
const EXTRA_BYTES = 64 * MiB;
const KILLS = 3;
const SPACE_BYTES = 4 * 1024 * MiB;

const roomIn = (dir) => {
  const { bavail, bsize } = statfsSync(dir);
  return existsSync(dir) && bavail * bsize > SPACE_BYTES;
};
/** Memory where there is enough of it: then the table shows the engine and not the disk. */
const inMemory = existsSync('/dev/shm') && roomIn('/dev/shm');
const dir = mkdtempSync(join(inMemory ? '/dev/shm' : tmpdir(), 'pqblk-demo-'));
const cleanUp = () => rmSync(dir, { recursive: true, force: true });
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => {
    cleanUp();
    process.exit(1);
  });
}
process.on('exit', cleanUp);

const at = (name) => join(dir, name);
const pqblk = commandLine({ PQBLK_KEYS: at('keys') });
const typed = (words) => report.command(words.map((word) => word.replace(`${dir}/`, '')));
const run = (...words) => {
  typed(words);
  return pqblk.text(words);
};
const size = (path) => `${(statSync(path).blocks / 2048).toFixed(0)} MiB`;

function makeDisk() {
  report.heading('A real ext4 disk of 512 MiB');
  const { taken, files } = makeExt4(at('disk.raw'), at('files'));
  rmSync(at('files'), { recursive: true });
  report.done(`${files} files from ${taken.join(', ')}`);
  report.prove(fsckComplaint(at('disk.raw')) === '', 'e2fsck finds it clean');
}

function seal() {
  report.heading('A post-quantum key, and the disk sealed to it');
  writeFileSync(at('passphrase'), 'correct horse battery staple\n');
  run('key', 'gen', 'alice', '--passphrase-file', at('passphrase'));
  run('key', 'gen', 'mallory', '--no-passphrase');
  run('import', at('disk.raw'), at('disk.sealed'), '--key', 'alice');
  const resize = ['resize', at('disk.sealed'), `+${EXTRA_BYTES / MiB}M`, '--key', 'alice'];
  run(...resize, '--passphrase-file', at('passphrase'));
  const { sealed } = pqblk.json(['info', at('disk.sealed')]);
  const [slot] = sealed.keyArea.slots;
  report.done(
    `${sealed.suite}, key slot "${slot.label}" under ${slot.kem}, takes ${size(at('disk.sealed'))}`,
  );
  report.prove(sealed.clean, 'sealed, and closed cleanly');
  const text = 'lost+found';
  report.prove(
    contains(at('disk.raw'), text) && !contains(at('disk.sealed'), text),
    `"${text}" is in the plain disk and nowhere in the sealed one`,
  );
}

function contains(file, text) {
  return spawnSync('grep', ['-q', '-a', '-F', text, file]).status === 0;
}

async function crash() {
  report.heading(`A writer killed in mid-load, ${KILLS} times`);
  const target = {
    path: at('disk.sealed'),
    store: at('keys'),
    key: 'alice',
    passphraseFile: at('passphrase'),
    from: DISK_BYTES,
    blocks: EXTRA_BYTES / 4096,
  };
  const flushedRounds = [];
  let first = 1;
  for (let kill = 1; kill <= KILLS; kill++) {
    const killed = await killWriter(target, first, 300 + 250 * kill);
    report.done(`SIGKILL after ${killed.writes} writes; flushed up to round ${killed.flushed}`);
    flushedRounds.push([first, killed.flushed]);
    const found = await verify(target, flushedRounds);
    report.prove(
      found.lost === 0 && found.torn === 0 && killed.flushed > first,
      `reopened in ${found.openMs.toFixed(0)} ms: every flushed write is there, no block is torn`,
      `${found.lost} blocks lost, ${found.torn} torn`,
    );
    first = found.newest + 1;
  }
}

function exportBack() {
  report.heading('Out again: the filesystem as it went in');
  run(
    ...['export', at('disk.sealed'), at('out.raw'), '--key', 'alice'],
    ...['--passphrase-file', at('passphrase')],
  );
  const cmp = spawnSync('cmp', ['-n', `${DISK_BYTES}`, at('disk.raw'), at('out.raw')], {
    encoding: 'utf8',
  });
  report.prove(cmp.status === 0, 'byte for byte the same 512 MiB (cmp)', cmp.stdout + cmp.stderr);
  const complaint = fsckComplaint(at('out.raw'));
  report.prove(complaint === '', 'e2fsck -fn finds the exported filesystem clean', complaint);
  report.done(`sparse: ${size(at('disk.raw'))} went in, ${size(at('out.raw'))} came out`);
  rmSync(at('out.raw'));
}

function tamper() {
  report.heading('One flipped bit, and the wrong key');
  const copy = at('tampered.sealed');
  copyFileSync(at('disk.sealed'), copy);
  const guest = 4096; // ext4's group descriptors: in use on every filesystem
  const host = hostOffsetOf(copy, guest);
  flipByte(copy, host);
  report.done(`flipped one bit of ciphertext at byte ${host} of a copy`);
  const identity = ['--key', 'alice', '--passphrase-file', at('passphrase')];
  const check = ['check', copy, ...identity];
  typed(check);
  refusal(check, 5, `check names the damage`);
  refusal(['export', copy, at('never.raw'), ...identity], 5, 'and no export of it is made');
  const stranger = ['export', at('disk.sealed'), at('never.raw'), '--key', 'mallory'];
  typed(stranger);
  refusal(stranger, 3, 'another key opens nothing');
  rmSync(copy);
}

function refusal(words, exitCode, text) {
  const { code, stderr } = pqblk.try(words);
  const [line = ''] = stderr.split('\n');
  const message = line.replaceAll(`${dir}/`, '');
  report.prove(code === exitCode, `${text} (exit code ${code})`, message);
  if (code === exitCode) report.done(`  ${message}`);
  if (existsSync(at('never.raw'))) report.prove(false, 'a refused export left a file behind');
}

function measure() {
  report.heading(`What it costs (${inMemory ? 'in memory' : dir}, one queue)`);
  const qcow2 = ['import', at('disk.raw'), at('bench.qcow2'), '--format', 'qcow2'];
  pqblk.text([...qcow2, '--preallocation', 'full']);
  pqblk.text(['import', at('disk.raw'), at('bench.sealed'), '--key', 'mallory']);
  spawnSync('cp', ['--sparse=never', at('disk.raw'), at('bench.raw')]);
  for (const [path, options] of [
    ['bench.qcow2', ['--format', 'qcow2']],
    ['bench.sealed', ['--key', 'mallory']],
  ]) {
    // Every block is allocated before the clock runs, as on a disk that has been used.
    pqblk.text(['bench', at(path), ...options, '--rw', 'write', '--bs', '1m', '--iodepth', '8']);
  }
  const rows = [
    ['fio io_uring, plain file', (load) => fio(at('bench.raw'), load)],
    ['pqblk raw', (load) => pqblkBench(pqblk, at('bench.raw'), ['--format', 'raw'], load)],
    ['pqblk qcow2', (load) => pqblkBench(pqblk, at('bench.qcow2'), ['--format', 'qcow2'], load)],
    ['pqblk sealed', (load) => pqblkBench(pqblk, at('bench.sealed'), ['--key', 'mallory'], load)],
  ];
  const results = rows.map(([name, measureOne]) => [name, LOADS.map(measureOne)]);
  const [[, yardstick]] = results;
  report.table([
    ['', ...LOADS.flatMap((load) => [load.heading, ''])],
    ...results.map(([name, values]) => [
      name,
      ...values.flatMap((value, index) => [
        show(value, LOADS[index]),
        `${((100 * value) / yardstick[index]).toFixed(0)} %`,
      ]),
    ]),
  ]);
}

report.title(
  'pqblk: a virtual disk that only a post-quantum key opens',
  'Real files, real crashes; each ✓ is checked, not claimed.',
);
try {
  makeDisk();
  seal();
  await crash();
  exportBack();
  tamper();
  measure();
} catch (error) {
  report.prove(false, 'the demo ran to its end', error.stack);
}
report.verdict();
process.exitCode = report.failed() ? 1 : 0;
