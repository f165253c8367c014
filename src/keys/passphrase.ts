// Room keys/: where a passphrase or a token's PIN comes from: a file, a descriptor, the environment,
// or the terminal.
//
// Never from the command line, which every process can read. A passphrase is bytes: nothing is
// normalised, so the same bytes work from every source; one trailing line end is dropped. What the
// environment or a terminal string holds cannot be wiped; buffers can, and are.
import { closeSync, openSync, writeSync } from 'node:fs';
import { isatty, ReadStream } from 'node:tty';
import { fromSystem, PqblkError } from '../errors.js';
import { openInput, patienceFor, readSome } from './input-file.js';
import { Secret } from './secret.js';
import { waitingFor } from './waiting.js';

export const PASSPHRASE_BYTES_MAX = 4096;

export type PassphraseSource =
  | { readonly from: 'file'; readonly path: string }
  | { readonly from: 'fd'; readonly fd: number }
  | { readonly from: 'env'; readonly name: string }
  | {
      readonly from: 'prompt';
      /** What the passphrase is for: `Passphrase for key "alice"`. */
      readonly prompt: string;
      /** Ask twice and compare: for a passphrase that is being set. */
      readonly confirm?: boolean;
    };

/** What is asked for, in messages: a PIN is read like a passphrase. */
export type AskedFor = 'passphrase' | 'PIN' | 'recovery code';

const HINTS = {
  passphrase: {
    empty: 'a key without a passphrase must be asked for: --no-passphrase',
    noTerminal: 'use --passphrase-file, --passphrase-fd or --passphrase-env',
  },
  'recovery code': {
    empty: 'it is on the page of the kit',
    noTerminal: 'use --recovery-code FILE',
  },
  PIN: { empty: 'a PIN has at least one character', noTerminal: 'use --pin-file or --pin-fd' },
} as const;

/**
 * The passphrase; the caller wipes it. Kinds `passphrase_needed` (nothing there, empty, or no
 * terminal), `invalid_argument` (too long, or the two inputs differ), `canceled`, `not_found`, …
 */
export async function readPassphrase(
  source: PassphraseSource,
  what: AskedFor = 'passphrase',
): Promise<Secret> {
  switch (source.from) {
    case 'file':
      return await fromFile(source.path, what);
    case 'fd':
      return await fromDescriptor(source.fd, `descriptor ${source.fd}`, what);
    case 'env':
      return fromEnvironment(source.name, what);
    case 'prompt':
      return await fromTerminal(source.prompt, source.confirm === true, what);
  }
}

async function fromFile(path: string, what: AskedFor): Promise<Secret> {
  const fd = openInput(path, `read ${what}`);
  try {
    return await fromDescriptor(fd, path, what, patienceFor(fd));
  } finally {
    closeSync(fd);
  }
}

function fromEnvironment(name: string, what: AskedFor): Secret {
  const value = process.env[name];
  if (value === undefined) {
    throw new PqblkError('passphrase_needed', `environment variable ${name} is not set`);
  }
  return finish(Buffer.from(value, 'utf8'), `environment variable ${name}`, what);
}

/** Reads to the end of a file or pipe; waits where a descriptor is non-blocking. */
async function fromDescriptor(
  fd: number,
  name: string,
  what: AskedFor,
  patienceMs = 0,
): Promise<Secret> {
  const buffer = Buffer.alloc(PASSPHRASE_BYTES_MAX + 3); // one too many, after a line end
  let length = 0;
  try {
    while (length < buffer.length) {
      const bytes = await readSome(fd, buffer, length, patienceMs);
      if (bytes === 0) break;
      length += bytes;
    }
    return finish(buffer.subarray(0, length), name, what);
  } catch (error) {
    throw fromSystem(error, { path: name, operation: `read ${what}` });
  } finally {
    buffer.fill(0);
  }
}

/** Drops one line end, checks the length, and moves the bytes into a Secret; `bytes` are wiped. */
function finish(bytes: Uint8Array, name: string, what: AskedFor): Secret {
  let length = bytes.length;
  if (bytes[length - 1] === 0x0a) length -= 1;
  if (length < bytes.length && bytes[length - 1] === 0x0d) length -= 1;
  const secret = Secret.copyOf(bytes.subarray(0, length));
  bytes.fill(0);
  if (length === 0) {
    throw new PqblkError('passphrase_needed', `the ${what} from ${name} is empty`, {
      hint: HINTS[what].empty,
    });
  }
  if (length > PASSPHRASE_BYTES_MAX) {
    secret.wipe();
    throw new PqblkError(
      'invalid_argument',
      `the ${what} from ${name} is longer than ${PASSPHRASE_BYTES_MAX} bytes`,
    );
  }
  return secret;
}

async function fromTerminal(prompt: string, confirm: boolean, what: AskedFor): Promise<Secret> {
  const first = await ask(`${prompt}: `, what);
  if (!confirm) return first;
  try {
    using second = await ask(`${prompt} (again): `, what);
    if (first.equals(second)) return first;
    throw new PqblkError('invalid_argument', `the two ${what}s differ`);
  } catch (error) {
    first.wipe();
    throw error;
  }
}

/** Asks on the controlling terminal, whatever stdin and stdout are; the answer is not shown. */
async function ask(prompt: string, what: AskedFor): Promise<Secret> {
  let fd: number;
  try {
    fd = openSync('/dev/tty', 'r+');
  } catch (cause) {
    throw new PqblkError('passphrase_needed', `a ${what} is needed and there is no terminal`, {
      hint: HINTS[what].noTerminal,
      cause,
    });
  }
  if (!isatty(fd)) {
    closeSync(fd);
    throw new PqblkError('passphrase_needed', '/dev/tty is not a terminal');
  }
  const terminal = new ReadStream(fd);
  const restore = () => {
    if (terminal.isRaw) terminal.setRawMode(false);
  };
  process.once('exit', restore);
  try {
    terminal.setRawMode(true);
    writeSync(fd, prompt);
    return await waitingFor(readLine(terminal, what));
  } finally {
    restore();
    writeSync(fd, '\r\n');
    process.removeListener('exit', restore);
    // libuv opens the terminal anew and closes only that descriptor; fd is then still ours.
    const { _handle: handle } = terminal as unknown as { _handle?: { fd?: number } };
    const reopened = handle?.fd !== fd;
    terminal.destroy();
    if (reopened) closeSync(fd);
  }
}

const CONTROL = { c: 0x03, d: 0x04, backspace: 0x08, lf: 0x0a, cr: 0x0d, u: 0x15, delete: 0x7f };

/** One line from a raw terminal, with the usual editing keys; Ctrl-C is kind `canceled`. */
function readLine(terminal: ReadStream, what: AskedFor): Promise<Secret> {
  const line = Buffer.alloc(PASSPHRASE_BYTES_MAX + 1);
  let length = 0;
  const take = (bytes: Uint8Array): 'line' | 'stop' | 'more' => {
    for (const byte of bytes) {
      if (byte === CONTROL.cr || byte === CONTROL.lf) return 'line';
      if (byte === CONTROL.c || (byte === CONTROL.d && length === 0)) return 'stop';
      if (byte === CONTROL.u) length = 0;
      else if (byte === CONTROL.backspace || byte === CONTROL.delete) {
        length = previousCharacter(line, length);
      } else if (length < line.length) line[length++] = byte;
    }
    return 'more';
  };
  return new Promise<Secret>((resolve, reject) => {
    const end = (outcome: () => void) => {
      terminal.removeAllListeners();
      terminal.pause();
      outcome();
      line.fill(0);
    };
    const done = () => {
      try {
        resolve(finish(line.subarray(0, length), 'the terminal', what));
      } catch (error) {
        reject(error);
      }
    };
    const stop = () => reject(new PqblkError('canceled', `canceled at the ${what} prompt`));
    terminal.on('error', (error) => end(() => reject(fromSystem(error, { path: '/dev/tty' }))));
    terminal.on('end', () => end(stop));
    terminal.on('data', (chunk: Buffer) => {
      const outcome = take(chunk);
      chunk.fill(0);
      if (outcome === 'line') end(done);
      if (outcome === 'stop') end(stop);
    });
  });
}

/** Where the last UTF-8 character before `length` begins. */
function previousCharacter(bytes: Uint8Array, length: number): number {
  let at = Math.max(length - 1, 0);
  while (at > 0 && ((bytes[at] ?? 0) & 0xc0) === 0x80) at -= 1;
  return at;
}
