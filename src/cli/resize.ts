// Room cli/: `pqblk resize`: grow a disk; one that is served, by the process that serves it.
import type { Command } from 'commander';
import { ControlClient, type Disk, explainLocked } from '../index.js';
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
    .description(
      'Grow a disk to SIZE, or by +SIZE, also while it is served. What is new reads as zeros.',
    )
    .addOption(keyOption());
  addOpenOptions(command)
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples('pqblk resize vm.sealed 40G --key alice', 'pqblk resize vm.qcow2 +512M'),
    )
    .action(async (path: string, text: string, flags: Flags) => {
      parseNewSize(text, 0); // a typing error is told before anybody is asked for a passphrase
      using served = await ControlClient.open(path);
      const [before, after] = served
        ? await grow(served, await served.size(), text)
        : await withDisk(path, flags, { toResize: true }, (disk) =>
            grow(disk, disk.size, text),
          ).catch(async (error) => Promise.reject(await explainLocked(error, path)));
      if (flags.json) terminal.json({ path, before, after, served: served !== undefined });
      else terminal.line(`${path}: ${formatSize(before)} → ${formatSize(after)}`);
    });
}

async function grow(
  disk: Pick<Disk, 'resize'>,
  before: number,
  text: string,
): Promise<[before: number, after: number]> {
  const after = parseNewSize(text, before);
  await disk.resize(after);
  return [before, after];
}
