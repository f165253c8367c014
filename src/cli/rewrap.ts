// Room cli/: `pqblk rewrap`: one slot sealed anew, to the same key or to the one that takes its place.
import type { Command } from 'commander';
import { PqblkError } from '../errors.js';
import type { KeyAreaEditor, Recipient } from '../index.js';
import { examples } from './options.js';
import { addRekeyOptions, findSlot, type RekeyFlags, rekey, reportChange } from './rekeying.js';
import { addSlotOptions, hasSlot, newRecipient, testerOf } from './slot.js';
import type { Terminal } from './terminal.js';

interface Flags extends RekeyFlags {
  to?: string;
  keepOld?: boolean;
  rotate?: boolean;
  label?: string;
  notAfter?: number;
}

const AFTER_MOVING = [
  'an old copy of the key area still opens to the former key, and the master key is the same: ' +
    'use --rotate-master-key when that key is no longer to be trusted',
];

export function addRewrap(program: Command, terminal: Terminal): void {
  const command = program
    .command('rewrap <disk> [slot]')
    .description(
      'Seal one slot anew (default: the one that opens the disk), or move it to a new key.',
    )
    .option('--to <name|file>', 'key that takes its place (a file has a slash in its name)')
    .option('--keep-old', 'let the former key open until the next rotation of the master key')
    .option('--rotate-master-key', 'change the master key as well');
  addSlotOptions(addRekeyOptions(command))
    .addHelpText(
      'after',
      examples(
        'pqblk rewrap vm.sealed alice --to alice-2027 --key alice',
        'pqblk rewrap vm.sealed old-token --to ./new-token.pub --keep-old',
      ),
    )
    .action(async (path: string, slot: string | undefined, flags: Flags & RotateFlag) => {
      const recipient = flags.to === undefined ? undefined : await newRecipient(flags.to, flags);
      if (!recipient && (flags.keepOld || flags.label || flags.notAfter)) {
        throw new PqblkError('usage', '--keep-old, --label and --not-after go with --to');
      }
      using tester = await testerOf(flags.to ?? '/', flags);
      const changed = await rekey(path, flags, {
        operation: 'rewrap',
        testers: tester.identities,
        edit: (editor) => editRewrap(editor, slot, recipient, flags),
      });
      const advice = recipient && !flags.rotateMasterKey ? AFTER_MOVING : [];
      reportChange(terminal, changed, flags, [...(recipient ? tester.advice : []), ...advice]);
    });
}

interface RotateFlag {
  rotateMasterKey?: boolean;
}

/** Does it, unless it is done. */
export function editRewrap(
  editor: KeyAreaEditor,
  reference: string | undefined,
  recipient: Recipient | undefined,
  { keepOld, rotateMasterKey }: { keepOld?: boolean; rotateMasterKey?: boolean },
): void {
  if (recipient && isDone(editor, reference, recipient)) return;
  const slot = findSlot(editor.slots, reference ?? String(editor.ownIndex));
  editor.rewrap(slot.index, { recipient, keepOld });
  if (rotateMasterKey) editor.rotateMasterKey();
}

/** The new key has its slot, and the former one has none that is active. */
function isDone(
  editor: KeyAreaEditor,
  reference: string | undefined,
  recipient: Recipient,
): boolean {
  if (!hasSlot(editor.slots, recipient)) return false;
  try {
    const former = findSlot(editor.slots, reference ?? String(editor.ownIndex));
    return former.state !== 'active' || hasSlot([former], recipient);
  } catch (error) {
    if (error instanceof PqblkError && error.kind === 'no_slot') return true;
    throw error;
  }
}
