// Room cli/: the command line as a whole: its commands, and what all of them share.
//
// A command is a file that adds itself to commander's program and does its work through the public API
// (index.ts). `run` is the only entry; main.ts connects it with the process, tests call it directly.
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { Command, CommanderError } from 'commander';
import { ERROR_TABLE } from '../errors.js';
import { packageRoot } from '../package-root.js';
import { reportError } from './report-error.js';
import { type Streams, Terminal, type Unread } from './terminal.js';

const { version } = createRequire(import.meta.url)(join(packageRoot, 'package.json')) as {
  version: string;
};

type Add = (program: Command, terminal: Terminal) => void;

/** By name, in the order of the help. Only the one that is called is loaded: a third of a short run. */
const COMMANDS: Readonly<Record<string, () => Promise<Add>>> = {
  key: async () => (await import('./key.js')).addKey,
  token: async () => (await import('./token.js')).addToken,
  create: async () => (await import('./create.js')).addCreate,
  info: async () => (await import('./info.js')).addInfo,
  import: async () => (await import('./import.js')).addImport,
  export: async () => (await import('./export.js')).addExport,
  check: async () => (await import('./check.js')).addCheck,
  resize: async () => (await import('./resize.js')).addResize,
  slot: async () => (await import('./slot.js')).addSlot,
  rewrap: async () => (await import('./rewrap.js')).addRewrap,
  'rotate-master-key': async () => (await import('./rotate.js')).addRotate,
  'rotate-data-key': async () => (await import('./rotate-data-key.js')).addRotateDataKey,
  pin: async () => (await import('./pin.js')).addPin,
  audit: async () => (await import('./audit.js')).addAudit,
  header: async () => (await import('./header.js')).addHeader,
  fleet: async () => (await import('./fleet.js')).addFleet,
  report: async () => (await import('./report.js')).addReport,
  serve: async () => (await import('./serve.js')).addServe,
  attach: async () => (await import('./attach.js')).addAttach,
  detach: async () => (await import('./detach.js')).addDetach,
  agent: async () => (await import('./agent.js')).addAgent,
  unlock: async () => (await import('./unlock.js')).addUnlock,
  bench: async () => (await import('./bench.js')).addBench,
  'exit-codes': async () => (await import('./exit-codes.js')).addExitCodes,
};

/** They do nothing but tell: without a reader there is no work left. Every other command goes on. */
const TELLING = new Set([
  'info',
  'key list',
  'key show',
  'key export',
  'token list',
  'token profile',
  'slot list',
  'pin list',
  'pin export',
  'bench',
  'exit-codes',
]);

/** What to do where stdout has lost its reader. */
function unreadFor(action: Command): Unread {
  const { parent } = action;
  const name = parent?.parent ? `${parent.name()} ${action.name()}` : action.name();
  const toFile = action.opts<{ output?: string }>().output !== undefined;
  return TELLING.has(name) && !toFile ? 'stop' : 'go-on';
}

const VERSION = ['-V', '--version'];

const HELP_END = `
Sizes read 4096, 512M, 20G or 1T. Every command that reports takes --json; an error is then one
line {"error": {...}} on stderr. Each kind of failure has its own exit code; 'pqblk exit-codes' lists
them. 'pqblk help COMMAND' has examples.`;

/** Runs one command line (without node and script) and returns its exit code; never throws. */
export async function run(argv: readonly string[], streams: Streams): Promise<number> {
  const terminal = new Terminal(streams);
  try {
    const program = await buildProgram(argv, terminal, streams);
    await program.parseAsync([...argv], { from: 'user' });
    return 0;
  } catch (error) {
    if (error instanceof CommanderError) {
      if (error.exitCode === 0) return 0; // --help, --version
      if (error.code === 'commander.help') return ERROR_TABLE.usage.exitCode; // it was shown
    }
    return reportError(terminal, error, argv.includes('--json'));
  }
}

async function buildProgram(
  argv: readonly string[],
  terminal: Terminal,
  streams: Streams,
): Promise<Command> {
  const program = new Command('pqblk')
    .description('Virtual disks under post-quantum encryption: raw, QCOW2 and sealed QCOW2.')
    .version(version, VERSION.join(', '))
    .addHelpText('after', HELP_END)
    .exitOverride()
    .showSuggestionAfterError()
    .configureOutput({
      writeOut: (text) => streams.stdout.write(text),
      writeErr: (text) => streams.stdout.write(text), // help for a lone `pqblk key`
      outputError: () => {}, // reportError prints it
    })
    .hook('preAction', (_, action) => streams.whenUnread?.(unreadFor(action)));
  const called = Object.keys(COMMANDS).filter((name) => name === argv[0]);
  const any = called.length > 0 || VERSION.includes(argv[0] ?? '');
  const wanted = any ? called : Object.keys(COMMANDS); // help, or a slip
  for (const name of wanted) (await COMMANDS[name]?.())?.(program, terminal);
  return program;
}
