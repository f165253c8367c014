// Room keys/pkcs11: the child process that a PKCS#11 module runs in, one request at a time.
//
// The module is foreign code: it may crash, hang or answer nonsense. Whatever it does ends as an
// error of its own kind for whoever asked, and nothing else in this process notices: `token_crashed`,
// `token_timeout`. A process that failed once is never asked again. The program is pqblk-pkcs11, built
// beside the addon; it is started without a shell, with next to no environment, and ends with us.
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import type { Socket } from 'node:net';
import { dirname, join } from 'node:path';
import { fromSystem, PqblkError } from '../../errors.js';
import { packageRoot } from '../../package-root.js';
import { meaningOf } from './numbers.js';
import { MESSAGE_BYTES_MAX, MessageReader, type MessageWriter } from './wire.js';

const SOCKET = 3;
/** How long a closed socket waits for the exit status, and a process that was asked to end for it. */
const EXIT_WAIT_MS = 2000;
const PLACES = ['build/Release/pqblk-pkcs11', 'build/release/pqblk-pkcs11'];

/** What of our environment a module may need; a profile can name more. */
const ENVIRONMENT = ['HOME', 'XDG_RUNTIME_DIR'];

const COMPLAINTS = {
  1: 'token_crashed',
  2: 'bad_module',
  3: 'unsupported',
  4: 'token_mistrusted',
  5: 'token_refused',
} as const;

export interface ProcessOptions {
  /** For messages only. */
  readonly module: string;
  /** Names of environment variables that are handed on. */
  readonly environment: readonly string[];
  readonly timeoutMs: number;
}

/** The program, wherever the build put it. Kind `not_found`. */
export function tokenProgram(): string {
  const found = PLACES.map((place) => join(packageRoot, place)).find((path) => existsSync(path));
  if (found) return found;
  throw new PqblkError('not_found', 'the token process pqblk-pkcs11 was not built', {
    path: join(packageRoot, dirname(PLACES[1] ?? '')),
    hint: 'run `npm run build:native`',
  });
}

export class TokenProcess {
  readonly #child: ChildProcess;
  readonly #socket: Socket;
  readonly #options: ProcessOptions;
  readonly #incoming = new Uint8Array(new ArrayBuffer(MESSAGE_BYTES_MAX + 4));
  #received = 0;
  #onFrame: ((body: Uint8Array) => void) | undefined;
  #onEnd: ((error: PqblkError) => void) | undefined;
  #failure: PqblkError | undefined;
  #ended = false;
  #last: Promise<unknown> = Promise.resolve();

  constructor(options: ProcessOptions) {
    this.#options = options;
    this.#child = spawn(tokenProgram(), [], {
      stdio: ['ignore', 'ignore', 'ignore', 'pipe'],
      env: environmentFor(options.environment),
      cwd: '/',
      shell: false,
      detached: true, // what a module starts is in its process group, and ends with it
    });
    this.#socket = this.#child.stdio[SOCKET] as Socket;
    this.#socket.on('data', (chunk: Buffer) => this.#receive(chunk));
    this.#socket.on('error', () => {}); // followed by close
    this.#socket.once('close', () => void this.#closed());
    // A process that the module forked may hold the socket open; what was answered is read first.
    this.#child.once('exit', () => setImmediate(() => void this.#closed()));
    this.#child.once('error', (cause) => {
      this.#fail(fromSystem(cause, { operation: 'start the token process' }));
    });
    // An idle token process does not keep a program alive.
    this.#child.unref();
    this.#socket.unref();
  }

  /** For tests: whom to kill. */
  get pid(): number | undefined {
    return this.#child.pid;
  }

  /**
   * Sends a request, which is wiped, and reads its reply with `parse`, which must copy what it keeps.
   * Kinds `token_crashed`, `token_timeout`, `closed`, and those of numbers.ts.
   */
  request<T>(message: MessageWriter, parse: (reply: MessageReader) => T): Promise<T> {
    const result = this.#last.then(() => this.#exchange(message, parse));
    this.#last = result.catch(() => {});
    return result;
  }

  /**
   * Ends the process: it logs out and finalises its module, since a token may count sessions that
   * were not closed; then for good. Does not wait, but this program does before it ends. Harmless
   * when repeated.
   */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#failure ??= new PqblkError('closed', 'the token session was closed');
    this.#socket.end();
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    const timer = setTimeout(() => this.#kill(), EXIT_WAIT_MS);
    this.#child.ref();
    this.#child.once('exit', () => clearTimeout(timer));
  }

  async #exchange<T>(message: MessageWriter, parse: (reply: MessageReader) => T): Promise<T> {
    try {
      if (this.#failure) throw this.#failure;
      return await new Promise<T>((resolve, reject) => {
        const { timeoutMs } = this.#options;
        const timer = setTimeout(() => this.#timedOut(), timeoutMs);
        const settle = (outcome: () => void) => {
          clearTimeout(timer);
          this.#onFrame = undefined;
          this.#onEnd = undefined;
          this.#socket.unref();
          outcome();
        };
        this.#onEnd = (error) => settle(() => reject(error));
        this.#onFrame = (body) => {
          try {
            const value = this.#parse(body, parse);
            settle(() => resolve(value));
          } catch (error) {
            settle(() => reject(error));
          }
        };
        this.#socket.ref();
        this.#socket.write(message.finish());
      });
    } finally {
      message.wipe();
    }
  }

  #parse<T>(body: Uint8Array, parse: (reply: MessageReader) => T): T {
    const reply = new MessageReader(body);
    const status = reply.u8();
    if (status === 0) {
      const value = parse(reply);
      reply.end();
      return value;
    }
    const path = this.#options.module;
    if (status === 1) {
      const { name, kind, text, hint } = meaningOf(reply.u64());
      throw new PqblkError(kind, `${text} (${name})`, { path, operation: reply.text(), hint });
    }
    const complaint = reply.u8();
    const kind = COMPLAINTS[complaint as keyof typeof COMPLAINTS] ?? 'token_crashed';
    const hint = kind === 'bad_module' ? 'is it the module, and the profile its own?' : undefined;
    throw new PqblkError(kind, reply.text(), { path, hint });
  }

  #receive(chunk: Buffer): void {
    const room = this.#incoming.length - this.#received;
    const expected = this.#onFrame !== undefined && chunk.length <= room;
    if (expected) this.#incoming.set(chunk, this.#received);
    this.#received += chunk.length;
    chunk.fill(0); // it may be a part of a secret
    if (!expected) {
      this.#fail(new PqblkError('token_crashed', 'the token process talks out of turn'));
      this.#kill();
      return;
    }
    if (this.#received < 4) return;
    const view = new DataView(this.#incoming.buffer);
    const length = view.getUint32(0, true) + 4;
    if (length > this.#incoming.length || this.#received > length) {
      this.#fail(new PqblkError('token_crashed', 'the token process answers out of measure'));
      this.#kill();
    } else if (this.#received === length) {
      this.#received = 0;
      this.#onFrame?.(this.#incoming.subarray(4, length));
      this.#incoming.fill(0, 0, length);
    }
  }

  #timedOut(): void {
    const seconds = this.#options.timeoutMs / 1000;
    this.#fail(
      new PqblkError('token_timeout', `the token did not answer within ${seconds} s`, {
        path: this.#options.module,
        hint: 'the token process was ended; timeoutSeconds of the profile is the limit',
      }),
    );
    this.#kill();
  }

  async #closed(): Promise<void> {
    if (!this.#failure) {
      const how = await this.#exit();
      this.#fail(
        new PqblkError('token_crashed', `the token module crashed its process (${how})`, {
          path: this.#options.module,
          hint: 'ask the vendor of the module; what was begun, the same command goes on with',
        }),
      );
    }
    this.#kill();
  }

  #exit(): Promise<string> {
    const { signalCode, exitCode } = this.#child;
    if (signalCode !== null) return Promise.resolve(signalCode);
    if (exitCode !== null) return Promise.resolve(`exit code ${exitCode}`);
    return new Promise((resolve) => {
      const timer = setTimeout(() => resolve('it went silent'), EXIT_WAIT_MS);
      this.#child.once('exit', (code, signal) => {
        clearTimeout(timer);
        resolve(signal ?? `exit code ${code}`);
      });
    });
  }

  #fail(error: PqblkError): void {
    this.#failure ??= error;
    this.#incoming.fill(0);
    this.#onEnd?.(this.#failure);
  }

  #kill(): void {
    this.#socket.destroy();
    const { pid } = this.#child;
    try {
      if (pid !== undefined) process.kill(-pid, 'SIGKILL');
    } catch {
      // nobody of the group is left
    }
  }
}

function environmentFor(names: readonly string[]): NodeJS.ProcessEnv {
  const env: NodeJS.ProcessEnv = { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', LANG: 'C.UTF-8' };
  for (const name of [...ENVIRONMENT, ...names]) {
    const value = process.env[name];
    if (value !== undefined) env[name] = value;
  }
  return env;
}
