// One disk of a soak, from its making to its last check: lives of a server or of a C program, faults and
// changes of keys under load, a kill or an orderly end, and a look at every sector after each.
//
// What the disk is and what is done to it follows from the seed and the episode's number; when it
// happens among thousands of requests does not.
import { randomBytes } from 'node:crypto';
import {
  closeSync,
  copyFileSync,
  cpSync,
  mkdirSync,
  openSync,
  readdirSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { EVENTS } from './events.mjs';
import { KEYS } from './keys.mjs';
import { MOVES } from './moves.mjs';
import { Folder, SmallFs } from './places.mjs';
import {
  Client,
  Host,
  held,
  peer,
  pqblk,
  qemuImg,
  run,
  Serve,
  STOPPED,
  Wrong,
} from './processes.mjs';
import { Random } from './random.mjs';
import { shapeOf } from './shape.mjs';

const MiB = 2 ** 20;
const SAMPLE_MS = 2000;
const ROOM_MS = 500;
const KEPT_BYTES_MAX = 1024 * MiB;
const KEPT_MAX = 3;
/** Name, first slot, slots, and which kind of life it takes part in. */
const CLIENTS = [
  ['nbd', 0, 8, 'serve host'],
  ['nbd-simple', 8, 8, 'serve host'],
  ['vhost', 16, 16, 'serve host'],
  ['promises', 32, 8, 'host'],
  ['queue', 40, 8, 'host'],
  ['c', 48, 16, 'c'],
];
const SLOTS = 64;
/** Exit code of `pqblk check`, and what it says of a change of keys that was killed between its copies. */
const CORRUPT = 11;
const CUT_SHORT = 'a change of keys was cut short';
const OPTION = {
  l2CacheBytes: '--l2-cache-size',
  entryCacheBytes: '--entry-cache-size',
  pendingDataBytes: '--pending-data-size',
};
/** Where a host serves a disk, and the key that its clients with TLS need. */
const SOCKETS = ['nbd', 'tls', 'psk', 'vhost', 'promises', 'queue'];
const FORMAT_NUMBER = { raw: 1, qcow2: 2, sealed: 3 };
const CACHE_NUMBER = { none: 0, writeback: 1, writethrough: 2 };
const ENGINE_NUMBER = { auto: 0, io_uring: 1, aio: 2, threads: 3 };

export class Episode {
  counts = {
    ...{ lives: 0, kills: 0, clean: 0, checks: 0, looks: 0, cells: 0 },
    ...{ l2Misses: 0, entryMisses: 0 }, // of lives that a host ended in order
    events: {},
  };
  clients = new Map();
  dead = []; // counts of clients that are gone
  samples = [];
  tolerant = false;
  leaky = false;
  below = []; // files that the disk reads where it has nothing of its own
  #files = 0;

  /** `soak`: seed, env, out, began, stopping and skip() of main.mjs. */
  constructor(soak, number, { steady = false, quick = false, seconds, shape } = {}) {
    Object.assign(this, { soak, number, steady, seconds });
    this.seed = (soak.seed * 1000 + number) >>> 0;
    this.random = new Random(this.seed);
    this.shape = { ...shapeOf(this.random, { steady, quick }), ...shape };
  }

  /** Runs to the end of its time; what is wrong is thrown. */
  async run() {
    const until = Date.now() + this.seconds * 1000;
    this.place = this.makePlace();
    this.sockets = new Folder('memory');
    const psk = randomBytes(32).toString('hex');
    writeFileSync(this.at('psk'), `soak:${psk}\n`, { mode: 0o600 });
    const sampling = this.steady ? setInterval(() => this.sample(), SAMPLE_MS) : undefined;
    try {
      await this.create();
      do await this.live(until);
      while (Date.now() < until && !this.soak.stopping);
      if (this.unsettled) await this.lookByC();
    } catch (error) {
      await this.killAll();
      this.keep();
      throw error;
    } finally {
      clearInterval(sampling);
      await this.killAll();
      this.place.remove();
      this.sockets.remove();
    }
  }

  async killAll() {
    const all = [...this.clients.values(), this.server].filter((one) => one !== undefined);
    for (const one of all) one.kill();
    await Promise.all(all.map((one) => one.ended));
  }

  makePlace() {
    if (this.shape.place !== 'small') return new Folder(this.shape.place);
    const small = new SmallFs(this.shape.maxSize * 2);
    if (small.mounted) return small;
    this.soak.skip(`no small file system to fill and to stall: ${small.problem}`);
    small.remove();
    return new Folder('memory');
  }

  at = (name) => join(this.sockets.path, name);
  get sealed() {
    return this.shape.format === 'sealed';
  }
  /** A name for the file of a disk to be. */
  nextFile() {
    this.#files += 1;
    return join(this.place.path, `disk-${this.#files}`);
  }
  get crowded() {
    return this.shape.crowded && this.place.fill !== undefined;
  }
  get board() {
    return this.at('board');
  }

  /** Who opens the disk, for the command line. */
  opening() {
    if (this.sealed) return ['--key', 'alice'];
    const below = this.below.length > 0 ? ['--allow-backing', 'any'] : [];
    return ['--format', this.shape.format, ...below];
  }
  /** What a disk like this one is made with. */
  making() {
    const { format, cluster, suite, log } = this.shape;
    const what = this.sealed
      ? [...KEYS.flatMap((name) => ['--key', name]), '--suite', suite, '--log-size', log]
      : ['--format', format];
    if (cluster) what.push('--cluster-size', cluster);
    return what;
  }
  /** Of `create` only. */
  subclusters() {
    const { extendedL2, cluster } = this.shape;
    return extendedL2 && cluster !== '4K' ? ['--extended-l2'] : []; // they need 16 KiB
  }
  /** The disk is in that file from now on: above what it was, or in its stead. */
  replaceDisk(path, { above = false } = {}) {
    if (above) this.below.push(this.disk);
    else {
      for (const file of [this.disk, ...this.below]) rmSync(file);
      this.below = [];
    }
    Object.assign(this, { disk: path, leaky: false, unfinished: undefined, snapshot: undefined });
  }
  cli(...args) {
    return pqblk(args, this.soak.env);
  }
  /** A command that has to end like this. */
  async must(args, codes = [0]) {
    const ended = await this.cli(...args);
    if (!codes.includes(ended.code)) {
      throw new Wrong(
        `pqblk ${args.join(' ')}: exit ${ended.code}: ${ended.stderr}${ended.stdout}`,
      );
    }
    return ended;
  }

  async create() {
    const { format, size, maxSize } = this.shape;
    this.disk = this.nextFile();
    await this.must(['create', this.disk, String(size), ...this.making(), ...this.subclusters()]);
    const rules = this.sealed ? [] : ['mixes', 'keeps-discarded'];
    if (format === 'qcow2') rules.push('loses-unflushed');
    await peer('board', this.board, this.seed, SLOTS, size, maxSize, ...rules);
  }

  // ---- a life ----

  async live(until) {
    const kind = this.random.of(...this.shape.kinds);
    const left = until - Date.now();
    const ms = this.steady ? left : Math.min(left, this.random.between(1500, 12_000));
    this.counts.lives += 1;
    this.killing = !this.steady && (this.counts.lives === 1 || this.random.chance(0.7));
    if (kind !== 'c') await this.startServer(kind);
    await this.startClients(kind);
    if (kind !== 'c' && this.unfinished) this.changeKeys(this.unfinished);
    if (this.crowded) {
      await this.tolerate();
      this.place.fill(this.random.below(48) * MiB);
    }
    await this.disturb(kind, Date.now() + ms);
    await this.endLife(kind);
    await this.lookAfter();
  }

  async startServer(kind) {
    const { format, queues, cache, engine, nonVolatile, cacheBytes } = this.shape;
    const nbd = this.at('nbd');
    if (kind === 'serve') {
      const how = ['--queues', queues, '--cache', cache, '--engine', engine];
      if (nonVolatile) how.push('--assume-non-volatile');
      for (const [name, bytes] of Object.entries(cacheBytes ?? {})) how.push(OPTION[name], bytes);
      const ways = ['--nbd', nbd, '--vhost-user', this.at('vhost'), '--stats', this.at('stats')];
      const words = [this.disk, ...this.opening(), ...how.map(String), ...ways];
      this.server = new Serve(words, this.soak.env);
    } else {
      this.server = new Host({
        path: this.disk,
        ...(this.sealed && { key: 'alice', store: this.soak.env.PQBLK_KEYS }),
        open: {
          ...{ format, queues, cache, engine, ...cacheBytes },
          ...(nonVolatile && { assumeNonVolatile: true }),
          ...(this.below.length > 0 && { allowBacking: true }),
        },
        sockets: Object.fromEntries(SOCKETS.map((name) => [name, this.at(name)])),
      });
    }
    await this.server.started();
    if (!this.unsettled) return;
    if (kind === 'host' && this.random.chance(0.3)) await this.lookByTls();
    else await this.look('nbd', nbd);
  }

  way(name) {
    const { format, queues, cache, engine, nonVolatile, packed, indirect } = this.shape;
    if (name === 'nbd') return ['nbd', this.at('nbd'), 'structured'];
    if (name === 'nbd-simple') return ['nbd', this.at('nbd')];
    if (name === 'vhost') {
      const ring = [packed && 'packed', indirect && 'indirect'].filter(Boolean);
      return ['vhost', this.at('vhost'), Math.min(queues, 2), ...ring];
    }
    if (name !== 'c') return ['nbd', this.at(name)];
    const numbers = [FORMAT_NUMBER[format], queues, CACHE_NUMBER[cache], ENGINE_NUMBER[engine]];
    const keys = this.sealed ? this.at('agent') : '-';
    const words = [nonVolatile && 'non-volatile', this.below.length > 0 && 'backed'];
    const caches = Object.entries(this.shape.cacheBytes ?? {}).map(([name, n]) => `${name}=${n}`);
    return ['c', this.disk, ...numbers, keys, ...words.filter(Boolean), ...caches];
  }

  async startClients(kind) {
    if (kind === 'c') await this.startAgent();
    for (const [name, first, slots, kinds] of CLIENTS) {
      if (!kinds.split(' ').includes(kind)) continue;
      const there = this.clients.get(name);
      if (!there?.alive) {
        if (there) this.dead.push(there.counts);
        const seed = this.seed + this.counts.lives;
        this.clients.set(name, new Client(name, this.board, first, slots, seed, this.way(name)));
      }
      const client = this.clients.get(name);
      const { event } = await client.told('go', 'running');
      if (event !== 'running') throw new Wrong(`${name} did not start: ${client.child.complaint}`);
    }
    await this.agent;
    this.agent = undefined;
  }

  /** Hands the keys to the C program, as docs/handing-keys.md says. */
  async startAgent() {
    if (this.unsettled) await this.lookByC();
    this.agent = this.makeAgent();
  }
  async makeAgent() {
    if (!this.sealed) return;
    rmSync(this.at('agent'), { force: true });
    const words = ['agent', this.disk, '--key', 'alice', '--socket', this.at('agent')];
    await this.must([...words, '--timeout', '240']);
  }
  async lookByC() {
    await Promise.all([this.makeAgent(), this.look(...this.way('c'))]);
  }

  get running() {
    return [...this.clients.values()].filter((client) => client.state === 'running');
  }

  requireRight() {
    for (const { wrong } of this.clients.values()) if (wrong.length > 0) throw new Wrong(wrong[0]);
  }

  async disturb(kind, end) {
    const possible = EVENTS.filter((event) => event.when(this, kind));
    while (Date.now() < end && !this.soak.stopping) {
      const pause = this.random.between(200, this.steady ? 6000 : 2000);
      await sleep(Math.min(pause, Math.max(0, end - Date.now())));
      this.requireRight();
      await this.requireServer(kind);
      if (Date.now() >= end || possible.length === 0) continue;
      const event = this.random.of(...possible.flatMap((one) => Array(one.weight).fill(one)));
      if ((await event.run(this)) === false) continue;
      this.count(event);
    }
    await this.makeRoom();
    if (!this.killing) await this.endKeyChange();
  }

  count({ name }) {
    this.counts.events[name] = (this.counts.events[name] ?? 0) + 1;
  }

  async requireServer(kind) {
    const process = kind === 'c' ? this.clients.get('c') : this.server;
    if (held(process.pid)) return;
    throw new Wrong(
      `the ${kind} process died: ${JSON.stringify(await process.ended)} ${process.child.complaint}`,
    );
  }

  sample() {
    const now = (Date.now() - this.soak.began) / 1000;
    const add = (name, pid) => {
      const found = held(pid);
      if (found) this.samples.push({ now, name, ...found });
    };
    if (this.server) add('server', this.server.pid);
    for (const client of this.clients.values()) if (client.alive) add(client.name, client.pid);
  }

  /**
   * Changes keys beside the load. A command that is killed in its midst is run again at once; what was
   * stopped, or cut short by the end of the server, in its next life.
   */
  changeKeys(words) {
    const [word, ...more] = words;
    this.unfinished = words;
    const { server, random } = this;
    const patience = random.chance(0.3) ? random.between(200, 3000) : undefined;
    const all = [word, this.disk, '--key', 'alice', ...more];
    let ended;
    const go = () =>
      pqblk(all, this.soak.env, (child) => {
        this.changing = child;
        if (patience && !ended) setTimeout(() => child.kill('SIGKILL'), patience).unref();
      });
    const change = (async () => {
      ended = await go();
      if (ended.code === null && !this.stopped) ended = await go(); // takes it to its end
      this.changing = undefined;
      if (ended.code === 0) this.unfinished = undefined;
      else if (!server.killed && !(this.stopped && STOPPED.includes(ended.code))) {
        throw new Wrong(`pqblk ${word}: exit ${ended.code}: ${ended.stderr}`);
      }
    })();
    change.catch(() => {}); // told by who awaits it
    this.stopped = false;
    this.keyChange = change;
  }

  /** A change that is under way: stopped as by Ctrl-C, or waited for. */
  async endKeyChange() {
    if (this.changing && this.random.chance(0.7)) {
      this.stopped = true;
      this.changing.kill('SIGINT');
    }
    await this.keyChange;
  }

  /** Whether requests may fail now: those that need space, on a full disk. */
  async tolerate() {
    this.tolerant = true;
    for (const client of this.running) await client.told('tolerate', 'tolerate');
  }
  /** With space at hand again everything has to go well, and at once. */
  async makeRoom() {
    if (!this.tolerant) return;
    this.place.empty();
    await sleep(ROOM_MS);
    await this.insist();
    await sleep(ROOM_MS);
    this.requireRight();
  }
  async insist() {
    this.tolerant = false;
    for (const client of this.clients.values()) {
      if (client.alive) await client.told('insist', 'insist');
    }
  }

  // ---- its end ----

  async endLife(kind) {
    if (this.killing) {
      this.counts.kills += 1;
      this.unsettled = 'killed';
      this.leaky = true;
      if (kind === 'c') {
        this.clients.get('c').kill();
        await this.clients.get('c').ended;
        this.clients.get('c').state = 'gone';
      } else {
        this.server.killed = true;
        this.server.kill();
        await this.server.ended;
        await this.keyChange;
        await Promise.all(this.running.map((client) => this.hearGone(client)));
      }
    } else {
      this.counts.clean += 1;
      this.unsettled = 'clean';
      await Promise.all(this.running.map((client) => client.told('pause', 'paused')));
      if (kind === 'c') await this.endClient(this.clients.get('c'));
      else {
        const problem = await this.server.end();
        if (problem) throw new Wrong(problem);
        this.countMisses(this.server.last?.misses);
        await Promise.all(this.running.map((client) => this.hearGone(client)));
      }
    }
    this.server = undefined;
    this.requireRight();
  }

  countMisses({ l2Misses = 0, entryMisses = 0 } = {}) {
    this.counts.l2Misses += l2Misses;
    this.counts.entryMisses += entryMisses;
  }

  async hearGone(client) {
    while (client.state === 'running' && client.alive) await client.heard('gone', 'counts');
  }

  async endClient(client) {
    client.order('stop');
    const { code } = await client.ended;
    client.state = 'gone';
    if (code !== 0) throw new Wrong(client.wrong[0] ?? `${client.name}: ${client.child.complaint}`);
  }

  /** Checks the disk, and often reads it by another way than the next life would. */
  async lookAfter() {
    const { random } = this;
    if (this.soak.stopping) return;
    if (random.chance(0.35)) await this.lookAtExport();
    else if (random.chance(0.3)) await this.lookByC();
    await this.check(random.chance(0.5));
    if (random.chance(0.4)) await this.moveOn();
  }

  async moveOn() {
    const possible = MOVES.filter((move) => move.when(this));
    if (possible.length === 0) return;
    const move = this.random.of(...possible.flatMap((one) => Array(one.weight).fill(one)));
    if (this.unsettled) await this.lookByC(); // what is wrong by now is not the move's
    await move.run(this);
    this.unsettled = 'clean'; // so that it is looked at again
    this.count(move);
    await this.check(false);
  }

  async check(repair) {
    this.counts.checks += 1;
    const leaks = this.leaky ? [0, 1] : [0];
    const words = ['check', this.disk, ...this.opening(), ...(repair ? ['--repair'] : [])];
    const { code, stdout } = await this.must(words, [...leaks, CORRUPT]);
    if (code === CORRUPT) {
      // A kill between the two copies of a change of keys, and nothing else, is mended.
      if (!(stdout.includes(CUT_SHORT) && /^errors +1$/m.test(stdout))) throw new Wrong(stdout);
      await this.must(['check', this.disk, ...this.opening(), '--repair']);
      this.leaky = false;
    }
    if (repair) this.leaky = false;
    if (this.shape.format !== 'qcow2') return;
    const image = await qemuImg(['check', '-f', 'qcow2', this.disk]);
    if (image.code === 0 || (image.code === 3 && this.leaky)) return;
    throw new Wrong(`qemu-img check: exit ${image.code}: ${image.stderr}${image.stdout}`);
  }

  async lookAtExport() {
    const format = this.shape.format === 'qcow2' ? undefined : this.random.of('raw', 'qcow2');
    const out = format ? (await this.exported(format))[0] : this.disk;
    const raw = this.at('looked-at');
    try {
      if (format === 'raw') return await this.look('file', out);
      const { code, stderr } = await qemuImg([
        ...['convert', '-f', 'qcow2', '-O', 'raw', out, raw],
      ]);
      if (code !== 0) throw new Wrong(`qemu-img convert: exit ${code}: ${stderr}`);
      return await this.look('file', raw);
    } finally {
      rmSync(raw, { force: true });
      if (format) rmSync(out);
    }
  }

  /** A copy that is not sealed, and its format. */
  async exported(format) {
    const out = `${this.at('exported')}.${format}`;
    await this.must(['export', this.disk, out, ...this.opening()]);
    return [out, format];
  }

  /** Reads all of the disk from `tls` or `nbd` to a file, or to `null:`. */
  async nbdcopy(socket, to) {
    const tls = socket === 'tls' ? `&tls-psk-file=${this.at('psk')}` : '';
    const scheme = tls ? 'nbds+unix://soak@' : 'nbd+unix://';
    const { code, stderr } = await run('nbdcopy', [
      `${scheme}/?socket=${this.at(socket)}${tls}`,
      to,
    ]);
    if (code !== 0) throw new Wrong(`nbdcopy from ${socket}: exit ${code}: ${stderr}`);
  }

  async lookByTls() {
    const raw = this.at('looked-at');
    await this.nbdcopy('tls', raw);
    await this.look('file', raw);
    rmSync(raw);
  }

  /** Reads all of the disk and settles the board. */
  async look(...way) {
    const { code, stdout, stderr } = await peer(
      'verify',
      this.board,
      this.unsettled ?? 'clean',
      ...way,
    );
    if (code !== 0 && code !== 1) throw new Wrong(`verify by ${way}: exit ${code}: ${stderr}`);
    const { cells, bad, wrong } = JSON.parse(stdout);
    this.counts.looks += 1;
    this.counts.cells += cells;
    if (bad > 0) throw new Wrong(`after ${this.unsettled}: ${bad} parts of the disk: ${wrong[0]}`);
    this.unsettled = undefined;
  }

  /** The disk has grown: the board knows at its byte 8. */
  grown(bytes) {
    const file = openSync(this.board, 'r+');
    const size = Buffer.alloc(8);
    size.writeBigUInt64LE(BigInt(bytes));
    writeSync(file, size, 0, 8, 8);
    closeSync(file);
    this.shape.size = bytes;
  }

  /** What failed, for those who look into it: the disk, the model, and the keys. */
  keep() {
    const all = join(this.soak.out, 'failures');
    mkdirSync(all, { recursive: true });
    if (readdirSync(all).length >= KEPT_MAX) return;
    const kept = join(all, String(this.number));
    cpSync(this.soak.env.PQBLK_KEYS, join(kept, 'store'), { recursive: true });
    for (const file of [this.disk, ...this.below, this.board]) {
      try {
        if (statSync(file).blocks * 512 >= KEPT_BYTES_MAX) continue;
        copyFileSync(file, join(kept, basename(file)));
      } catch {
        // not made yet
      }
    }
  }

  /** Sums over all clients that there were. */
  operations() {
    const sum = {};
    const all = [...this.dead, ...[...this.clients.values()].map(({ counts }) => counts)];
    for (const counts of all) {
      for (const [name, n] of Object.entries(counts)) sum[name] = (sum[name] ?? 0) + n;
    }
    return sum;
  }
}
