// Room cli/: the policy file: finding it, reading it, and asking it when a disk is opened.
import { isAbsolute } from 'node:path';
import { Option } from 'commander';
import { PqblkError } from '../errors.js';
import {
  type Policy,
  parsePolicy,
  readInputText,
  requireOpenable,
  type SlotDescription,
} from '../index.js';

const POLICY_BYTES_MAX = 2 ** 20;

export interface PolicyFlags {
  policy?: string;
}

export function policyOption(): Option {
  return new Option(
    '--policy <file>',
    'rules for keys and slots, YAML or JSON (default: $PQBLK_POLICY, else none)',
  );
}

/** The policy that applies, or undefined when none was named. Kinds `usage`, `not_found`, `invalid_argument`. */
export async function policyOf(flags: PolicyFlags): Promise<Policy | undefined> {
  if (flags.policy === '') {
    // Of a variable that is not set, most likely: no policy at all would be the wrong guess.
    throw new PqblkError('usage', '--policy: expected the name of a file, found nothing');
  }
  const path = flags.policy ?? process.env.PQBLK_POLICY;
  if (!path) return undefined;
  if (flags.policy === undefined && !isAbsolute(path)) {
    // It would be another policy, or none, in each working directory.
    throw new PqblkError('usage', '$PQBLK_POLICY: expected an absolute path', { path });
  }
  const text = await readInputText(path, { operation: 'read policy', bytesMax: POLICY_BYTES_MAX });
  return parsePolicy(await parseText(text, path), path);
}

async function parseText(text: string, path: string): Promise<unknown> {
  try {
    const { parse } = await import('yaml'); // only whoever has a policy waits for it
    return parse(text); // JSON is YAML, and here a rule that is said twice is refused in both
  } catch (error) {
    const [message] = (error as Error).message.split('\n');
    throw new PqblkError('invalid_argument', `policy: ${message}`, { path });
  }
}

/** What a policy forgets, for whoever changes keys under it. */
export function warnOfGaps({ twoPersons }: Policy): void {
  if (twoPersons.length === 0 || twoPersons.includes('slot-add')) return;
  process.stderr.write(
    'pqblk: warning: the policy demands two persons, but not for slot-add: whoever adds a key of his own ' +
      'alone can approve with it\n',
  );
}

/** For KeyOptions.onSlot: warns of a slot that is past its date, or refuses as the policy says. */
export function slotChecker(policy: Policy | undefined): (slot: SlotDescription) => void {
  return (slot) => {
    if (policy) requireOpenable(policy, slot);
    if (!isPast(slot)) return;
    const message = `slot ${slot.index} ("${slot.label}") is past its date, ${slot.notAfter}`;
    process.stderr.write(`pqblk: warning: ${message}\n`);
  };
}

export const isPast = (slot: SlotDescription, now = Date.now()) =>
  slot.notAfter !== undefined && Date.parse(slot.notAfter) <= now;
