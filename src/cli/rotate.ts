// Room cli/: `pqblk rotate-master-key`: a new master key, sealed to every active slot.
import { type Command, InvalidArgumentError, Option } from 'commander';
import { toHex } from '../index.js';
import { examples } from './options.js';
import { addRekeyOptions, type RekeyFlags, rekey, reportChange } from './rekeying.js';
import type { Terminal } from './terminal.js';

interface Flags extends RekeyFlags {
  from?: string;
}

const ADVICE = [
  'an old copy of the key area still opens to its keys, and leads to the same data key: after a leak, ' +
    'rotate that one as well: `pqblk rotate-data-key`',
];

export function addRotate(program: Command, terminal: Terminal): void {
  const command = program
    .command('rotate-master-key <disk>')
    .description('Change the master key of a sealed disk. Takes milliseconds, whatever its size.')
    .addOption(
      new Option(
        '--from <hex>',
        'only if the master key is this one (at least 16 digits, as --dry-run shows it)',
      ).argParser(parseCheck),
    );
  addRekeyOptions(command)
    .addHelpText(
      'after',
      `
Every active slot is sealed anew, to keys that the store or --trust knows; decrypt-only slots end. With
--from a run that was killed can be repeated without rotating twice.
${examples(
  'pqblk rotate-master-key vm.sealed --key alice --dry-run',
  'pqblk rotate-master-key vm.sealed --key alice',
)}`,
    )
    .action(async (path: string, flags: Flags) => {
      const changed = await rekey(path, flags, {
        operation: 'rotate-master-key',
        edit: (editor) => {
          const check = toHex(editor.observed.vmkCheck);
          if (flags.from === undefined || check.startsWith(flags.from)) editor.rotateMasterKey();
        },
      });
      reportChange(terminal, changed, flags, ADVICE);
    });
}

function parseCheck(text: string): string {
  if (/^[0-9a-f]{16,64}$/i.test(text)) return text.toLowerCase();
  throw new InvalidArgumentError('expected 16 to 64 hex digits.');
}
