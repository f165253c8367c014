// Room cli/: `pqblk rewrap`: one slot sealed anew, to the same key or to the one that takes its place.
import type { Command } from 'commander';
import { PqblkError } from '../errors.js';
import type { KeyAreaEditor, Recipient, SlotDescription } from '../index.js';
import { examples } from './options.js';
import { addRekeyOptions, findSlot, type RekeyFlags, rekey, reportChange } from './rekeying.js';
import {
  addSlotOptions,
  hasSlot,
  newRecipient,
  requireSuch,
  type SlotFlags,
  testerOf,
} from './slot.js';
import type { Terminal } from './terminal.js';

interface Flags extends RekeyFlags, RewrapFlags {
  to?: string;
  force?: boolean;
}

/** What is done to the slot, and what the new one is to be. */
export interface RewrapFlags extends Omit<SlotFlags, 'role'> {
  keepOld?: boolean;
  rotateMasterKey?: boolean;
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
    .option('--rotate-master-key', 'change the master key as well')
    .option(
      '--force',
      'though no key at hand opens the disk afterwards: the new one is not tested',
    );
  addSlotOptions(addRekeyOptions(command))
    .addHelpText(
      'after',
      examples(
        'pqblk rewrap vm.sealed alice --to alice-2027 --key alice',
        'pqblk rewrap vm.sealed old-token --to ./new-token.pub --keep-old',
      ),
    )
    .action(async (path: string, slot: string | undefined, flags: Flags) => {
      const recipient = flags.to === undefined ? undefined : await newRecipient(flags.to, flags);
      if (!recipient && (flags.keepOld || flags.label || flags.notAfter !== undefined)) {
        throw new PqblkError('usage', '--keep-old, --label and --not-after go with --to');
      }
      using tester = await testerOf(flags.to ?? '/', flags);
      const changed = await rekey(path, flags, {
        operation: 'rewrap',
        testers: tester.identities,
        untested: flags.force,
        edit: (editor) => editRewrap(editor, slot, recipient, flags),
      });
      const advice = recipient && !flags.rotateMasterKey ? AFTER_MOVING : [];
      reportChange(terminal, changed, flags, [...(recipient ? tester.advice : []), ...advice]);
    });
}

/** Does what of it is not done. Kind `slot_exists`: the new key's slot is not such a one. Whether the master key was changed for it, nothing on the disk tells. */
export function editRewrap(
  editor: KeyAreaEditor,
  reference: string | undefined,
  recipient: Recipient | undefined,
  flags: RewrapFlags,
): void {
  const { keepOld, rotateMasterKey } = flags;
  if (recipient && hasSlot(editor.slots, recipient)) {
    requireSuch(editor.slots, recipient, flags);
    endFormer(editor, reference, recipient, flags);
  } else {
    editor.rewrap(slotOf(editor, reference).index, { recipient, keepOld });
  }
  if (rotateMasterKey) editor.rotateMasterKey();
}

/** The new key has its slot, whatever that is called: an earlier run may have kept the former one. */
function endFormer(
  editor: KeyAreaEditor,
  reference = String(editor.ownIndex),
  recipient: Recipient,
  { keepOld, rotateMasterKey }: RewrapFlags,
): void {
  const isOwn = (slot: SlotDescription) => hasSlot([slot], recipient);
  const others = editor.slots.filter((slot) => !isOwn(slot));
  const former = formerAmong(others, reference);
  if (former?.state === 'active') {
    editor.rewrap(former.index, { recipient }); // says why it cannot be
  } else if (keepOld || rotateMasterKey) {
    // It is to stay, or ends with the others.
  } else if (former) {
    editor.end(former.index);
  } // Else it is gone, or the number is its successor's now: a warning names those that are kept.
}

const slotOf = (editor: KeyAreaEditor, reference = String(editor.ownIndex)) =>
  findSlot(editor.slots, reference);

/** The slot that was moved, where it is left. */
function formerAmong(
  others: readonly SlotDescription[],
  reference: string,
): SlotDescription | undefined {
  try {
    const former = findSlot(others, reference);
    return former.state === 'revoked' ? undefined : former;
  } catch (error) {
    if (error instanceof PqblkError && error.kind === 'slot_not_found') return undefined;
    throw error;
  }
}
