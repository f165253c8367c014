// What the servers of a disk give, beside what others give on this machine in the same minutes.
//
//   node bench/export.mjs [--quick] [--json FILE]
//
// 1 GiB in memory, full of data; 4 KiB, 32 in flight. NBD through fio's own engine, vhost-user through
// a front-end without a guest (bench_vhost), against QEMU's storage daemon with the same content. All
// servers run all the time; rounds go through the measurements in turn, forward and backward, and the
// median of the rounds counts. A front-end's ring has a thread, which polls or sleeps until it is
// called; of both the better counts, for either side. --quick: fewer and shorter rounds.
import { spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { createWriteStream, writeFileSync } from 'node:fs';
import { availableParallelism, cpus, loadavg } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { directIoWorks } from '../scripts/demo/bench.mjs';
import { commandLine } from '../scripts/demo/pqblk.mjs';
import { workplace } from '../scripts/demo/processes.mjs';
import * as report from '../scripts/demo/report.mjs';
import { fioFile, fioNbd, vhost, vhostThen } from './lib/export-loads.mjs';
import { cpuPercent, memoryOf, servePqblk, serveQemu } from './lib/servers.mjs';

const MiB = 2 ** 20;
const SIZE = 1024 * MiB;
const QUEUES = 2;
const MANY = 64;
const { quick, json: resultFile } = readArguments();
const ROUNDS = quick ? 3 : 5;
const SECONDS = quick ? 1 : 3;
const IDLE_MS = quick ? 4_000 : 10_000;

function readArguments() {
  const options = { quick: { type: 'boolean' }, json: { type: 'string' } };
  try {
    return parseArgs({ options }).values;
  } catch (error) {
    console.error(`bench: ${error.message}\nusage: bench/export.mjs [--quick] [--json FILE]`);
    process.exit(2);
  }
}

const root = fileURLToPath(new URL('..', import.meta.url));
const dir = workplace('pqblk-bench-');
const at = (name) => join(dir, name);
const env = { PQBLK_KEYS: at('keys') };
const pqblk = commandLine(env);

function run(file, args) {
  const { status, stderr, error } = spawnSync(file, args, { encoding: 'utf8', cwd: root });
  if (error) throw error;
  if (status !== 0) throw new Error(`${file} ${args.join(' ')}: exit ${status}\n${stderr}`);
}

/** Builds the front-end and returns its path. */
function buildFrontEnd() {
  const build = join(root, 'build', 'release');
  run('cmake', ['-S', root, '-B', build, '-DPQBLK_BUILD_TESTS=ON']);
  const jobs = `${availableParallelism()}`;
  run('cmake', ['--build', build, '--target', 'bench_vhost', '--parallel', jobs]);
  return join(build, 'bench_vhost');
}

/** The same noise as raw, QCOW2 (twice: one for each server), LUKS inside QCOW2, and sealed. */
async function makeDisks() {
  function* noise() {
    for (let done = 0; done < SIZE; done += MiB) yield randomBytes(MiB);
  }
  await pipeline(Readable.from(noise()), createWriteStream(at('disk.raw')));
  const convert = (name, ...options) =>
    run('qemu-img', [
      ...['convert', '-q', '-f', 'raw', '-O', 'qcow2', ...options],
      ...[at('disk.raw'), at(name)],
    ]);
  convert('ours.qcow2');
  convert('theirs.qcow2');
  writeFileSync(at('secret'), 'correct horse battery staple', { mode: 0o600 });
  const luks = 'encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=100';
  convert('luks.qcow2', '--object', `secret,id=key,file=${at('secret')}`, '-o', luks);
  pqblk.text(['key', 'gen', 'bench', '--no-passphrase']);
  pqblk.text(['import', at('disk.raw'), at('disk.sealed'), '--key', 'bench']);
}

const sockets = (name) => ({ nbd: at(`${name}.nbd`), 'vhost-user': at(`${name}.vu`) });

async function startServers(direct) {
  const ours = (disk, name, ...args) =>
    servePqblk(at(disk), sockets(name), { queues: QUEUES, direct, args, env });
  const theirs = (disk, format, name) =>
    serveQemu(at(disk), format, sockets(name), { queues: QUEUES, direct, secret: at('secret') });
  return {
    raw: await ours('disk.raw', 'raw'),
    qcow2: await ours('ours.qcow2', 'qcow2'),
    sealed: await ours('disk.sealed', 'sealed', '--key', 'bench'),
    // Without locks on the file that fio and pqblk have open as well; it is never asked meanwhile.
    'qemu-raw': await theirs('disk.raw', 'raw', 'qemu-raw'),
    'qemu-qcow2': await theirs('theirs.qcow2', 'qcow2', 'qemu-qcow2'),
    'qemu-luks': await theirs('luks.qcow2', 'luks', 'qemu-luks'),
  };
}

/** Name → what measures it once. */
function measurements(frontEnd, direct) {
  const all = new Map();
  all.set('file, fio io_uring', () => fioFile(at('disk.raw'), direct, 'randread', SECONDS));
  for (const rw of ['randread', 'randwrite']) {
    for (const name of ['sealed', 'qemu-luks', 'qcow2', 'qemu-qcow2']) {
      const path = name.startsWith('qemu') ? 'disk' : '';
      const uri = `nbd+unix:///${path}?socket=${encodeURI(sockets(name).nbd)}`;
      all.set(`nbd ${name} ${rw}`, () => fioNbd(uri, rw, SECONDS));
    }
  }
  for (const name of ['raw', 'qcow2', 'sealed', 'qemu-raw', 'qemu-qcow2', 'qemu-luks']) {
    for (const rings of [1, 2]) {
      for (const wait of ['poll', 'call']) {
        const how = { rings, wait, size: SIZE, rw: 'randread', seconds: SECONDS };
        all.set(`vhost ${name} ${rings}q ${wait}`, () =>
          vhost(frontEnd, sockets(name)['vhost-user'], how),
        );
      }
    }
  }
  return all;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function rounds(all) {
  const samples = new Map([...all.keys()].map((name) => [name, []]));
  for (let round = 0; round < ROUNDS; round++) {
    const order = round % 2 ? [...all].reverse() : [...all];
    for (const [name, measure] of order) samples.get(name).push(measure());
    report.done(`round ${round + 1} of ${ROUNDS}, load ${loadavg()[0].toFixed(1)}`);
  }
  return new Map([...samples].map(([name, values]) => [name, { median: median(values), values }]));
}

/** Percent of a core of a server whose front-end is connected and asks nothing. */
async function idleCpu(frontEnd, servers) {
  const look = () => cpuPercent(servers.sealed.pid, IDLE_MS);
  const how = { rings: QUEUES, size: SIZE, stayMs: IDLE_MS + 10_000 };
  return await vhostThen(frontEnd, sockets('sealed')['vhost-user'], how, look);
}

/** Resident bytes of a server with 64 queues, after a load on each of them. */
async function manyQueues(frontEnd, direct, servers) {
  servers.sealed.kill('SIGTERM');
  await servers.sealed.ended;
  const ways = { 'vhost-user': at('many.vu') };
  const args = ['--key', 'bench'];
  const server = await servePqblk(at('disk.sealed'), ways, { queues: MANY, direct, args, env });
  const how = { rings: MANY, size: SIZE, stayMs: 10_000 };
  const memory = await vhostThen(frontEnd, at('many.vu'), how, () => memoryOf(server.pid));
  server.kill('SIGTERM');
  await server.ended;
  return memory;
}

/** What the issue asks for: [what, found, wanted, whether more is better]. */
function targets(results, idle, memory) {
  const iops = (name) => results.get(name).median;
  const best = (name) => Math.max(iops(`vhost ${name} poll`), iops(`vhost ${name} call`));
  const ratio = (what, over, under, wanted) => ({ what, found: over / under, wanted });
  const nbd = (ours, theirs, wanted) =>
    ['randread', 'randwrite'].map((rw) => {
      const what = `nbd, ${rw}: ${ours} / ${theirs}`;
      return ratio(what, iops(`nbd ${ours} ${rw}`), iops(`nbd ${theirs} ${rw}`), wanted);
    });
  const vs = (ours, theirs, wanted) =>
    ratio(`vhost 1q: ${ours} / ${theirs}`, best(`${ours} 1q`), best(`${theirs} 1q`), wanted);
  const scale = (name) =>
    ratio(`vhost ${name}: 2q / 1q`, best(`${name} 2q`), best(`${name} 1q`), 1.6);
  const file = iops('file, fio io_uring');
  return [
    ...nbd('sealed', 'qemu-luks', 3),
    ...nbd('qcow2', 'qemu-qcow2', 1.5),
    ratio('vhost 1q: raw / fio on the file', best('raw 1q'), file, 0.9),
    ratio('vhost 1q: sealed / fio on the file', best('sealed 1q'), file, 0.65),
    ...['raw', 'sealed'].map(scale),
    vs('raw', 'qemu-raw', 2),
    vs('qcow2', 'qemu-qcow2', 2),
    vs('sealed', 'qemu-luks', 4),
    { what: 'idle, percent of a core', found: idle, wanted: 1, below: true },
    { what: '64 queues, MiB resident', found: memory.now / MiB, wanted: 256, below: true },
  ].map((target) => ({
    ...target,
    holds: target.below ? target.found <= target.wanted : target.found >= target.wanted,
  }));
}

function print(results, wanted) {
  const k = (value) => `${(value / 1000).toFixed(1)}k`;
  report.heading('4 KiB, 32 in flight: IOPS, median and range');
  report.table([
    ['', 'median', 'least', 'most'],
    ...[...results].map(([name, { median: m, values }]) => [
      ...[name, k(m), k(Math.min(...values)), k(Math.max(...values))],
    ]),
  ]);
  report.heading('What was asked for');
  report.table([
    ['', 'found', 'wanted', ''],
    ...wanted.map(({ what, found, wanted: goal, below, holds }) => [
      ...[what, found.toFixed(2), `${below ? '≤' : '≥'} ${goal}`, holds ? '✓' : '✗'],
    ]),
  ]);
}

report.title('pqblk: its servers, measured', `${cpus()[0].model}, ${availableParallelism()} cores`);
report.heading('Disks and servers');
const frontEnd = buildFrontEnd();
await makeDisks();
const direct = directIoWorks(at('disk.raw'));
const servers = await startServers(direct);
report.heading('Rounds');
const results = rounds(measurements(frontEnd, direct));
const idle = await idleCpu(frontEnd, servers);
const memory = await manyQueues(frontEnd, direct, servers);
const wanted = targets(results, idle, memory);
print(results, wanted);
if (resultFile !== undefined) {
  const machine = { cpu: cpus()[0].model, cores: availableParallelism(), direct };
  const settings = { rounds: ROUNDS, seconds: SECONDS, bytes: SIZE };
  const all = { machine, settings, iops: Object.fromEntries(results), idle, memory, wanted };
  writeFileSync(resultFile, `${JSON.stringify(all, undefined, 2)}\n`);
}
process.exit(0);
