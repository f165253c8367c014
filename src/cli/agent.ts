// Room cli/: `pqblk agent`: the keys of one disk for programs that ask on a Unix socket, then its end.
import { type Command, Option } from 'commander';
import { notifyServiceManager, serveKeys } from '../index.js';
import { addKeyUse, type KeyUseFlags, unlocking, warnOfSwap } from './opening.js';
import { examples, jsonOption, parseCount } from './options.js';
import type { Terminal } from './terminal.js';

interface Flags extends KeyUseFlags {
  socket: string;
  count: number;
  timeout?: number;
  json?: boolean;
}

export function addAgent(program: Command, terminal: Terminal): void {
  const command = program
    .command('agent <disk>')
    .description('Hand the keys of a sealed disk to a program of the same user that asks, and end.')
    .requiredOption('--socket <path>', 'Unix socket to listen on, mode 0600')
    .addOption(
      new Option('--count <n>', 'end after handing the keys over so often')
        .argParser(parseCount)
        .default(1),
    )
    .addOption(
      new Option('--timeout <seconds>', 'end after that time (default: never)').argParser(
        parseCount,
      ),
    );
  addKeyUse(command)
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk agent vm.sealed --key alice --socket /run/user/1000/vm.keys --timeout 60 &',
        'nbdkit ./nbdkit-pqblk-plugin.so disk=vm.sealed keys-agent=/run/user/1000/vm.keys',
      ),
    )
    .action(async (path: string, flags: Flags) => {
      const { socket, count, timeout, json } = flags;
      using unlocked = await unlocking(path, { ...flags, format: 'sealed' });
      await serveKeys(path, {
        ...unlocked.options,
        socket,
        count,
        timeoutMs: (timeout ?? 0) * 1000,
        signal: terminal.signal,
        onReady: () => {
          warnOfSwap(terminal);
          if (json) terminal.json({ ready: true, pid: process.pid, socket });
          else terminal.line(`ready: ${socket}`);
          notifyServiceManager(`READY=1\nMAINPID=${process.pid}`);
        },
      });
    });
}
