// What is done to a disk between two of its lives, when nobody has it open: it moves into another file, it
// is laid below a new one, it gets a snapshot, it loses its header. Its content stays, and the next look
// says whether it did. What comes off is counted among the events.
import { createHash } from 'node:crypto';
import { closeSync, createReadStream, existsSync, openSync, rmSync, writeSync } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import { pqblk, qemuImg, STOPPED, Wrong } from './processes.mjs';

const HEADER_BYTES = 512;
const SNAPSHOT = 'soak';
/** Disks below one, so that a look at all of them stays short. */
const BELOW_MAX = 2;

const roomy = ({ place }) => place.fill === undefined; // for a second disk beside the first
const qcow2 = (episode) => episode.shape.format === 'qcow2' && roomy(episode);

const move = (name, weight, when, act) => ({ name, weight, when, run: act });

export const MOVES = [
  move('imported into a new disk', 2, roomy, async (episode) => {
    const { random } = episode;
    const [source, format] = episode.sealed
      ? await episode.exported(random.of('raw', 'qcow2'))
      : [episode.disk, episode.shape.format];
    const target = episode.nextFile();
    const tables = episode.shape.format === 'raw' ? [] : ['metadata'];
    const how = ['--preallocation', random.of('off', 'falloc', ...tables)];
    const from = ['--source-format', format, '--source-backing', 'any'];
    const words = ['import', source, target, ...from, ...episode.making(), ...how];
    await importOnce(episode, target, words);
    if (episode.sealed) rmSync(source);
    episode.replaceDisk(target);
  }),

  move('made anew with compressed clusters', 1, qcow2, async (episode) => {
    const target = episode.nextFile();
    const how = ['-c', ...cluster(episode), '-f', 'qcow2', '-O', 'qcow2'];
    await must('convert', ...how, episode.disk, target);
    episode.replaceDisk(target);
  }),

  move('laid below a new disk', 2, canBeBelow, async (episode) => {
    const raw = episode.random.chance(0.3);
    if (raw) {
      const flat = episode.nextFile();
      await must('convert', '-f', 'qcow2', '-O', 'raw', episode.disk, flat);
      episode.replaceDisk(flat);
    }
    const target = episode.nextFile();
    const below = ['--backing', episode.disk, '--backing-format', raw ? 'raw' : 'qcow2'];
    const size = String(episode.shape.size);
    const what = [...episode.making(), ...episode.subclusters()];
    await episode.must(['create', target, size, ...what, ...below]);
    episode.replaceDisk(target, { above: true });
  }),

  // What a snapshot holds stays, whatever is written after it.
  move('internal snapshot', 3, qcow2, async (episode) => {
    const { disk, snapshot } = episode;
    if (snapshot === undefined) {
      await must('snapshot', '-c', SNAPSHOT, disk);
      const bytes = episode.shape.size;
      episode.snapshot = { bytes, digest: await digestOfSnapshot(episode, bytes) };
      return;
    }
    const now = await digestOfSnapshot(episode, snapshot.bytes);
    if (now !== snapshot.digest) throw new Wrong(`the snapshot in ${disk} is not what was taken`);
    await must('snapshot', '-d', SNAPSHOT, disk);
    episode.snapshot = undefined;
  }),

  move('header lost and restored', 2, wholeKeys, async (episode) => {
    const { disk } = episode;
    const backup = episode.at('lost-header');
    rmSync(backup, { force: true });
    await episode.must(['header', 'backup', disk, backup]);
    const file = openSync(disk, 'r+');
    writeSync(file, Buffer.alloc(HEADER_BYTES, 0x5a), 0, HEADER_BYTES, 0);
    closeSync(file);
    await episode.must(['header', 'restore', disk, backup, '--key', 'alice']);
  }),
];

function canBeBelow(episode) {
  return qcow2(episode) && episode.below.length < BELOW_MAX && episode.snapshot === undefined;
}

/** A change of keys that is not over yet has keys which a backup may lack; leaks make a backup look old. */
function wholeKeys(episode) {
  return episode.sealed && !episode.unfinished && !episode.leaky;
}

async function must(...args) {
  const { code, stderr } = await qemuImg(args);
  if (code !== 0) throw new Wrong(`qemu-img ${args.join(' ')}: exit ${code}: ${stderr}`);
}

const cluster = ({ shape }) => (shape.cluster ? ['-o', `cluster_size=${shape.cluster}`] : []);

/** An import that Ctrl-C ends leaves nothing behind, and can be begun again. */
async function importOnce(episode, target, words) {
  const { random } = episode;
  const patience = random.chance(0.3) ? random.between(100, 1500) : undefined;
  const { code, stderr } = await pqblk(words, episode.soak.env, (child) => {
    if (patience) setTimeout(() => child.kill('SIGINT'), patience).unref();
  });
  if (code === 0) return;
  if (!(patience && STOPPED.includes(code))) {
    throw new Wrong(`pqblk ${words.join(' ')}: exit ${code}: ${stderr}`);
  }
  if (existsSync(target)) throw new Wrong(`an import that was stopped left ${target}`);
  await episode.must(words);
}

/** Of as many bytes as it had: qemu-img gives it out in the size that the disk has now. */
async function digestOfSnapshot(episode, bytes) {
  const out = episode.at('snapshot.raw');
  const hash = createHash('sha256');
  try {
    await must('convert', '-l', `snapshot.name=${SNAPSHOT}`, '-O', 'raw', episode.disk, out);
    await pipeline(createReadStream(out, { end: bytes - 1 }), hash);
  } finally {
    rmSync(out, { force: true });
  }
  return hash.digest('hex');
}
