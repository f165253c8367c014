// Room cli/: the executable. Connects the process (streams, signals, exit code) with the command line.
import { fromSystem, PqblkError } from '../errors.js';
import { isWaitingForInput } from '../keys/waiting.js';
import { run } from './program.js';
import { reportError } from './report-error.js';
import { type Streams, Terminal, type Unread } from './terminal.js';

/** What a shell makes of SIGPIPE, which ends others whose reader has gone. */
const READER_GONE = 141;

// `ps`, and who is refused a locked disk, shall see this program and not the interpreter.
process.title = ['pqblk', ...process.argv.slice(2)].join(' ');

const stop = new AbortController();
let asked = 0;
let ended = false;

// The first signal asks for an orderly end; whoever insists gets the system's own, and so does who sends
// it while the program waits for input that may never come.
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.on(signal, () => {
    asked += 1;
    if (asked === 1 && !isWaitingForInput()) {
      stop.abort();
      return;
    }
    ended = true;
    process.exit(signal === 'SIGINT' ? 130 : 143);
  });
}

// Remarks that nobody reads any more, or that no file has room for, are lost; the work goes on.
process.stderr.on('error', () => {});

// `pqblk … | head` ends the reader first. Who lists keys has nothing to do then; who changes them goes on,
// or it would have been done to half of the disks.
let unread: Unread = 'stop';
let lost: NodeJS.ErrnoException | undefined;
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') lost ??= error;
  else if (unread === 'stop') {
    ended = true;
    process.exit(READER_GONE);
  }
});

/** A file system without room has taken part of the result or nothing: never exit code 0. */
function tellOfLoss(streams: Streams): void {
  if (!lost || unread === 'forget') return;
  const error = new PqblkError('output', `stdout: ${fromSystem(lost).message}`, {
    operation: 'write',
    hint: process.exitCode
      ? undefined
      : 'what was to be done is done; only the report is not whole',
    cause: lost,
  });
  const code = reportError(new Terminal(streams), error, process.argv.includes('--json'));
  process.exitCode ||= code;
}

// Lines that nobody takes from stderr do not keep a program that has done its work; stdout is the work.
const LAST_WORDS_MS = 2000;

const streams: Streams = {
  stdout: process.stdout,
  stderr: process.stderr,
  env: process.env,
  signal: stop.signal,
  whenUnread: (what) => {
    unread = what;
  },
};

// Should the event loop run dry before the command has ended, say so: silence would look like success.
process.on('exit', () => {
  if (ended) {
    tellOfLoss(streams);
    return;
  }
  process.stderr.write('pqblk: ended before its work was done; please report this\n');
  process.exitCode = 1;
});

// Not awaited here: what this is built into, for a quick start, has no await outside functions.
async function main(): Promise<void> {
  process.exitCode = await run(process.argv.slice(2), streams);
  ended = true;
  setInterval(() => {
    if (process.stdout.writableLength === 0) process.exit();
  }, LAST_WORDS_MS).unref();
}

void main();
