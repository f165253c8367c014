// Set export: the servers of a disk, and what people run instead: QEMU's storage daemon with the same
// content (raw, QCOW2, LUKS inside QCOW2), nbdkit's LUKS filter, gocryptfs.
//
// Disks in memory, full of data, 4 KiB with 32 in flight: the server is measured, not the disk. NBD goes
// through fio's own engine, vhost-user through a front-end without a guest (bench_vhost). All servers
// run all the time.
import { join } from 'node:path';
import { makeNoise, sizeOf, wrapLog } from '../lib/disks.mjs';
import { engine, fioFile, fioNbd, vhost, vhostThen } from '../lib/loads.mjs';
import { qemuImg } from '../lib/qemu.mjs';
import * as servers from '../lib/servers.mjs';

const MiB = 2 ** 20;
const QUEUES = 2;
const MANY = 64;
const IDLE_MS = 10_000;
const FILE = 'fio io_uring on the file';
const FILE_TWICE = 'fio io_uring on the file, 2 jobs';
const QEMU = 'qemu-storage-daemon';
const NBDKIT = 'nbdkit, luks filter';

const OURS = { raw: 'disk.raw', qcow2: 'ours.qcow2', sealed: 'disk.sealed' };
const THEIRS = { raw: 'disk.raw', qcow2: 'theirs.qcow2', luks: 'luks.qcow2' };
const ourName = (format) => `pqblk ${format}`;
const qemuName = (format) => `qemu ${format === 'luks' ? 'qcow2+LUKS' : format}`;

/** The same noise as raw, QCOW2 (twice: one for each server), LUKS inside QCOW2, LUKS, and sealed. */
async function makeDisks(bench, at, size) {
  bench.say(`disks of ${size / MiB} MiB in memory`);
  await makeNoise(bench, at('disk.raw'), size);
  servers.writeSecret(at('secret'));
  const convert = (name, format, ...options) => {
    const ways = ['convert', '-q', '-f', 'raw', '-O', format, ...options];
    return qemuImg(bench, [...ways, at('disk.raw'), at(name)]);
  };
  await bench.pqblk('import', at('disk.raw'), at('disk.sealed'), '--key', 'bench');
  if (!bench.quick) {
    await bench.pqblk('import', at('disk.raw'), at('ours.qcow2'), '--format', 'qcow2');
  }
  if (bench.needs('qemu-img')) return;
  const secret = ['--object', `secret,id=key,file=${at('secret')}`];
  const luks = (prefix) => `${prefix}key-secret=key,${prefix}iter-time=100`;
  await convert('luks.qcow2', 'qcow2', ...secret, '-o', `encrypt.format=luks,${luks('encrypt.')}`);
  if (bench.quick) return;
  await convert('theirs.qcow2', 'qcow2');
  await convert('disk.luks', 'luks', ...secret, '-o', luks(''));
}

/** Starts a server; what keeps it from starting is a reason for its rows to be missing. */
async function attempt(bench, missing, begin) {
  if (missing) return { missing };
  try {
    return { server: await begin() };
  } catch (error) {
    bench.check();
    return { missing: error.message.trim() };
  }
}

/** Row name → { missing, nbd, vhost: sockets, server }. */
async function startServers(bench, at) {
  const direct = bench.direct.ram;
  const rows = new Map();
  const sockets = (name) => ({ nbd: at(`${name}.nbd`), 'vhost-user': at(`${name}.vu`) });
  const uri = (socket, path = '') => `nbd+unix:///${path}?socket=${encodeURI(socket)}`;
  const needed = ([format]) => !bench.quick || format === 'sealed' || format === 'luks';
  for (const [format, file] of Object.entries(OURS).filter(needed)) {
    const where = sockets(`ours-${format}`);
    const args = format === 'sealed' ? ['--key', 'bench'] : [];
    const all = { queues: QUEUES, direct, args };
    const server = await servers.servePqblk(bench, at(file), where, all);
    rows.set(ourName(format), { server, nbd: uri(where.nbd), vhost: where['vhost-user'] });
  }
  const absent = bench.needs(QEMU, 'qemu-img');
  for (const [format, file] of Object.entries(THEIRS).filter(needed)) {
    const where = sockets(`qemu-${format}`);
    const options = { queues: QUEUES, direct, secret: at('secret') };
    const begun = await attempt(bench, absent, () =>
      servers.serveQemu(bench, at(file), format, where, options),
    );
    const places = { nbd: uri(where.nbd, 'disk'), vhost: where['vhost-user'] };
    rows.set(qemuName(format), { ...begun, ...places });
  }
  if (bench.quick) return rows;
  const nbdkit = await attempt(bench, bench.needs('nbdkit', 'qemu-img'), () =>
    servers.serveNbdkit(bench, at('disk.luks'), at('nbdkit.nbd'), at('secret')),
  );
  rows.set(NBDKIT, { ...nbdkit, nbd: uri(at('nbdkit.nbd')) });
  return rows;
}

function theFile(bench, at, rw, jobs = 1) {
  const load = { rw, jobs, direct: bench.direct.ram };
  const run = () => fioFile(bench, at('disk.raw'), load);
  return { name: jobs === 1 ? FILE : FILE_TWICE, missing: bench.needs('fio'), run };
}

/** Quick: the two that a target compares. */
const chosen = (bench, rows) =>
  bench.quick
    ? [ourName('sealed'), qemuName('luks')].map((name) => [name, rows.get(name)])
    : [...rows];

async function nbd(bench, at, rows) {
  for (const [rw, what] of [
    ['randread', 'read'],
    ['randwrite', 'write'],
  ]) {
    await bench.compare({
      group: `NBD, 4 KiB random ${what}, depth 32`,
      about: "fio's own NBD client, one connection. qemu is its storage daemon with io_uring.",
      ...{ unit: 'IOPS', base: bench.quick ? qemuName('luks') : FILE },
      contenders: [
        ...(bench.quick ? [] : [theFile(bench, at, rw)]),
        ...chosen(bench, rows).map(([name, { missing, server, nbd: uri }]) => ({
          ...{ name, missing: missing ?? bench.needs('fio'), call: servers.serverLines(server) },
          run: () => fioNbd(bench, uri, { rw }),
        })),
      ],
      targets: [
        { name: ourName('sealed'), to: qemuName('luks'), atLeast: 3 },
        ...(bench.quick ? [] : [{ name: ourName('qcow2'), to: qemuName('qcow2'), atLeast: 1.5 }]),
      ],
    });
  }
}

/** A ring's thread polls or sleeps until it is called: the better counts, for either side. */
async function better(bench, program, socket, load) {
  const half = { ...load, seconds: bench.seconds / 2 };
  const polls = await vhost(bench, program, socket, { ...half, wait: 'poll' });
  const called = await vhost(bench, program, socket, { ...half, wait: 'call' });
  return polls.value > called.value ? polls : called;
}

const rings = (name, count) => `${name}, ${count} ring${count > 1 ? 's' : ''}`;

async function vhostUser(bench, at, rows, program, size) {
  const counts = [1, 2];
  const one = (name) => rings(name, 1);
  const measured = [...rows].filter(([, { vhost: socket }]) => socket);
  await bench.compare({
    group: 'vhost-user, 4 KiB random read, depth 32 in each ring',
    about:
      'A front-end without a guest, one thread for each ring. It polls, or sleeps: the better.',
    ...{ unit: 'IOPS', base: FILE },
    contenders: [
      theFile(bench, at, 'randread'),
      ...measured.flatMap(([name, { missing, server, vhost: socket }]) =>
        counts.map((count) => ({
          ...{ name: rings(name, count), missing, call: servers.serverLines(server) },
          run: () => better(bench, program, socket, { rw: 'randread', rings: count, size }),
        })),
      ),
    ],
    targets: [
      { name: one(ourName('raw')), to: FILE, atLeast: 0.9 },
      { name: one(ourName('sealed')), to: FILE, atLeast: 0.65 },
      { name: one(ourName('raw')), to: one(qemuName('raw')), atLeast: 2 },
      { name: one(ourName('qcow2')), to: one(qemuName('qcow2')), atLeast: 2 },
      { name: one(ourName('sealed')), to: one(qemuName('luks')), atLeast: 4 },
    ],
  });
}

/** Overwrites through one ring. No target stands on them. */
async function vhostWrites(bench, at, rows, program, size) {
  await bench.compare({
    group: 'vhost-user, 4 KiB random write, depth 32, one ring',
    about: 'A front-end without a guest. It polls, or sleeps: the better.',
    ...{ unit: 'IOPS', base: FILE },
    contenders: [
      theFile(bench, at, 'randwrite'),
      ...[...rows]
        .filter(([, { vhost: socket }]) => socket)
        .map(([name, { missing, server, vhost: socket }]) => ({
          ...{ name, missing, call: servers.serverLines(server) },
          run: () => better(bench, program, socket, { rw: 'randwrite', size }),
        })),
    ],
  });
}

/** A second ring, with the same front-end for both: one that sleeps, as drivers of guests do. */
async function secondRing(bench, at, rows, program, size) {
  const names = ['raw', 'sealed'].map(ourName);
  await bench.compare({
    group: 'vhost-user, a second ring, 4 KiB random read, depth 32 in each',
    about:
      'A front-end without a guest, one thread for each ring, that sleeps until it is called. ' +
      'fio with two jobs on the file: what a second core is worth here to who needs no front-end.',
    unit: 'IOPS',
    contenders: [
      theFile(bench, at, 'randread'),
      theFile(bench, at, 'randread', 2),
      ...names.flatMap((name) =>
        [1, 2].map((count) => ({
          ...{ name: rings(name, count), call: servers.serverLines(rows.get(name).server) },
          run: () => {
            const load = { rw: 'randread', rings: count, size, wait: 'call' };
            return vhost(bench, program, rows.get(name).vhost, load);
          },
        })),
      ),
    ],
    targets: names.map((name) => ({ name: rings(name, 2), to: rings(name, 1), atLeast: 1.6 })),
  });
}

/** What a server costs that is asked nothing, and what 64 queues cost. */
async function atRest(bench, at, rows, program, size) {
  const { server, vhost: socket } = rows.get(ourName('sealed'));
  await bench.compare({
    group: 'A connected front-end that asks nothing',
    ...{ unit: '% of a core', better: 'less', rounds: 1 },
    contenders: [
      {
        ...{ name: ourName('sealed'), call: servers.serverLines(server) },
        run: () =>
          vhostThen(bench, program, socket, { rings: QUEUES, size, stayMs: IDLE_MS + 10_000 }, () =>
            cpuOver(bench, server.pid),
          ),
      },
    ],
    targets: [{ name: ourName('sealed'), atMost: 1 }],
  });
  await bench.stop(server);
  const many = { 'vhost-user': at('many.vu') };
  const options = { queues: MANY, direct: bench.direct.ram, args: ['--key', 'bench'] };
  await bench.compare({
    group: `${MANY} queues after a load on each of them`,
    ...{ unit: 'MiB', better: 'less', rounds: 1 },
    contenders: [
      {
        name: ourName('sealed'),
        run: async () => {
          const child = await servers.servePqblk(bench, at(OURS.sealed), many, options);
          const look = () => servers.memoryOf(child.pid).now / MiB;
          const how = { rings: MANY, size, stayMs: 10_000 };
          const found = await vhostThen(bench, program, many['vhost-user'], how, look);
          await bench.stop(child);
          return found;
        },
      },
    ],
    targets: [{ name: ourName('sealed'), atMost: 256 }],
  });
}

async function cpuOver(bench, pid) {
  const percent = await servers.cpuPercent(pid, IDLE_MS);
  bench.check();
  return percent;
}

/** An encrypted file system instead of an encrypted disk, which no server has open any more. */
async function fuse(bench, at, size) {
  const absent = bench.needs('gocryptfs', 'fusermount', 'fio');
  const { server: plain, missing } = await attempt(bench, absent, () =>
    servers.mountGocryptfs(bench, at('gocryptfs'), at('secret')),
  );
  if (plain) {
    bench.say(`a file of ${size / MiB} MiB in gocryptfs`);
    await makeNoise(bench, join(plain, 'disk'), size);
  }
  const direct = bench.direct.ram;
  const cache = direct ? 'none' : 'writeback';
  const disk = await bench.open(at(OURS.sealed), 'sealed', { cache });
  for (const [rw, what] of [
    ['randread', 'read'],
    ['randwrite', 'write'],
  ]) {
    if (rw === 'randwrite') {
      bench.say('overwriting until the log went around three times');
      await wrapLog(bench, disk);
    }
    await bench.compare({
      group: `beside gocryptfs: 4 KiB random ${what}, depth 32`,
      about: 'gocryptfs under fio with O_DIRECT; the sealed disk under the load of `pqblk bench`.',
      ...{ unit: 'IOPS', base: 'gocryptfs' },
      contenders: [
        {
          ...{
            name: 'gocryptfs',
            missing,
            call: plain && `gocryptfs ${at('gocryptfs')}/cipher ${plain}`,
          },
          run: () => fioFile(bench, join(plain, 'disk'), { rw, direct: true, size }),
        },
        { name: ourName('sealed'), run: () => engine(bench, disk, { rw }) },
      ],
      targets: [{ name: ourName('sealed'), to: 'gocryptfs', atLeast: 8 }],
    });
  }
  await disk.close();
}

export default {
  name: 'export',
  about: 'NBD and vhost-user beside QEMU and nbdkit; a sealed disk beside gocryptfs',
  async run(bench) {
    const size = sizeOf(bench);
    const at = (name) => join(bench.ram, name);
    await makeDisks(bench, at, size);
    const rows = await startServers(bench, at);
    await nbd(bench, at, rows);
    if (!bench.quick) {
      const program = await bench.build('bench_vhost');
      await vhostUser(bench, at, rows, program, size);
      await secondRing(bench, at, rows, program, size);
      await vhostWrites(bench, at, rows, program, size);
      await atRest(bench, at, rows, program, size);
    } else {
      await bench.stop(rows.get(ourName('sealed')).server);
    }
    await fuse(bench, at, size);
  },
};
