// Room cli/: the command line as a whole: its commands, and what all of them share.
//
// A command is a file that adds itself to commander's program and does its work through the public API
// (index.ts). `run` is the only entry; main.ts connects it with the process, tests call it directly.
import { createRequire } from 'node:module';
import { Command, CommanderError } from 'commander';
import { ERROR_TABLE } from '../errors.js';
import { addAgent } from './agent.js';
import { addAttach } from './attach.js';
import { addAudit } from './audit.js';
import { addBench } from './bench.js';
import { addCheck } from './check.js';
import { addCreate } from './create.js';
import { addDetach } from './detach.js';
import { addExitCodes } from './exit-codes.js';
import { addExport } from './export.js';
import { addFleet } from './fleet.js';
import { addHeader } from './header.js';
import { addImport } from './import.js';
import { addInfo } from './info.js';
import { addKey } from './key.js';
import { addReport } from './report.js';
import { reportError } from './report-error.js';
import { addResize } from './resize.js';
import { addRewrap } from './rewrap.js';
import { addRotate } from './rotate.js';
import { addRotateDataKey } from './rotate-data-key.js';
import { addServe } from './serve.js';
import { addSlot } from './slot.js';
import { type Streams, Terminal } from './terminal.js';
import { addToken } from './token.js';
import { addUnlock } from './unlock.js';

const { version } = createRequire(import.meta.url)('../../package.json') as { version: string };

const COMMANDS = [
  addKey,
  addToken,
  addCreate,
  addInfo,
  addImport,
  addExport,
  addCheck,
  addResize,
  addSlot,
  addRewrap,
  addRotate,
  addRotateDataKey,
  addAudit,
  addHeader,
  addFleet,
  addReport,
  addServe,
  addAttach,
  addDetach,
  addAgent,
  addUnlock,
  addBench,
  addExitCodes,
];

const HELP_END = `
Sizes read 4096, 512M, 20G or 1T. Every command that reports takes --json; an error is then one
line {"error": {...}} on stderr. Each kind of failure has its own exit code; 'pqblk exit-codes' lists
them. 'pqblk help COMMAND' has examples.`;

/** Runs one command line (without node and script) and returns its exit code; never throws. */
export async function run(argv: readonly string[], streams: Streams): Promise<number> {
  const terminal = new Terminal(streams);
  try {
    await buildProgram(terminal, streams).parseAsync([...argv], { from: 'user' });
    return 0;
  } catch (error) {
    if (error instanceof CommanderError) {
      if (error.exitCode === 0) return 0; // --help, --version
      if (error.code === 'commander.help') return ERROR_TABLE.usage.exitCode; // it was shown
    }
    return reportError(terminal, error, argv.includes('--json'));
  }
}

function buildProgram(terminal: Terminal, streams: Streams): Command {
  const program = new Command('pqblk')
    .description('Virtual disks under post-quantum encryption: raw, QCOW2 and sealed QCOW2.')
    .version(version)
    .addHelpText('after', HELP_END)
    .exitOverride()
    .showSuggestionAfterError()
    .configureOutput({
      writeOut: (text) => streams.stdout.write(text),
      writeErr: (text) => streams.stdout.write(text), // help for a lone `pqblk key`
      outputError: () => {}, // reportError prints it
    });
  for (const add of COMMANDS) add(program, terminal);
  return program;
}
