// Room cli/: how a failed command ends. The one place that prints errors and picks the exit code.
//
// For people: `pqblk: path: operation: message` and a hint, on stderr. With --json: one line
// `{"error": {...}}` on stderr, with the code, the exit code and the hint; stdout stays empty, so that
// whoever reads it sees a result or nothing. Exit codes are the table in errors.ts.
import { CommanderError } from 'commander';
import { exitCodeOf, fromSystem, PqblkError } from '../errors.js';
import type { Terminal } from './terminal.js';

/** Prints `error` and returns the exit code. */
export function reportError(terminal: Terminal, thrown: unknown, json: boolean): number {
  const first = firstOf(thrown);
  const error = first instanceof CommanderError ? usageError(first) : first;
  const ours = error instanceof PqblkError ? error : fromSystem(error);
  if (json) {
    terminal.remark(JSON.stringify({ error: ours.toJSON() }));
  } else {
    terminal.remark(`${terminal.styleError('red', 'pqblk:')} ${ours.toLine()}`);
    if (ours.hint) terminal.remark(`${terminal.styleError('dim', 'hint:')} ${ours.hint}`);
    if (process.env.PQBLK_DEBUG && error instanceof Error) terminal.remark(error.stack ?? '');
  }
  return exitCodeOf(ours);
}

/** What failed first, when giving back what it held has failed as well. */
function firstOf(thrown: unknown): unknown {
  let error = thrown;
  while (error instanceof Error && error.name === 'SuppressedError' && 'suppressed' in error) {
    error = error.suppressed;
  }
  return error;
}

function usageError(error: CommanderError): PqblkError {
  const [message = '', ...more] = error.message.replace(/^error: /, '').split('\n');
  return new PqblkError('usage', message, {
    hint: more.join(' ').trim() || '`pqblk help COMMAND` shows what it takes',
  });
}
