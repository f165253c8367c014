// Room qmp/: a connection to the monitor of a running QEMU
// (https://www.qemu.org/docs/master/interop/qmp-spec.html).
//
// One JSON object a line, both ways. What comes from the other side is not trusted: lines are bounded,
// what is not the protocol ends the connection, and texts are cleaned before a terminal sees them. No
// wait is without end. It knows no disk and no device.
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { fromSystem, PqblkError } from '../errors.js';

/** The longest answers are lists of devices; these stay far below it. */
export const QMP_LINE_BYTES_MAX = 4 * 2 ** 20;
const GREETING_TIMEOUT_MS = 5_000;
const COMMAND_TIMEOUT_MS = 15_000;
const TEXT_MAX = 400;

export interface QmpVersion {
  readonly major: number;
  readonly minor: number;
  readonly micro: number;
}

export interface QmpEvent {
  readonly event: string;
  readonly data: Readonly<Record<string, unknown>>;
}

export interface QmpConnectOptions {
  /** For the greeting. Default: 5 s. A monitor talks to one client at a time; others wait. */
  timeoutMs?: number | undefined;
  signal?: AbortSignal | undefined;
}

/** What QEMU answered instead of doing it. `kind` is `hypervisor`, the message is QEMU's own. */
export class QmpError extends PqblkError {
  /** QEMU's class of errors: `GenericError`, `DeviceNotFound`, ... */
  readonly qmpClass: string;
  readonly description: string;

  constructor(command: string, qmpClass: string, description: string, path: string) {
    super('hypervisor', `QEMU says ${qmpClass}: ${description}`, { path, operation: command });
    this.qmpClass = qmpClass;
    this.description = description;
  }
}

interface Pending {
  readonly command: string;
  resolve(value: unknown): void;
  reject(error: PqblkError): void;
}

type Line = Readonly<Record<string, unknown>>;

/** Text of another program, fit for a terminal and a line of log. */
export function cleaned(value: unknown): string {
  const text = typeof value === 'string' ? value : (JSON.stringify(value) ?? 'nothing');
  const plain = text.replace(/\p{C}+/gu, ' ').trim();
  return plain.length > TEXT_MAX ? `${plain.slice(0, TEXT_MAX)}…` : plain;
}

const quoted = (line: string) => `“${cleaned(line.slice(0, TEXT_MAX))}”`;

export class QmpConnection {
  readonly path: string;
  readonly #socket: Socket;
  readonly #pending = new Map<number, Pending>();
  readonly #listeners = new Set<(event: QmpEvent) => void>();
  readonly #onFailure = new Set<(error: PqblkError) => void>();
  #version: QmpVersion | undefined;
  #chunks: Buffer[] = [];
  #buffered = 0;
  #lastId = 0;
  #failure: PqblkError | undefined;

  private constructor(path: string, socket: Socket) {
    this.path = path;
    this.#socket = socket;
    socket.on('data', (chunk: Buffer) => this.#take(chunk));
    // A reset, a broken pipe and an orderly end mean the same here.
    const gone = () => this.#fail(this.#error('hypervisor', 'QEMU closed the connection'));
    socket.on('error', gone);
    socket.on('close', gone);
  }

  /**
   * Connects to the monitor at the Unix socket `path` and opens command mode. Kinds `not_found`,
   * `permission`, `hypervisor` (it is no QMP, or went away), `timed_out`, `canceled`.
   */
  static async connect(path: string, options: QmpConnectOptions = {}): Promise<QmpConnection> {
    const { timeoutMs = GREETING_TIMEOUT_MS, signal } = options;
    const socket = connect(path);
    try {
      await once(socket, 'connect', { ...(signal && { signal }) });
    } catch (error) {
      socket.destroy();
      throw connectError(error, path);
    }
    const connection = new QmpConnection(path, socket);
    try {
      await connection.#until(() => connection.#version !== undefined, timeoutMs, signal, {
        what: 'no greeting',
        hint: 'a monitor talks to one client at a time: is another one (libvirt?) connected to it?',
      });
      await connection.execute('qmp_capabilities');
    } catch (error) {
      connection.close();
      throw error;
    }
    return connection;
  }

  get version(): QmpVersion {
    return this.#version ?? { major: 0, minor: 0, micro: 0 };
  }

  atLeast(major: number, minor = 0): boolean {
    const { version } = this;
    return version.major > major || (version.major === major && version.minor >= minor);
  }

  /** What QEMU returns. Throws QmpError for what it refuses; kinds `timed_out`, `hypervisor`. */
  async execute(
    command: string,
    args: Readonly<Record<string, unknown>> = {},
    timeoutMs = COMMAND_TIMEOUT_MS,
  ): Promise<unknown> {
    if (this.#failure) throw this.#failure;
    const id = ++this.#lastId;
    let timer: NodeJS.Timeout | undefined;
    try {
      return await new Promise<unknown>((resolve, reject) => {
        this.#pending.set(id, { command, resolve, reject });
        timer = setTimeout(() => {
          reject(this.#error('timed_out', `no answer within ${timeoutMs / 1000} s`, command));
        }, timeoutMs);
        this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`);
      });
    } finally {
      clearTimeout(timer);
      this.#pending.delete(id);
    }
  }

  /**
   * Listens from now on for the first event that `wanted` accepts; ask for what causes it after this
   * returned. `event` rejects with kinds `timed_out`, `canceled` and `hypervisor`; `stop` forgets it.
   */
  listen(wanted: (event: QmpEvent) => boolean): EventWait {
    let found: QmpEvent | undefined;
    const listener = (event: QmpEvent) => {
      if (found === undefined && wanted(event)) found = event;
    };
    this.#listeners.add(listener);
    return {
      event: async (timeoutMs, signal) => {
        await this.#until(() => found !== undefined, timeoutMs, signal, { what: 'no event' });
        return found as QmpEvent;
      },
      stop: () => this.#listeners.delete(listener),
    };
  }

  close(): void {
    this.#fail(this.#error('closed', 'the connection was closed'));
    this.#socket.destroy();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #error(kind: 'hypervisor' | 'timed_out' | 'canceled' | 'closed', text: string, operation = '') {
    return new PqblkError(kind, text, { path: this.path, operation: operation || 'monitor' });
  }

  /** Waits for `done`, which is asked whenever a line has come. */
  async #until(
    done: () => boolean,
    timeoutMs: number,
    signal: AbortSignal | undefined,
    otherwise: { what: string; hint?: string },
  ): Promise<void> {
    if (done()) return;
    if (this.#failure) throw this.#failure;
    if (signal?.aborted) throw this.#error('canceled', 'stopped on request');
    const undo: (() => void)[] = [];
    try {
      await new Promise<void>((resolve, reject) => {
        const listener = () => {
          if (done()) resolve();
        };
        const stop = () => reject(this.#error('canceled', 'stopped on request'));
        const timer = setTimeout(() => {
          const text = `${otherwise.what} within ${timeoutMs / 1000} s`;
          const { path } = this;
          const { hint } = otherwise;
          reject(new PqblkError('timed_out', text, { path, operation: 'monitor', hint }));
        }, timeoutMs);
        this.#socket.on('data', listener);
        this.#onFailure.add(reject);
        signal?.addEventListener('abort', stop, { once: true });
        undo.push(
          () => this.#socket.off('data', listener),
          () => this.#onFailure.delete(reject),
          () => signal?.removeEventListener('abort', stop),
          () => clearTimeout(timer),
        );
      });
    } finally {
      for (const one of undo) one();
    }
  }

  #take(chunk: Buffer): void {
    let rest = chunk;
    for (let end = rest.indexOf(10); end >= 0 && !this.#failure; end = rest.indexOf(10)) {
      const line = Buffer.concat([...this.#chunks, rest.subarray(0, end)]).toString();
      this.#chunks = [];
      this.#buffered = 0;
      rest = rest.subarray(end + 1);
      if (line.trim() !== '') this.#takeLine(line);
    }
    if (rest.length > 0) this.#chunks.push(rest);
    this.#buffered += rest.length;
    if (this.#buffered > QMP_LINE_BYTES_MAX) this.#breakOff('a line without end');
  }

  #takeLine(text: string): void {
    const line = parseLine(text);
    if (line === undefined) this.#breakOff(quoted(text));
    else if (this.#version === undefined) this.#greet(line, text);
    else if (typeof line.event === 'string') {
      const event = { event: line.event, data: recordOf(line.data) ?? {} };
      for (const listener of [...this.#listeners]) listener(event);
    } else this.#takeAnswer(line, text);
  }

  #takeAnswer(line: Line, text: string): void {
    const pending = this.#pending.get(Number(line.id));
    const error = recordOf(line.error);
    if (error !== undefined) {
      const about = pending?.command ?? 'monitor';
      const failure = new QmpError(about, cleaned(error.class), cleaned(error.desc), this.path);
      if (pending) pending.reject(failure);
      else if (line.id === undefined) this.#fail(failure); // it could not read what we wrote
    } else if ('return' in line) {
      pending?.resolve(line.return); // or the late answer of a command that was given up
    } else {
      this.#breakOff(quoted(text));
    }
  }

  #greet(line: Line, text: string): void {
    const qemu = recordOf(recordOf(recordOf(line.QMP)?.version)?.qemu);
    const [major, minor, micro] = [qemu?.major, qemu?.minor, qemu?.micro].map(Number);
    if ([major, minor, micro].every(Number.isSafeInteger)) {
      this.#version = { major, minor, micro } as QmpVersion;
    } else {
      this.#breakOff(`${quoted(text)} for a greeting`);
    }
  }

  #breakOff(found: string): void {
    const hint = 'is this the socket of `-qmp unix:SOCKET,server=on,wait=off`?';
    const text = `expected the QEMU machine protocol, found ${found}`;
    this.#fail(new PqblkError('hypervisor', text, { path: this.path, operation: 'monitor', hint }));
    this.#socket.destroy();
  }

  #fail(error: PqblkError): void {
    if (this.#failure) return;
    this.#failure = error;
    this.#chunks = [];
    for (const { reject } of [...this.#pending.values()]) reject(error);
    for (const reject of [...this.#onFailure]) reject(error);
  }
}

export interface EventWait {
  event(timeoutMs: number, signal?: AbortSignal): Promise<QmpEvent>;
  stop(): void;
}

export function recordOf(value: unknown): Readonly<Record<string, unknown>> | undefined {
  const isRecord = typeof value === 'object' && value !== null && !Array.isArray(value);
  return isRecord ? (value as Readonly<Record<string, unknown>>) : undefined;
}

function parseLine(text: string): Line | undefined {
  try {
    return recordOf(JSON.parse(text));
  } catch {
    return undefined;
  }
}

function connectError(error: unknown, path: string): PqblkError {
  const details = { path, operation: 'connect to the monitor' };
  const code = (error as NodeJS.ErrnoException).code;
  if (code === 'ABORT_ERR') return new PqblkError('canceled', 'stopped on request', details);
  if (code === 'ECONNREFUSED') {
    const hint = 'the QEMU that made this socket is gone';
    return new PqblkError('not_found', 'nobody listens on this socket', { ...details, hint });
  }
  if (code === 'ENOENT') {
    const hint = 'start QEMU with `-qmp unix:SOCKET,server=on,wait=off`';
    return new PqblkError('not_found', 'there is no such socket', { ...details, hint });
  }
  return fromSystem(error, details);
}
