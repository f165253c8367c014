// Room cli/: what the commands that change who may open a disk have in common.
//
// Each opens the key area with a key, hands a change to changeKeyArea, and reports before and after.
// What is trusted is what the operator's key store and options say, never what the image says.
import { join } from 'node:path';
import { type Command, Option } from 'commander';
import { PqblkError } from '../errors.js';
import {
  AuditLog,
  type ChangedKeyArea,
  type ChangeKeyAreaOptions,
  ControlClient,
  changeKeyArea,
  explainLocked,
  fingerprintOf,
  formatUuid,
  type Identity,
  type KeyAreaEditor,
  type KeyAreaPlace,
  type KeyOperation,
  type KeyStore,
  keyAreaOf,
  type Policy,
  prepareKeys,
  type SlotDescription,
  toHex,
} from '../index.js';
import { addKeyUse, type KeyUseFlags, recoveryKey, slotsOf, unlockKey } from './opening.js';
import {
  addSecondKeyOptions,
  collect,
  jsonOption,
  openStore,
  recipientIn,
  type SecondFlags,
  type StoreFlags,
  secondFlags,
  unlockIn,
} from './options.js';
import { isPast, policyOf, warnOfGaps } from './policy.js';
import type { Terminal } from './terminal.js';

export interface ApproveFlags extends StoreFlags, SecondFlags<'approve'> {
  approve?: string[];
  approveStore?: string;
  approveRecoveryCode?: string;
}

export interface RekeyFlags extends KeyUseFlags, ApproveFlags {
  trust?: string[];
  audit?: string;
  restartAudit?: boolean;
  dryRun?: boolean;
  json?: boolean;
}

const SHORT_FINGERPRINT = 16;
/** 128 bits of a hash that nobody can find another key for. */
const TRUST_DIGITS_MIN = 32;

export function addRekeyOptions(command: Command): Command {
  return addApproveOptions(addKeyUse(command))
    .addOption(
      new Option(
        '--trust <fingerprint|file>',
        `key that may be sealed to though the store does not know it (at least ${TRUST_DIGITS_MIN} ` +
          'digits, or a file of `pqblk key export`, with a slash in its name); may be repeated',
      ).argParser(collect),
    )
    .addOption(auditOption())
    .addOption(restartAuditOption())
    .option('--dry-run', 'show what would change, and change nothing')
    .addOption(jsonOption());
}

/** Who else wants the change. */
export function addApproveOptions(command: Command): Command {
  command
    .addOption(
      new Option(
        '--approve <key>',
        'second key that opens the disk as well: two-person rule',
      ).argParser(collect),
    )
    .option('--approve-store <dir>', 'key store of the second person (default: the same)')
    .option(
      '--approve-recovery-code <file>',
      "the second key is that of a recovery kit; '-' asks for its code",
    );
  return addSecondKeyOptions(command, 'approve', 'the second key');
}

export const auditOption = () =>
  new Option('--audit <file>', 'audit log of this disk (default: where the policy says)');
export const restartAuditOption = () =>
  new Option('--restart-audit', 'begin a new audit log where the former one is lost');

export interface Rekeying {
  readonly operation: KeyOperation;
  edit(editor: KeyAreaEditor): void | Promise<void>;
  /** Must open the result; the caller disposes of them. */
  readonly testers?: readonly Identity[];
  /** Though no key at hand opens the result. */
  readonly untested?: boolean | undefined;
}

/** What a change of keys needs besides the change itself. */
export interface Permit {
  /** The process that serves the disk, when one does: it does the writing then. */
  readonly served: ControlClient | undefined;
  readonly options: Omit<ChangeKeyAreaOptions, 'operation' | 'edit' | 'onStep'>;
  /** To be called at the end of an edit: believes the keys of the store and those that --trust named. */
  trust(editor: KeyAreaEditor): Promise<void>;
}

/** What the changes of any number of disks have in common. */
export interface Keyring extends Disposable {
  readonly store: KeyStore;
  readonly policy: Policy | undefined;
  readonly trust: Trust;
  readonly approvers: readonly Identity[];
}

/** `slots`: of the one disk that it is about; without them no recovery code approves. */
export async function keyringOf(flags: RekeyFlags, slots?: Slots): Promise<Keyring> {
  const store = openStore(flags);
  const policy = await policyOf(flags);
  if (policy) warnOfGaps(policy);
  const trust = await trustOf(store, flags.trust);
  const approvers = await approversOf(flags, slots);
  return {
    store,
    policy,
    trust,
    approvers: approvers.identities,
    [Symbol.dispose]: () => approvers[Symbol.dispose](),
  };
}

/** Unlocks the disk's key and everything else that the flags name, and calls `use`. */
export async function withPermit<T>(
  path: string,
  flags: RekeyFlags,
  use: (permit: Permit) => Promise<T>,
): Promise<T> {
  const free = requireFree(path); // before anybody is asked for a passphrase
  prepareKeys().catch(() => {}); // meanwhile; who uses them hears of it
  await free;
  using keyring = await keyringOf(flags, () => slotsOf(path));
  using identity = await unlockKey(keyring.store, path, flags);
  return await withPermitOf(keyring, identity, path, flags, use);
}

/** Kinds: those that writing the key area would meet in the lock, and in the file. */
async function requireFree(path: string): Promise<void> {
  try {
    using served = await ControlClient.open(path);
    const place = served?.keyArea ?? keyAreaOf(path);
    await place.probe((await place.read()).state);
  } catch (error) {
    throw inPath(await explainLocked(error, path), path);
  }
}

/** The same, with a key that is unlocked already. */
export async function withPermitOf<T>(
  { store, policy, trust, approvers }: Keyring,
  identity: Identity,
  path: string,
  flags: RekeyFlags,
  use: (permit: Permit) => Promise<T>,
): Promise<T> {
  try {
    using served = await ControlClient.open(path);
    const place = served?.keyArea ?? keyAreaOf(path);
    const options = {
      place,
      identity,
      policy,
      pins: store.pins,
      approvers,
      audit: await auditOf(volumeIn(place), flags, policy),
      allowRollback: flags.allowRollback,
      confirmVmk: flags.confirmVmk,
      dryRun: flags.dryRun,
      trusted: trust.fingerprints,
    };
    return await use({
      served,
      options,
      trust: (editor) => trust.extend(editor.sealedFromImage),
    });
  } catch (error) {
    throw inPath(await explainLocked(error, path), path);
  }
}

/** As `edit` of changeKeyArea, with the operator's word on keys that --trust names. */
export function changeUnder(
  { options, trust }: Permit,
  { operation, edit, testers, untested }: Rekeying,
): Promise<ChangedKeyArea> {
  return changeKeyArea({
    ...options,
    operation,
    testers,
    untested,
    edit: async (editor) => {
      await edit(editor);
      await trust(editor);
    },
  });
}

/** Unlocks, changes, and returns what became of it. */
export async function rekey(
  path: string,
  flags: RekeyFlags,
  rekeying: Rekeying,
): Promise<ChangedKeyArea> {
  return await withPermit(path, flags, (permit) => changeUnder(permit, rekeying));
}

type Slots = () => Promise<readonly SlotDescription[]>;

/** The keys named by --approve, and that of a recovery code for one of these slots, unlocked. */
export async function approversOf(
  flags: ApproveFlags,
  slots?: Slots,
): Promise<{ identities: Identity[] } & Disposable> {
  const { approve = [], approveStore, approveRecoveryCode: code } = flags;
  const store = openStore({ ...flags, ...(approveStore && { store: approveStore }) });
  const identities: Identity[] = [];
  const dispose = () => {
    for (const identity of identities) identity[Symbol.dispose]();
  };
  try {
    for (const reference of approve) {
      identities.push(await unlockIn(store, reference, secondFlags(flags, 'approve')));
    }
    if (code !== undefined && !slots) {
      throw new PqblkError('usage', 'a recovery code is of one disk: it approves no fleet');
    }
    if (code !== undefined && slots) identities.push(await recoveryKey(await slots(), code));
    return { identities, [Symbol.dispose]: dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}

export async function auditOf(
  volume: () => Promise<Uint8Array>,
  flags: Pick<RekeyFlags, 'audit' | 'restartAudit'>,
  policy: Policy | undefined,
): Promise<AuditLog | undefined> {
  const path = flags.audit ?? (await auditPath(volume, policy));
  return path === undefined ? undefined : new AuditLog(path, { restart: flags.restartAudit });
}

/** Where the policy keeps the audit log of a disk. */
export async function auditPath(
  volume: () => Promise<Uint8Array>,
  policy: Policy | undefined,
): Promise<string | undefined> {
  if (policy?.auditDirectory === undefined) return undefined;
  return join(policy.auditDirectory, `${formatUuid(await volume())}.log`);
}

/** The UUID of the disk whose key area this is. */
export const volumeIn = (place: KeyAreaPlace) => async () => (await place.read()).volumeUuid;

/** The same error with the disk's path, where it has none. */
function inPath(error: unknown, path: string): unknown {
  if (!(error instanceof PqblkError) || error.path) return error;
  const { kind, message, operation, hint, cause } = error;
  return new PqblkError(kind, message, { path, operation, hint, cause });
}

export interface Trust {
  readonly fingerprints: ReadonlySet<string>;
  /** Adds the store's keys, and those of the slots' keys whose first digits the operator gave. */
  extend(slots: readonly SlotDescription[]): Promise<void>;
}

/** The store, whose every key file takes its milliseconds, is read when a slot asks for it. */
async function trustOf(store: KeyStore, given: readonly string[] = []): Promise<Trust> {
  const fingerprints = new Set<string>();
  const prefixes: string[] = [];
  for (const reference of given) {
    if (reference.includes('/')) fingerprints.add(await fingerprintIn(reference));
    else prefixes.push(requireDigits(reference));
  }
  let known: ReturnType<KeyStore['list']> | undefined;
  return {
    fingerprints,
    async extend(slots) {
      if (slots.length === 0) return;
      known ??= store.list();
      for (const { fingerprint } of (await known).keys) fingerprints.add(fingerprint);
      for (const { fingerprint } of slots) {
        if (prefixes.some((prefix) => fingerprint.startsWith(prefix)))
          fingerprints.add(fingerprint);
      }
    },
  };
}

async function fingerprintIn(path: string): Promise<string> {
  return toHex(fingerprintOf((await recipientIn(path)).encapsulationKey));
}

function requireDigits(given: string): string {
  if (/^[0-9a-f]{32,64}$/i.test(given)) return given.toLowerCase();
  throw new PqblkError(
    'usage',
    `--trust: expected ${TRUST_DIGITS_MIN} to 64 hex digits of a fingerprint, or a file`,
  );
}

/**
 * The slot meant by its number, its label, or at least 8 digits of its fingerprint or id. A slot that
 * is live goes before one that was revoked; of several that were, any will do: nothing is done to it. Kinds
 * `slot_not_found`, `ambiguous`.
 */
export function findSlot(slots: readonly SlotDescription[], reference: string): SlotDescription {
  const fits = (slot: SlotDescription) =>
    /^\d{1,2}$/.test(reference)
      ? slot.index === Number(reference)
      : slot.label === reference || hasDigits(slot, reference.toLowerCase());
  const matches = slots.filter(fits);
  const live = matches.filter((slot) => slot.state !== 'revoked');
  const [match, another] = live.length > 0 ? live : matches.slice(0, 1);
  if (match && !another) return match;
  const known = slots.map((slot) => `${slot.index} "${slot.label}"`).join(', ');
  if (!match) {
    throw new PqblkError('slot_not_found', `no slot ${JSON.stringify(reference)}`, {
      hint: `the disk has ${known || 'none'}`,
    });
  }
  throw new PqblkError('ambiguous', `several slots fit ${JSON.stringify(reference)}`, {
    hint: `name one by its number: ${known}`,
  });
}

const hasDigits = (slot: SlotDescription, digits: string) =>
  /^[0-9a-f]{8,64}$/.test(digits) &&
  (slot.fingerprint.startsWith(digits) || slot.id.startsWith(digits));

/** `2027-01-31`, or a full ISO time: seconds since 1970. */
export function parseTime(text: string): number {
  const valid = /^\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d)?Z)?$/.test(text);
  const milliseconds = valid ? Date.parse(text) : Number.NaN;
  // Date.parse takes February 30th for March 2nd.
  const isDay =
    milliseconds > 0 && new Date(milliseconds).toISOString().startsWith(text.slice(0, 10));
  if (isDay) return milliseconds / 1000;
  throw new PqblkError('usage', `${JSON.stringify(text)} is no date like 2027-01-31 (UTC)`);
}

export const shortFingerprint = (slot: SlotDescription) =>
  slot.fingerprint.slice(0, SHORT_FINGERPRINT);

export function showSlots(terminal: Terminal, slots: readonly SlotDescription[]): void {
  terminal.table(
    ['SLOT', 'LABEL', 'ROLE', 'STATE', 'KEM', 'FINGERPRINT', 'CREATED', 'NOT AFTER'],
    slots.map((slot) => [
      String(slot.index),
      slot.label,
      slot.role,
      slot.state,
      slot.kem,
      shortFingerprint(slot),
      slot.created.slice(0, 10),
      slot.notAfter === undefined
        ? ''
        : `${slot.notAfter.slice(0, 10)}${isPast(slot) ? ' PAST' : ''}`,
    ]),
  );
}

/** What is left to think about after a change: few ways back, keys that are out of date. */
export function warningsFor({ before, after, changed }: ChangedKeyArea): string[] {
  const active = after.slots.filter((slot) => slot.state === 'active');
  const recovery = active.filter((slot) => slot.role === 'recovery');
  const hadRecovery = before.slots.some(
    (slot) => slot.state === 'active' && slot.role === 'recovery',
  );
  const warnings: string[] = [];
  if (active.length === 0) warnings.push('no active slot is left: nobody can open this disk');
  else if (recovery.length === 0 && hadRecovery) warnings.push('no recovery slot is left');
  else if (recovery.length === 1) warnings.push('only one recovery slot is left');
  for (const slot of active.filter((one) => isPast(one))) {
    warnings.push(`slot ${slot.index} ("${slot.label}") is past its date, ${slot.notAfter}`);
  }
  // "Nothing to change" would sound as if a key that was to go were gone.
  const kept = changed ? [] : after.slots.filter(({ state }) => state === 'decrypt-only');
  for (const { index, label } of kept) {
    warnings.push(
      `the key of slot ${index} ("${label}") still opens the disk; name it by that to end it`,
    );
  }
  return warnings;
}

/** One line for people, or the whole result as JSON; remarks go to stderr. */
export function reportChange(
  terminal: Terminal,
  changed: ChangedKeyArea,
  { json }: { json?: boolean | undefined },
  advice: readonly string[] = [],
): void {
  const warnings = warningsFor(changed);
  if (json) {
    terminal.json({ ...changed, warnings, advice });
    return;
  }
  const { before, after, dryRun, completed } = changed;
  if (completed) terminal.line('an earlier change was cut short; it is complete now');
  if (!changed.changed) {
    terminal.line('nothing to change');
  } else {
    const say = (state: typeof before) =>
      `generation ${state.generation}, master key ${state.vmkCheck?.slice(0, SHORT_FINGERPRINT) ?? '(new)'}`;
    terminal.fields([
      ['before', say(before)],
      [dryRun ? 'would be' : 'now', say(after)],
    ]);
    terminal.line();
    showSlots(terminal, after.slots);
  }
  for (const warning of warnings) terminal.remark(`warning: ${warning}`);
  if (changed.changed && !dryRun) for (const text of advice) terminal.remark(text);
}
