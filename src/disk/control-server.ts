// Room disk/: lets other processes of the same user change a disk that is served here.
//
// What may be asked: growing, and of a sealed disk to replace the key area, and the steps of a
// rotation of the data key. The asker
// holds the keys and decides; this process has the disk and does it. A connection that ends stops
// the pass that it asked for; a rotation that was begun stays begun, and can be taken up again. Whoever
// begins one is its driver until his connection ends: two would forget each other's keys.
import type { Socket } from 'node:net';
import { setTimeout } from 'node:timers/promises';
import { PqblkError } from '../errors.js';
import { describeKeyArea, fromState, KEY_AREA_BYTES, type Pins, Secret } from '../keys/index.js';
import { listenForControl } from './control-place.js';
import { errorToMessage, type Frame, receive, send } from './control-protocol.js';
import type { Disk } from './disk.js';

const CLIENTS_MAX = 8;
/** A connection that has just ended may have a request to finish. */
const PATIENCE_MS = 1000;

export interface ControlServer {
  /** The socket's name, `@…`; `pqblk` finds it by the disk's file. */
  readonly name: string;
  close(): Promise<void>;
}

/**
 * Listens for changes of an open disk; `pins` are those that it was opened under, and follow what is
 * changed here: the same process opens it again. Kinds `permission`, `io_error`, `no_memory`. */
export async function serveControl(
  disk: Disk,
  { pins }: { readonly pins?: Pins | undefined } = {},
): Promise<ControlServer> {
  const rotation: Rotation = {};
  const connections = new Set<Socket>();
  const onClient = (socket: Socket) => {
    connections.add(socket);
    socket.once('close', () => connections.delete(socket));
    new Connection(disk, pins, rotation, socket);
  };
  const { path } = disk.facts;
  const { server, name } = await listenForControl(path, CLIENTS_MAX, { onClient, onForeign });
  return {
    name,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        for (const socket of connections) socket.destroy();
      }),
  };
}

function onForeign(socket: Socket): void {
  const refusal = new PqblkError('permission', 'the process that serves this disk refuses', {
    operation: 'ask the serving process',
    hint: `run the command as user ${process.geteuid?.()}, or as root`,
  });
  send(socket, { error: errorToMessage(refusal) });
  socket.end();
}

/** Whose rotation of the data key it is. */
interface Rotation {
  driver?: Connection | undefined;
}

class Connection {
  readonly #disk: Disk;
  readonly #pins: Pins | undefined;
  /** Gives the pin free that this connection has announced something in. */
  #release: (() => Promise<void>) | undefined;
  readonly #rotation: Rotation;
  readonly #socket: Socket;
  readonly #ended = new AbortController();
  /** Ended, and nothing that it asked for is still under way. */
  readonly #left = new AbortController();
  /** The pass that is running, by the id of its request. */
  readonly #passes = new Map<unknown, AbortController>();

  /** Requests that are being performed; they outlive the connection. */
  #busy = 0;

  constructor(disk: Disk, pins: Pins | undefined, rotation: Rotation, socket: Socket) {
    this.#disk = disk;
    this.#pins = pins;
    this.#rotation = rotation;
    this.#socket = socket;
    receive(
      socket,
      (frame) => void this.#serve(frame),
      () => {
        this.#ended.abort();
        this.#leave();
      },
    );
  }

  async #serve(frame: Frame): Promise<void> {
    const { id, op } = frame.message;
    this.#busy += 1;
    try {
      const result = await this.#perform(String(op), frame);
      this.#answer({ id, result: result ?? null });
    } catch (error) {
      this.#answer({ id, error: errorToMessage(error) });
    } finally {
      frame.binary.fill(0);
      this.#busy -= 1;
      this.#leave();
    }
  }

  get leaving(): AbortSignal {
    return this.#left.signal;
  }

  #leave(): void {
    if (!this.#ended.signal.aborted || this.#busy > 0) return;
    this.#left.abort();
    void this.#releasePin();
  }

  /** What is announced stays so: the change may have reached the disk. */
  async #releasePin(): Promise<void> {
    const release = this.#release;
    this.#release = undefined;
    await release?.();
  }

  async #announcePin({ pins: theirs, seen, next }: Frame['message']): Promise<void> {
    const [pins, uuid] = [this.#pins, this.#disk.volumeUuid];
    if (!pins || !uuid || theirs === (await pins.identity())) return;
    await this.#releasePin();
    this.#release = await pins.hold(uuid);
    await pins.check(fromState(uuid, seen)); // what is built upon is what is known here
    await pins.announce(fromState(uuid, seen), fromState(uuid, next));
  }

  /** Only who has announced something has something to record. */
  async #recordPin({ seen }: Frame['message']): Promise<void> {
    const [pins, uuid] = [this.#pins, this.#disk.volumeUuid];
    if (!pins || !uuid || !this.#release) return;
    await pins.record(fromState(uuid, seen));
    await this.#releasePin();
  }

  async #drive(): Promise<void> {
    const isOthers = () => {
      const { driver } = this.#rotation;
      return driver !== undefined && driver !== this && !driver.#left.signal.aborted;
    };
    if (isOthers()) {
      const signal = this.#rotation.driver?.leaving;
      await setTimeout(PATIENCE_MS, undefined, { signal }).catch(() => {});
    }
    if (!isOthers()) {
      this.#rotation.driver = this;
      return;
    }
    throw new PqblkError('locked', 'somebody else is rotating the data key of this disk', {
      hint: 'wait until that command has ended, or end it',
    });
  }

  /** What is written under a key that the key area does not hold is lost. */
  async #requireInKeyArea(epoch: number): Promise<void> {
    const { currentEpoch, nextEpoch } = describeKeyArea((await this.#disk.keyArea.read()).blob);
    if (epoch === currentEpoch || epoch === nextEpoch) return;
    throw new PqblkError('locked', `the key area has no epoch ${epoch}: it was replaced meanwhile`);
  }

  #answer(message: object): void {
    if (this.#socket.writable) send(this.#socket, message);
  }

  async #perform(op: string, { message, binary }: Frame): Promise<unknown> {
    const disk = this.#disk;
    switch (op) {
      case 'hello':
        return { pid: process.pid, path: disk.facts.path, size: disk.size };
      case 'resize':
        return await disk.resize(count(message, 'size'));
      case 'probe-key-area':
        return await disk.keyArea.probe(stateIn(message));
      case 'write-key-area':
        requireBytes(binary, KEY_AREA_BYTES);
        return await disk.keyArea.write(message.copy === 1 ? 1 : 0, binary, stateIn(message));
      case 'announce-pin':
        return await this.#announcePin(message);
      case 'record-pin':
        return await this.#recordPin(message);
      case 'begin-epoch': {
        using key = Secret.copyOf(binary);
        const [epoch, state] = [count(message, 'epoch'), stateIn(message)];
        await this.#drive();
        await this.#requireInKeyArea(epoch);
        return await disk.beginEpoch(epoch, key, state);
      }
      case 'rekey':
        if (message.verify !== true) await this.#drive();
        return await this.#rekey(message);
      case 'stop':
        return this.#passes.get(message.pass)?.abort();
      case 'finish-epoch':
        await this.#drive();
        return await disk.finishEpoch();
      default:
        throw new PqblkError('unsupported', `the serving process knows no operation '${op}'`, {
          hint: 'it may be of an older version: restart it',
        });
    }
  }

  async #rekey(message: Frame['message']): Promise<unknown> {
    const stop = new AbortController();
    this.#passes.set(message.id, stop);
    try {
      return await this.#disk.rekey({
        verify: message.verify === true,
        from: optional(message, 'from'),
        bytesPerSecond: optional(message, 'bytesPerSecond'),
        share: typeof message.share === 'number' ? message.share : undefined,
        signal: AbortSignal.any([stop.signal, this.#ended.signal]),
        onProgress: (done, total) => this.#answer({ id: message.id, progress: [done, total] }),
      });
    } finally {
      this.#passes.delete(message.id);
    }
  }
}

function count(message: Frame['message'], name: string): number {
  const value = message[name];
  if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0) return value;
  throw new PqblkError('invalid_argument', `${name}: expected an integer from 0 on`);
}

function stateIn({ state }: Frame['message']): Uint8Array {
  if (typeof state === 'string' && /^[0-9a-f]{128}$/.test(state)) return Buffer.from(state, 'hex');
  throw new PqblkError('invalid_argument', 'state: expected 128 hex digits');
}

function requireBytes(binary: Uint8Array, expected: number): void {
  if (binary.length === expected) return;
  throw new PqblkError('invalid_argument', `expected ${expected} bytes, not ${binary.length}`);
}

function optional(message: Frame['message'], name: string): number | undefined {
  return message[name] === undefined ? undefined : count(message, name);
}
