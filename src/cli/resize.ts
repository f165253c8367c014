// Room cli/: `pqblk resize`: grow a disk.
import type { Command } from 'commander';
import { addOpenOptions, keyOption, type OpenFlags, withDisk } from './opening.js';
import { examples, jsonOption } from './options.js';
import { formatSize, parseNewSize } from './sizes.js';
import type { Terminal } from './terminal.js';

interface Flags extends OpenFlags {
  json?: boolean;
}

export function addResize(program: Command, terminal: Terminal): void {
  const command = program
    .command('resize <disk> <size>')
    .description('Grow a disk to SIZE, or by +SIZE. What is new reads as zeros.')
    .addOption(keyOption());
  addOpenOptions(command)
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples('pqblk resize vm.sealed 40G --key alice', 'pqblk resize vm.qcow2 +512M'),
    )
    .action(async (path: string, text: string, flags: Flags) => {
      parseNewSize(text, 0); // a typing error is told before anybody is asked for a passphrase
      const [before, after] = await withDisk(path, flags, {}, async (disk) => {
        const current = disk.size;
        await disk.resize(parseNewSize(text, current));
        return [current, disk.size];
      });
      if (flags.json) terminal.json({ path, before, after });
      else terminal.line(`${path}: ${formatSize(before)} → ${formatSize(after)}`);
    });
}
