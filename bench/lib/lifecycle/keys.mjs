// Lifecycle: whole commands that change who may open a disk of 1 TiB, and a fleet of small disks.
import { existsSync } from 'node:fs';
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { createDisk, KeyStore } from '../../../dist/index.js';
import { timeOnce } from '../api-time.mjs';
import { KEY } from '../bench.mjs';
import { qemuImg } from '../qemu.mjs';

const MiB = 2 ** 20;
const TiB = 2 ** 40;
const SLOTS = 8;
const TOKEN = 'pkcs11:token=NSS%20Certificate%20DB';
const FLEET_LOG_BYTES = MiB;

const named = (count, name) => Array.from({ length: count }, (_, i) => `${name}${i + 1}`);

/** Keys without a passphrase: its KDF is slow on purpose, and none of pqblk's doing. */
async function makeKeys(bench, names) {
  const store = new KeyStore(bench.env.PQBLK_KEYS);
  for (const name of names) await store.generate(name, { noPassphrase: true });
  return await Promise.all([KEY, ...names].map((name) => store.recipient(name)));
}

/** A disk of 1 TiB that NSS's token opens; undefined where there is no such token. */
async function tokenDisk(bench) {
  const module = join(bench.root, 'build', 'nss', 'current', 'libsoftokn3.so');
  if (!existsSync(module)) return undefined;
  const dir = join(bench.ram, 'token');
  await mkdir(dir, { mode: 0o700 });
  const pin = join(bench.ram, 'pin');
  await writeFile(pin, 'a pin for a benchmark\n', { mode: 0o600 });
  const words = ['--module', module, '--profile', 'nss', '--token-dir', dir];
  const token = [...words, '--token', TOKEN, '--pin-file', pin];
  await bench.pqblk('token', 'init', ...token);
  await bench.pqblk('key', 'gen', 'vault', ...token);
  const path = join(bench.ram, 'token.sealed');
  await bench.pqblk('create', path, '1T', '--key', 'vault', '--log-size', '8M');
  return { path, pin };
}

/** QEMU's LUKS, whose passphrase goes through as little of a KDF as it can be asked for. */
async function luksDisk(bench) {
  const missing = bench.needs('qemu-img', 'qemu-io');
  if (missing) return { missing };
  const path = join(bench.ram, 'luks.qcow2');
  const secret = ['--object', `secret,id=key,file=${join(bench.ram, 'pin.luks')}`];
  await writeFile(join(bench.ram, 'pin.luks'), 'correct horse battery staple', { mode: 0o600 });
  const luks = 'encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10';
  await qemuImg(bench, ['create', '-q', '-f', 'qcow2', ...secret, '-o', luks, path, '1T']);
  const image = `driver=qcow2,encrypt.key-secret=key,file.filename=${path}`;
  return { open: [...secret, '--image-opts', image, '-c', 'quit'] };
}

async function compareCommands(bench) {
  const recipients = await makeKeys(bench, named(SLOTS - 1, 'person'));
  const path = join(bench.ram, 'huge.sealed');
  await createDisk(path, { format: 'sealed', size: TiB, recipients });
  const token = await tokenDisk(bench);
  const luks = await luksDisk(bench);
  const command = (name, ...words) => ({
    name,
    run: () => timeOnce(() => bench.pqblk(...words)),
  });
  const viaToken = 'unlock through the NSS token';
  await bench.compare({
    group: 'keys of a 1 TiB disk, whole commands',
    about:
      `A sealed disk of 1 TiB with ${SLOTS} slots, in memory, software keys without a passphrase; ` +
      "from the start of the process to its end, so Node's own start is in every figure of pqblk.",
    unit: 'ms',
    better: 'less',
    base: 'node, an empty program',
    contenders: [
      {
        name: 'node, an empty program',
        run: () => timeOnce(() => bench.run(process.execPath, ['-e', '0'])),
      },
      command('pqblk --version', '--version'),
      command('unlock (slot test)', 'slot', 'test', path, '--key', KEY),
      token
        ? command(viaToken, 'slot', 'test', token.path, '--key', 'vault', '--pin-file', token.pin)
        : { name: viaToken, missing: "NSS's softokn is missing: scripts/setup --test brings it" },
      command('rewrap', 'rewrap', path, '--key', KEY),
      command(`rotate-master-key, ${SLOTS} slots`, 'rotate-master-key', path, '--key', KEY),
      {
        name: 'qemu-io opens QCOW2 + LUKS, 10 ms KDF',
        missing: luks.missing,
        run: () => timeOnce(() => bench.run('qemu-io', luks.open)),
      },
    ],
    targets: [
      { name: 'rewrap', atMost: 150 },
      { name: `rotate-master-key, ${SLOTS} slots`, atMost: 250 },
      { name: viaToken, atMost: 500 },
    ],
  });
  await rm(path);
}

/** One change of keys over `count` disks, as one command; the next run changes them back. */
async function compareFleet(bench) {
  const count = bench.quick ? 50 : 1000;
  const [, former] = await makeKeys(bench, ['former', 'next']);
  const fleet = join(bench.ram, 'fleet');
  await mkdir(fleet);
  bench.say(`${count} sealed disks of 1 MiB`);
  const pins = new KeyStore(bench.env.PQBLK_KEYS).pins;
  for (const name of named(count, 'disk')) {
    bench.check();
    await createDisk(join(fleet, `${name}.sealed`), {
      ...{ format: 'sealed', size: MiB, logBytes: FLEET_LOG_BYTES },
      ...{ recipients: [former], pins },
    });
  }
  let names = ['former', 'next'];
  let run = 0;
  // A journal of its own for each run: what an earlier one did is not skipped.
  const pqblk = async (...words) => {
    run += 1;
    const env = { XDG_STATE_HOME: join(bench.ram, `state-${run}`) };
    const seconds =
      (await timeOnce(() => bench.run(process.execPath, [bench.main, ...words], { env }))) / 1000;
    return (seconds * 1000) / count;
  };
  const rewrap = async () => {
    const [from, to] = names;
    names = [to, from];
    return await pqblk('fleet', 'rewrap', from, '--to', to, '--key', from, fleet);
  };
  const rotate = () =>
    pqblk('fleet', 'rotate-master-key', '--run', 'bench', '--key', names[0], fleet);
  await bench.compare({
    group: `a fleet of ${count} disks, seconds for 1,000`,
    about: `One command changes the keys of ${count} sealed disks in memory; every disk a line of JSON.`,
    unit: 's',
    better: 'less',
    rounds: 3,
    contenders: [
      { name: 'fleet rewrap', run: rewrap },
      { name: 'fleet rotate-master-key', run: rotate },
    ],
    targets: [{ name: 'fleet rewrap', atMost: 60 }],
  });
  await rm(fleet, { recursive: true });
}

export async function keys(bench) {
  await compareCommands(bench);
  await compareFleet(bench);
}
