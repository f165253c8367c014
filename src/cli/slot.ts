// Room cli/: `pqblk slot list|add|test|retire|revoke`: who may open a sealed disk.
import { basename } from 'node:path';
import { type Command, Option } from 'commander';
import { PqblkError } from '../errors.js';
import {
  describeRecipients,
  diskInfo,
  fingerprintOf,
  type Identity,
  Kem,
  type KeyInfo,
  kemByName,
  kemParameters,
  keyAreaOf,
  openCopies,
  type Recipient,
  readKeyArea,
  recoveryIdentity,
  requireOpenable,
  type SlotDescription,
  SlotRole,
  SlotState,
  toHex,
} from '../index.js';
import { addKeyUse, type KeyUseFlags, unlockKey } from './opening.js';
import {
  addSecondKeyOptions,
  examples,
  jsonOption,
  openStore,
  type PassphraseFlags,
  recipientOf,
  type SecondFlags,
  secondFlags,
  unlockIn,
} from './options.js';
import { isPast, policyOf } from './policy.js';
import { makeRecoveryKit } from './recovery-kit.js';
import {
  addRekeyOptions,
  findSlot,
  parseTime,
  type RekeyFlags,
  rekey,
  reportChange,
  showSlots,
} from './rekeying.js';
import type { Terminal } from './terminal.js';

/** The last is the default of a recovery kit. */
const KEMS = Object.values(Kem).map((id) => kemParameters(id).name.toLowerCase());
const ROLES = Object.keys(SlotRole) as (keyof typeof SlotRole)[];

const AFTER_REVOKING = [
  'an old copy of this disk (a backup, a snapshot of its storage) still opens to the revoked key',
  'if that key leaked, rotate the data key as well: `pqblk rotate-data-key`',
];

export function addSlot(program: Command, terminal: Terminal): void {
  const slot = program
    .command('slot')
    .description('Say who may open a sealed disk.')
    .addHelpText(
      'after',
      `
A slot lets one key open the disk. It is named by its number, its label, or at least 8 digits of its
fingerprint or id. A changed key area is tested before it is written, written to both copies, and
read back; a command that was killed is completed by running it again.`,
    );
  addList(slot, terminal);
  addAdd(slot, terminal);
  addTest(slot, terminal);
  addRetire(slot, terminal);
  addRevoke(slot, terminal);
}

function addList(slot: Command, terminal: Terminal): void {
  slot
    .command('list <disk>')
    .description('List the slots of a disk. Needs no key, and so believes what the file says.')
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk slot list vm.sealed'))
    .action(async (path: string, flags: { json?: boolean }) => {
      const { sealed } = await diskInfo(path, 'sealed');
      await readKeyArea(path); // complains where both copies are damaged
      const slots = sealed?.keyArea?.slots ?? [];
      if (flags.json) {
        const { uuid, keyAreaGeneration, keyAreaCopyDamaged, keyAreaCopiesDiffer } = sealed ?? {};
        const { keyAreaFindings } = sealed ?? {};
        const copies = {
          ...{ keyAreaGeneration, keyAreaCopyDamaged, keyAreaCopiesDiffer, keyAreaFindings },
        };
        terminal.json({ path, uuid, ...copies, authenticated: false, slots });
        return;
      }
      showSlots(terminal, slots);
      for (const found of sealed?.keyAreaFindings ?? []) {
        terminal.remark(`warning: DAMAGED: ${found}; \`pqblk check --repair\` mends it`);
      }
    });
}

// ---- add -------------------------------------------------------------------------------------------

interface AddFlags extends RekeyFlags, NewPassphraseFlags, SlotFlags {
  recoveryKit?: string;
  kem: string;
}

/** What was said of a slot to be. */
export interface SlotFlags {
  role?: keyof typeof SlotRole;
  label?: string;
  notAfter?: number;
}

export type NewPassphraseFlags = SecondFlags<'new'>;

/** Options of a slot to be, and of the key that it is for. */
export function addSlotOptions(command: Command): Command {
  return addSecondKeyOptions(command, 'new', 'the new key, to test its slot')
    .option('--label <text>', 'name of the slot (default: that of the key)')
    .addOption(
      new Option(
        '--not-after <date>',
        'date after which opening with it warns, 2027-01-31, or never (default: that of the slot that it ' +
          'takes the place of)',
      ).argParser(parseEnd),
    );
}

/** Seconds since 1970; 0: no end. */
const parseEnd = (text: string) => (text === 'never' ? 0 : parseTime(text));

function addAdd(slot: Command, terminal: Terminal): void {
  const command = slot
    .command('add <disk> [recipient]')
    .description('Let one more key open the disk: a key of the store, or a file of `key export`.')
    .addOption(new Option('--role <role>', 'what the key is for (default: primary)').choices(ROLES))
    .option('--recovery-kit <file.html>', 'instead of a recipient: a new key, on a page to print')
    .addOption(
      new Option('--kem <kem>', 'KEM of the recovery kit').choices(KEMS).default(KEMS.at(-1)),
    );
  addSlotOptions(addRekeyOptions(command))
    .addHelpText(
      'after',
      `
When the private half of the new key is in the store without a passphrase, or a --new-passphrase or
--new-pin option is given, the new slot is opened with it before anything is written.
${examples(
  'pqblk slot add vm.sealed bob --key alice',
  'pqblk slot add vm.sealed ./safe.pub --role recovery --label "safe, building 2"',
  'pqblk slot add vm.sealed --recovery-kit kit.html --key alice',
)}`,
    )
    .action(async (path: string, reference: string | undefined, flags: AddFlags) => {
      if ((reference === undefined) === (flags.recoveryKit === undefined)) {
        throw new PqblkError('usage', 'name either a recipient or --recovery-kit');
      }
      if (reference === undefined) await addKit(terminal, path, flags);
      else await addKeyOf(terminal, path, reference, flags);
    });
}

async function addKeyOf(
  terminal: Terminal,
  path: string,
  reference: string,
  flags: AddFlags,
): Promise<void> {
  const recipient = await newRecipient(reference, flags, SlotRole[flags.role ?? 'primary']);
  using tester = await testerOf(reference, flags);
  const changed = await rekey(path, flags, {
    operation: 'slot-add',
    testers: tester.identities,
    edit: (editor) => {
      if (hasSlot(editor.slots, recipient)) requireSuch(editor.slots, recipient, flags);
      else editor.add(recipient);
    },
  });
  reportChange(terminal, changed, flags, tester.advice);
}

/** A slot that is there already is what was asked for, as far as it was said. Kind `slot_exists`. */
export function requireSuch(
  slots: readonly SlotDescription[],
  recipient: Recipient,
  { role, label, notAfter }: SlotFlags,
): void {
  const slot = slots.find((one) => hasSlot([one], recipient)) as SlotDescription;
  const end = slot.notAfter === undefined ? 0 : Date.parse(slot.notAfter) / 1000;
  const fits =
    (role ?? slot.role) === slot.role &&
    (label ?? slot.label) === slot.label &&
    (notAfter ?? end) === end;
  if (fits) return;
  const date = slot.notAfter === undefined ? 'without a date' : `until ${slot.notAfter}`;
  throw new PqblkError(
    'slot_exists',
    `the key has slot ${slot.index} already ("${slot.label}", ${slot.role}, ${date}), not such a one`,
    {
      operation: 'change key slots',
      hint: 'a slot keeps what it is: revoke it first, take another key, or leave out what it is not',
    },
  );
}

async function addKit(terminal: Terminal, path: string, flags: AddFlags): Promise<void> {
  const {
    recoveryKit: file = '',
    label = `recovery kit ${new Date().toISOString().slice(0, 10)}`,
  } = flags;
  const { sealed } = await diskInfo(path, 'sealed');
  const facts = { disk: basename(path), volumeUuid: sealed?.uuid ?? '', label };
  using kit = await makeRecoveryKit(file, kemByName(flags.kem).id, facts);
  const role = SlotRole[flags.role ?? 'recovery'];
  const recipient = { ...kit.recipient, role, notAfter: flags.notAfter };
  try {
    const slots = describeRecipients([recipient]);
    using tester = await recoveryIdentity(kit.secret, slots);
    const changed = await rekey(path, flags, {
      operation: 'slot-add',
      testers: [tester],
      edit: (editor) => void editor.add(recipient),
    });
    if (flags.dryRun) await kit.discard();
    else await rememberKit(flags, recipient);
    reportChange(terminal, changed, flags, [
      `the page in ${file} opens this disk: print it, then delete the file`,
    ]);
  } catch (error) {
    // It opens nothing, unless the change went as far as the disk.
    const { sealed: now } = await diskInfo(path, 'sealed');
    if (!hasSlot(now?.keyArea?.slots ?? [], recipient)) await kit.discard();
    throw error;
  }
}

/** Whoever rotates the master key later has to know this key from elsewhere than the image. */
async function rememberKit(flags: AddFlags, recipient: Recipient): Promise<void> {
  const digits = toHex(fingerprintOf(recipient.encapsulationKey)).slice(0, 16);
  await openStore(flags).remember(`recovery-kit-${digits}`, recipient);
}

export function hasSlot(
  slots: readonly { fingerprint: string; state: string }[],
  { encapsulationKey }: Recipient,
): boolean {
  const fingerprint = toHex(fingerprintOf(encapsulationKey));
  return slots.some((slot) => slot.fingerprint === fingerprint && slot.state === 'active');
}

export async function newRecipient(
  reference: string,
  flags: Omit<SlotFlags, 'role'> & { store?: string },
  role?: Recipient['role'],
): Promise<Recipient> {
  const recipient = await recipientOf(openStore(flags), reference);
  const { label = recipient.label, notAfter } = flags;
  return { ...recipient, label, notAfter, ...(role !== undefined && { role }) };
}

/** The new key, unlocked to test its slot, where that needs no question. */
export async function testerOf(
  reference: string,
  flags: NewPassphraseFlags & { store?: string },
): Promise<{ identities: Identity[]; advice: string[] } & Disposable> {
  const secret = secondFlags(flags, 'new');
  const store = openStore(flags);
  const info = reference.includes('/') ? undefined : await store.show(reference);
  if (!info || !opensQuietly(info, secret)) {
    const advice = [`the new slot was not tested: have its owner run \`pqblk slot test\``];
    return { identities: [], advice, [Symbol.dispose]: () => {} };
  }
  const identity = await unlockIn(store, info.name, secret);
  return {
    identities: [identity],
    advice: [],
    [Symbol.dispose]: () => identity[Symbol.dispose](),
  };
}

/** Without asking anybody. */
function opensQuietly({ protection, token }: KeyInfo, secret: PassphraseFlags): boolean {
  if (token) {
    const { pinFile = token.pinFile, pinFd } = secret;
    return token.login === 'none' || (token.login === 'pin' && (pinFile ?? pinFd) !== undefined);
  }
  const { passphraseFile, passphraseFd, passphraseEnv } = secret;
  const given = passphraseFile ?? passphraseFd ?? passphraseEnv;
  return protection === 'none' || (protection === 'scrypt' && given !== undefined);
}

// ---- test ------------------------------------------------------------------------------------------

function addTest(slot: Command, terminal: Terminal): void {
  const command = slot
    .command('test <disk>')
    .description('Open a slot with its private key, and change nothing.');
  addKeyUse(command)
    .addOption(jsonOption())
    .addHelpText('after', examples('pqblk slot test vm.sealed --key bob'))
    .action(async (path: string, flags: KeyUseFlags & { json?: boolean }) => {
      const store = openStore(flags);
      using identity = await unlockKey(store, path, flags);
      const copies = await keyAreaOf(path).read();
      const { pins } = store;
      using opened = (await openCopies(copies, identity, { ...flags, pins })).opened;
      const found = opened.slot;
      const policy = await policyOf(flags);
      if (policy) requireOpenable(policy, opened.slot);
      const vmkCheck = toHex(opened.vmkCheck);
      if (flags.json) terminal.json({ path, opens: true, slot: found, vmkCheck });
      else {
        terminal.line(`slot ${found.index} ("${found.label}") opens with key ${found.fingerprint}`);
      }
      if (isPast(found)) terminal.remark(`warning: the slot is past its date, ${found.notAfter}`);
    });
}

// ---- retire, revoke --------------------------------------------------------------------------------

function addRetire(slot: Command, terminal: Terminal): void {
  const command = slot
    .command('retire <disk> <slot>')
    .description('Make a slot decrypt-only: it opens until the next rotation of the master key.')
    .option('--undo', 'make it active again');
  addRekeyOptions(command)
    .addHelpText('after', examples('pqblk slot retire vm.sealed old-token --key alice'))
    .action(async (path: string, reference: string, flags: RekeyFlags & { undo?: boolean }) => {
      const changed = await rekey(path, flags, {
        operation: flags.undo ? 'slot-activate' : 'slot-retire',
        edit: (editor) => {
          const state = flags.undo ? SlotState.active : SlotState.decryptOnly;
          editor.setState(findSlot(editor.slots, reference).index, state);
        },
      });
      reportChange(terminal, changed, flags);
    });
}

function addRevoke(slot: Command, terminal: Terminal): void {
  const command = slot
    .command('revoke <disk> <slots...>')
    .description('Wipe slots and change the master key: their keys open this disk no more.')
    .option('--force', 'revoke the last active slot, or the last that is tested, as well');
  addRekeyOptions(command)
    .addHelpText(
      'after',
      `
Every other active slot is sealed anew, to keys that the store or --trust knows. Decrypt-only slots end
with the revoked ones. Old copies of the disk are out of reach: they open to whoever could open them.
${examples('pqblk slot revoke vm.sealed bob --key alice')}`,
    )
    .action(async (path: string, slots: string[], flags: RekeyFlags & { force?: boolean }) => {
      const { force = false } = flags;
      const changed = await rekey(path, flags, {
        operation: 'slot-revoke',
        untested: force,
        edit: (editor) => {
          for (const { index } of slots.map((slot) => findSlot(editor.slots, slot))) {
            editor.revoke(index, { force });
          }
        },
      });
      reportChange(terminal, changed, flags, AFTER_REVOKING);
    });
}
