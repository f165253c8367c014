// Room cli/: `pqblk unlock`: the keys of a disk to a descriptor that whoever started this has opened.
import { type Command, Option } from 'commander';
import { handKeys } from '../index.js';
import { addKeyUse, type KeyUseFlags, unlocking } from './opening.js';
import { examples, parseCount } from './options.js';

interface Flags extends KeyUseFlags {
  fd: number;
}

export function addUnlock(program: Command): void {
  const command = program
    .command('unlock <disk>')
    .description('Write the keys of a sealed disk to an open descriptor, never to a terminal.')
    .addOption(
      new Option('--fd <number>', 'descriptor of a pipe, socket or private file')
        .argParser(parseCount)
        .makeOptionMandatory(),
    );
  addKeyUse(command)
    .addHelpText(
      'after',
      examples(
        'pqblk unlock vm.sealed --key alice --fd 1 | my-hypervisor --keys-fd 0',
        'nbdkit ./nbdkit-pqblk-plugin.so disk=vm.sealed \\\n' +
          '      keys-fd=3 3< <(pqblk unlock vm.sealed --key alice --fd 1)',
      ),
    )
    .action(async (path: string, flags: Flags) => {
      using unlocked = await unlocking(path, { ...flags, format: 'sealed' });
      await handKeys(path, { ...unlocked.options, fd: flags.fd });
    });
}
