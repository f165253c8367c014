// Room cli/: `pqblk detach`: takes a disk out of a machine that runs.
import type { Command } from 'commander';
import { QmpConnection, unplugDisk } from '../index.js';
import { qmpOption, timeoutOf, timeoutOption } from './attach.js';
import { examples, jsonOption } from './options.js';
import type { Terminal } from './terminal.js';

interface Flags {
  qmp: string;
  timeout?: number;
  json?: boolean;
}

export function addDetach(program: Command, terminal: Terminal): void {
  program
    .command('detach <id>')
    .description('Take a vhost-user disk out of a running QEMU. Unmount it in the guest before.')
    .addOption(qmpOption())
    .addOption(timeoutOption())
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk detach data --qmp /run/vm.qmp'))
    .action(async (id: string, flags: Flags) => {
      const { signal } = terminal;
      using qmp = await QmpConnection.connect(flags.qmp, { signal });
      await unplugDisk(qmp, id, { timeoutMs: timeoutOf(flags), signal });
      if (flags.json) terminal.json({ detached: true, id });
      else terminal.line(`detached: ${id}`);
    });
}
