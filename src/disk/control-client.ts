// Room disk/: the other end of control-server.ts: changes a disk that another process serves.
import type { Socket } from 'node:net';
import { PqblkError } from '../errors.js';
import {
  type KeyAreaPlace,
  type PinFollower,
  type Secret,
  toHex,
  toState,
  unmovedCopy,
} from '../keys/index.js';
import type { Progress } from '../native.js';
import { findControl } from './control-place.js';
import { errorFromMessage, type Frame, receive, send } from './control-protocol.js';
import { keyAreaPlace } from './key-area-file.js';
import type { RekeyOptions, RekeyPass, RotationHost } from './rotate.js';

interface Call {
  resolve(result: unknown): void;
  reject(error: unknown): void;
  onProgress: Progress | undefined;
}

/** A connection to the process that serves a disk. Close it. */
export class ControlClient implements RotationHost {
  readonly path: string;
  readonly #socket: Socket;
  readonly #calls = new Map<number, Call>();
  #nextId = 1;
  /** Why the server ended the connection, where it said so. */
  #refusal: PqblkError | undefined;

  private constructor(path: string, socket: Socket) {
    this.path = path;
    this.#socket = socket;
    receive(
      socket,
      (frame) => this.#take(frame),
      (error) => this.#ended(error),
    );
  }

  /** Undefined when nobody who is to be believed serves the disk at `path` and listens. */
  static async open(path: string): Promise<ControlClient | undefined> {
    const { socket } = await findControl(path);
    return socket && new ControlClient(path, socket);
  }

  get keyArea(): KeyAreaPlace {
    const place = keyAreaPlace(this.path, async ({ keyArea, copy, expected }) => {
      const state = toHex(expected ?? new Uint8Array(0));
      if (keyArea) await this.#call({ op: 'write-key-area', copy, state }, keyArea);
      else await this.#call({ op: 'probe-key-area', state });
    });
    return { ...place, follower: this.#follower };
  }

  readonly #follower: PinFollower = {
    announce: async (seen, next, pins) => {
      const states = { seen: toState(seen), next: toState(next) };
      const announced = this.#call({ op: 'announce-pin', pins: await pins?.identity(), ...states });
      await announced.catch((error: unknown) => {
        throw aboutItsPins(error);
      });
    },
    record: async (seen) => {
      await this.#call({ op: 'record-pin', seen: toState(seen) });
    },
  };

  async beginEpoch(epoch: number, key: Secret, keyAreaState: Uint8Array): Promise<void> {
    const state = toHex(keyAreaState);
    const answer = key.use((bytes) => {
      const copy = unmovedCopy(bytes);
      try {
        return this.#call({ op: 'begin-epoch', epoch, state }, copy);
      } finally {
        copy.fill(0);
      }
    });
    await answer;
  }

  async rekey(options: RekeyOptions): Promise<RekeyPass> {
    const { signal, onProgress, ...rest } = options;
    const pass = this.#nextId;
    const answer = this.#call({ op: 'rekey', ...rest }, undefined, onProgress);
    const stop = () => void this.#call({ op: 'stop', pass }).catch(() => {}); // told by the pass
    signal?.addEventListener('abort', stop, { once: true });
    if (signal?.aborted) stop();
    try {
      return (await answer) as RekeyPass;
    } finally {
      signal?.removeEventListener('abort', stop);
    }
  }

  /** Bytes. */
  async size(): Promise<number> {
    return Number(((await this.#call({ op: 'hello' })) as { size?: number }).size);
  }

  /** As Disk.resize. */
  async resize(size: number): Promise<void> {
    await this.#call({ op: 'resize', size });
  }

  async finishEpoch(): Promise<void> {
    await this.#call({ op: 'finish-epoch' });
  }

  close(): void {
    this.#socket.end();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #call(message: object, binary?: Uint8Array, onProgress?: Progress): Promise<unknown> {
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      if (!this.#socket.writable) {
        reject(this.#gone());
        return;
      }
      this.#calls.set(id, { resolve, reject, onProgress });
      send(this.#socket, { id, ...message }, binary);
    });
  }

  #take({ message }: Frame): void {
    const id = Number(message.id);
    const call = this.#calls.get(id);
    if (message.id === undefined) this.#refusal = errorFromMessage(message.error);
    if (!call) return;
    if (Array.isArray(message.progress)) {
      const [done, total] = message.progress.map(Number);
      call.onProgress?.(done ?? 0, total ?? 0);
      return;
    }
    this.#calls.delete(id);
    if (message.error !== undefined) call.reject(errorFromMessage(message.error));
    else call.resolve(message.result);
  }

  #ended(error?: Error): void {
    for (const call of this.#calls.values()) call.reject(this.#gone(error));
    this.#calls.clear();
  }

  #gone(cause?: Error): PqblkError {
    if (this.#refusal) return this.#refusal;
    return new PqblkError('closed', 'the process that serves the disk has ended the connection', {
      path: this.path,
      cause,
      hint: 'run the same command again: what was begun goes on',
    });
  }
}

/** It is the server's key store that is meant, not the caller's. */
function aboutItsPins(error: unknown): unknown {
  if (!(error instanceof PqblkError) || error.kind === 'locked') return error;
  const { kind, message, path, operation, hint, cause } = error;
  const own = 'it keeps pins in a key store of its own, which it must be able to read and write';
  return new PqblkError(kind, `the process that serves the disk: ${message}`, {
    ...{ path, operation, cause },
    hint: hint ? `${hint}; ${own}` : own,
  });
}
