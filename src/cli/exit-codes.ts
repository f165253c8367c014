// Room cli/: `pqblk exit-codes`: what each exit code means, from the one table of errors.
import type { Command } from 'commander';
import { ERROR_TABLE } from '../errors.js';
import { jsonOption } from './options.js';
import type { Terminal } from './terminal.js';

export function addExitCodes(program: Command, terminal: Terminal): void {
  program
    .command('exit-codes')
    .description('List the exit codes and the error codes they stand for.')
    .addOption(jsonOption())
    .action((flags: { json?: boolean }) => {
      const rows = Object.values(ERROR_TABLE).sort((a, b) => a.exitCode - b.exitCode);
      if (flags.json) terminal.json(rows);
      else {
        terminal.table(
          ['EXIT', 'CODE', 'MEANING'],
          rows.map(({ exitCode, code, means }) => [String(exitCode), code, means]),
        );
      }
    });
}
