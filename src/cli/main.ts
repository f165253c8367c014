#!/usr/bin/env node
// Room cli/: the executable. Connects the process (streams, signals, exit code) with the command line.
import { isWaitingForInput } from '../keys/waiting.js';
import { run } from './program.js';

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

// `pqblk … | head` ends the reader first; that is no failure of ours.
let outputIsTheWork = true;
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (!outputIsTheWork) return;
  if (error.code !== 'EPIPE') throw error;
  ended = true;
  process.exit(0);
});

// Lines that nobody takes from stderr do not keep a program that has done its work; stdout is the work.
const LAST_WORDS_MS = 2000;

// Should the event loop run dry before the command has ended, say so: silence would look like success.
process.on('exit', () => {
  if (ended) return;
  process.stderr.write('pqblk: ended before its work was done; please report this\n');
  process.exitCode = 1;
});

process.exitCode = await run(process.argv.slice(2), {
  stdout: process.stdout,
  stderr: process.stderr,
  env: process.env,
  signal: stop.signal,
  goOnUnread: () => {
    outputIsTheWork = false;
  },
});
ended = true;
setInterval(() => {
  if (process.stdout.writableLength === 0) process.exit();
}, LAST_WORDS_MS).unref();
