// Room keys/: replacing a key area, from opening the old one to having read back the new one.
//
// The order is what makes every moment safe: the pin announces the new key area before it is written,
// the older copy is written first and the newer one after it is durable, both are read back, and only
// then the pin forgets the former state. Killed anywhere, the disk opens with keys that it should open
// with, and running the same change again completes it. Where the copies are kept is a KeyAreaPlace: a
// file that nobody serves, or somebody who serves it.
import { PqblkError } from '../errors.js';
import { equalConstantTime, formatUuid, toHex } from './bytes.js';
import { openKeyArea } from './key-area.js';
import {
  type CopyIndex,
  type KeyAreaCopies,
  type KeyAreaPlace,
  mendCopies,
  needsMending,
  openNewest,
  requireReadable,
  requireUncontested,
  sisterOf,
} from './key-area-copies.js';
import type { AuditHead, SlotDescription } from './key-area-describe.js';
import { KeyAreaEditor, type SealedKeyArea } from './key-area-editor.js';
import type { Observed, PinOptions, Pins } from './pins.js';
import { type KeyOperation, type Policy, requireAllowed, requireOpenable } from './policy.js';
import type { Identity } from './provider.js';

/** The steps of a change, in order; `onStep` hears of each when it is done. */
export const CHANGE_STEPS = [
  'opened', // with the key, under the pin
  'planned', // the changes are collected, and allowed
  'composed', // the new blob exists in memory, and opens
  'logged', // the audit log has its line
  'announced', // the pin knows what is coming
  'one-copy', // the older copy is the new key area, durably
  'both-copies', // nothing of the former one is left
  'verified', // both were read back
  'pinned', // the pin has forgotten the former one
] as const;
export type ChangeStep = (typeof CHANGE_STEPS)[number];

/** The record of who did what. */
export interface AuditTrail {
  /** It may take the place of a lost one. */
  readonly restarts?: boolean;
  /** Composes the line; throws when it could not be written. Nothing is written yet. */
  prepare(subject: AuditSubject): Promise<AuditLine>;
  /** Throws what `prepare` would throw now, and changes nothing. */
  rehearse(subject: AuditSubject): Promise<void>;
}

/** A line to be: the new key area holds its number and hash. */
export interface AuditLine extends AuditHead {
  /** Appends it, durably. */
  append(): Promise<void>;
  /** What it says did not come about. Never throws. */
  failed(error: unknown): Promise<void>;
  /**
   * The log is again as it was found, and one that was made for this line is gone: for a disk that was to be,
   * and of which nothing is left. Where that cannot be done, as `failed`. Never throws.
   */
  withdraw(error: unknown): Promise<void>;
  /** Gives the log free. */
  close(): Promise<void>;
}

/** What a line is about. */
export interface AuditSubject {
  readonly operation: KeyOperation;
  readonly volumeUuid: Uint8Array;
  readonly generation: number;
  /** What the key area that was opened says of the log. */
  readonly known: AuditHead;
  /** The same of the disk's own, where a backup takes its place; undefined when it cannot be asked. */
  readonly replaced?: (AuditHead & { readonly generation: number }) | undefined;
  /** Key that unlocked the disk, hex. */
  readonly unlockedBy: string;
  readonly approvedBy: readonly string[];
  readonly before: readonly SlotDescription[];
  readonly after: readonly SlotDescription[];
  /** What the slots do not show. */
  readonly remarks?: AuditRemarks | undefined;
}

/** Of a rotation of the data key: which step of which. */
export interface AuditRemarks {
  readonly step: 'begun' | 'finished' | 'aborted';
  readonly fromEpoch: number;
  readonly toEpoch: number;
}

export interface ChangeKeyAreaOptions extends PinOptions {
  readonly place: KeyAreaPlace;
  readonly identity: Identity;
  /** For the policy and the audit log. */
  readonly operation: KeyOperation;
  /** Makes the changes; what it throws stops everything before anything is written. */
  readonly edit: (editor: KeyAreaEditor, blob: Uint8Array) => void | Promise<void>;
  readonly pins?: Pins | undefined;
  /** Fingerprints (hex) of keys known from elsewhere than the image. */
  readonly trusted?: ReadonlySet<string> | undefined;
  /** Must open the new key area before it is written, besides `identity` if it still has a slot. */
  readonly testers?: readonly Identity[] | undefined;
  /** Second keys that open the disk as well: their fingerprints go into the audit log. */
  readonly approvers?: readonly Identity[] | undefined;
  readonly audit?: AuditTrail | undefined;
  /** What is allowed; its trusted keys are trusted. */
  readonly policy?: Policy | undefined;
  readonly dryRun?: boolean | undefined;
  /** Though no key at hand opens the result: who could open it would turn out later. */
  readonly untested?: boolean | undefined;
  /** The word that `confirmVmk` is goes for a copy that may be true, and which this change ends. */
  readonly overrules?: boolean | undefined;
  /** More follows: policy and audit log are asked now, though the key area may stay as it is. */
  readonly partOfMore?: boolean | undefined;
  /** For the audit log, asked when the edit is done. */
  readonly remarks?: (() => AuditRemarks) | undefined;
  readonly onStep?: ((step: ChangeStep) => void | Promise<void>) | undefined;
}

export interface KeyAreaState {
  readonly generation: number;
  /** Check value of the VMK, hex; undefined when it is not made yet (dry run). */
  readonly vmkCheck: string | undefined;
  readonly slots: readonly SlotDescription[];
}

export interface ChangedKeyArea {
  readonly volumeUuid: string;
  /** False: it was so already. */
  readonly changed: boolean;
  /** An earlier change that was cut short was completed. */
  readonly completed: boolean;
  readonly dryRun: boolean;
  readonly before: KeyAreaState;
  readonly after: KeyAreaState;
}

/**
 * Changes a key area. Kinds: those of opening (`wrong_key`, `rollback`, …), what `edit` throws,
 * `policy` (a key that only the image vouches for), `locked` (served, or changed meanwhile),
 * `io_error` (a copy cannot be read back, or is not what was written).
 */
export async function changeKeyArea(options: ChangeKeyAreaOptions): Promise<ChangedKeyArea> {
  const { place, pins, dryRun = false } = options;
  const copies = await place.read();
  requireReadable(copies);
  if (!pins || dryRun) return await changeFrom(copies, options);
  const release = await pins.hold(copies.volumeUuid);
  try {
    return await changeFrom(await place.read(), options); // another change may just have ended
  } finally {
    await release();
  }
}

async function changeFrom(
  copies: KeyAreaCopies,
  options: ChangeKeyAreaOptions,
): Promise<ChangedKeyArea> {
  const { place, identity, pins, edit, dryRun = false } = options;
  const step = async (name: ChangeStep) => await options.onStep?.(name);
  const expectedVolumeUuid = copies.volumeUuid;
  const { allowRollback, confirmVmk } = options;
  const chosen = await openNewest(copies, {
    ...{ pins, allowRollback, confirmVmk },
    open: (blob) => KeyAreaEditor.open(blob, identity, { expectedVolumeUuid }),
    observe: ({ observed }) => observed,
  });
  using editor = chosen.opened;
  if (!options.overrules || !chosen.refused?.confirmed) requireUncontested(chosen);
  const { index } = chosen;
  const { blob } = copies.copies[index];
  const own = editor.slots.find((slot) => slot.index === editor.ownIndex);
  if (options.policy && own) requireOpenable(options.policy, own);
  const approvedBy = await approve(editor, blob, options);
  await step('opened');

  const before = stateOf(editor.observed, editor.slots);
  await edit(editor, blob);
  if (editor.changed || options.partOfMore) {
    requirePermitted(editor, before.slots, approvedBy, options);
  }
  requireTestable(editor, options);
  await step('planned');
  const result = { volumeUuid: formatUuid(copies.volumeUuid), dryRun, before };
  const subject: AuditSubject = {
    operation: options.operation,
    volumeUuid: copies.volumeUuid,
    generation: editor.changed ? editor.nextGeneration : editor.observed.generation + 1,
    known: editor.audit,
    unlockedBy: toHex(identity.fingerprint),
    approvedBy,
    before: before.slots,
    after: editor.slots,
    remarks: options.remarks?.(),
  };
  if (!editor.changed) {
    if (options.partOfMore) await options.audit?.rehearse(subject);
    const completed = needsMending(copies);
    if (!dryRun) {
      if (completed) await mendCopies(place, copies, index);
      await pins?.record(editor.observed, options);
    }
    return { ...result, changed: false, completed, after: before };
  }
  await place.probe(copies.state);
  if (dryRun) {
    await options.audit?.rehearse(subject);
    return { ...result, changed: true, completed: false, after: plannedState(editor) };
  }
  const line = await options.audit?.prepare(subject);
  try {
    const sealed = await editor.seal(line);
    await requireOpens(sealed, editor, options);
    await step('composed');
    await line?.append();
    await step('logged');
    await write(sealed, { copies, index }, editor, options).catch(async (error: unknown) => {
      await line?.failed(error);
      throw error;
    });
    const after = stateOf(sealed.observed, editor.slots);
    return { ...result, changed: true, completed: needsMending(copies), after };
  } finally {
    await line?.close();
  }
}

async function write(
  sealed: SealedKeyArea,
  { copies, index }: { copies: KeyAreaCopies; index: CopyIndex },
  editor: KeyAreaEditor,
  options: ChangeKeyAreaOptions,
): Promise<void> {
  const { place, pins } = options;
  const step = async (name: ChangeStep) => await options.onStep?.(name);
  await place.follower?.announce(editor.observed, sealed.observed, pins);
  await pins?.announce(editor.observed, sealed.observed);
  await step('announced');
  const first = sisterOf(index);
  await place.write(first, sealed.blob, copies.state);
  await step('one-copy');
  const half = await readBack(place);
  const ours = equalConstantTime(half.copies[first].blob, sealed.blob);
  const untouched = equalConstantTime(half.copies[index].blob, copies.copies[index].blob);
  if (!ours || !untouched) {
    // who found ours may have begun at it, and has made its successor here
    throw new PqblkError('locked', 'the key area was replaced meanwhile');
  }
  await place.write(index, sealed.blob, half.state);
  await step('both-copies');
  const written = await readBack(place);
  if (!equalConstantTime(written.blob, sealed.blob) || needsMending(written)) {
    throw new PqblkError('io_error', 'the key area that was read back is not what was written', {
      operation: 'verify key area',
      hint: 'the storage may be failing: keep a header backup, then look at it with `pqblk check`',
    });
  }
  await step('verified');
  await place.follower?.record(sealed.observed);
  await pins?.record(sealed.observed, options);
  await step('pinned');
}

/** Kind `io_error`: a copy that was whole or written just now cannot be read. */
async function readBack(place: KeyAreaPlace): Promise<KeyAreaCopies> {
  let seen = await place.read();
  if (seen.damaged.includes(true)) seen = await place.read(); // somebody may have been writing it
  const lost = seen.damaged.flatMap((damaged, index) => (damaged ? [index + 1] : []));
  if (lost.length === 0) return seen;
  const message = `copy ${lost.join(' and ')} of the key area cannot be read back`;
  throw new PqblkError('io_error', message, {
    operation: 'verify key area',
    hint:
      'the medium fails; nothing is lost as long as the other copy can be read: move the disk to a sound ' +
      'medium, then run the same command again there',
  });
}

/** Second keys prove themselves by opening the same master key through slots of their own. */
async function approve(
  editor: KeyAreaEditor,
  blob: Uint8Array,
  { identity, approvers = [], policy }: ChangeKeyAreaOptions,
): Promise<string[]> {
  const approved = new Set<string>();
  for (const approver of approvers) {
    requireApprover(await editor.opensFor(blob, approver), policy);
    approved.add(toHex(approver.fingerprint));
  }
  approved.delete(toHex(identity.fingerprint)); // nobody approves his own request
  return [...approved];
}

/** Whose key is on its way out approves nothing. */
export function requireApprover(slot: SlotDescription, policy: Policy | undefined): void {
  if (policy) requireOpenable(policy, slot);
  if (slot.state === 'active') return;
  throw new PqblkError('policy', `slot ${slot.index} ("${slot.label}") is ${slot.state}`, {
    operation: 'approve',
    hint: 'a key with an active slot approves',
  });
}

/** The policy allows it, the audit log that is kept will have it, and no unknown key is sealed to. */
function requirePermitted(
  editor: KeyAreaEditor,
  before: readonly SlotDescription[],
  approvedBy: readonly string[],
  { operation, policy, audit, trusted }: ChangeKeyAreaOptions,
): void {
  if (audit === undefined && editor.audit.lines > 0) {
    throw new PqblkError('policy', `this disk keeps an audit log of ${editor.audit.lines} lines`, {
      operation: 'change key area',
      hint: 'name it with --audit',
    });
  }
  const after = editor.slots;
  const { rotatesMasterKey } = editor;
  const log = { audited: audit !== undefined, restartsAudit: audit?.restarts };
  const question = { operation, before, after, approvedBy, rotatesMasterKey, ...log };
  if (policy) requireAllowed(policy, question);
  requireTrusted(editor.sealedFromImage, new Set([...(trusted ?? []), ...(policy?.trusted ?? [])]));
}

function requireTrusted(slots: readonly SlotDescription[], trusted: ReadonlySet<string>): void {
  const unknown = slots.filter(({ fingerprint }) => !trusted.has(fingerprint));
  if (unknown.length === 0) return;
  const names = unknown.map((slot) => `"${slot.label}" ${slot.fingerprint}`).join(', ');
  throw new PqblkError(
    'policy',
    `only the image says that ${unknown.length === 1 ? 'this key belongs' : 'these keys belong'} ` +
      `to who may open the disk: ${names}`,
    {
      operation: 'check keys',
      hint: 'compare the fingerprint with its owner, then --trust it or import the public key',
    },
  );
}

/** A wrong file in the place of the last good key would be noticed when nobody can open the disk. */
function requireTestable(editor: KeyAreaEditor, options: ChangeKeyAreaOptions): void {
  if (!editor.changed || options.untested || testersOf(editor, options).length > 0) return;
  throw new PqblkError('policy', 'no key that is at hand would open the disk any more', {
    operation: 'test key area',
    hint:
      'open it with a key that stays, or let the new key be tested (--new-passphrase-file); --force, ' +
      'where the command has it, does it untested',
  });
}

/** Keys that must open the result: all that are at hand, but those that it is to end. */
function testersOf(
  editor: KeyAreaEditor,
  { identity, approvers = [], testers = [] }: ChangeKeyAreaOptions,
): Identity[] {
  const live = editor.slots.filter(({ state }) => state !== 'revoked');
  const remains = (key: Identity) =>
    live.some(({ fingerprint }) => fingerprint === toHex(key.fingerprint));
  return [...[identity, ...approvers].filter(remains), ...testers];
}

/** The new key area opens, for whoever changes it and for the keys that are to be tested. */
async function requireOpens(
  { blob, observed }: SealedKeyArea,
  editor: KeyAreaEditor,
  options: ChangeKeyAreaOptions,
): Promise<void> {
  for (const tester of testersOf(editor, options)) {
    using opened = await openKeyArea(blob, tester, { expectedVolumeUuid: observed.volumeUuid });
    if (equalConstantTime(opened.vmkCheck, observed.vmkCheck)) continue;
    throw new PqblkError('integrity', 'the new key area opens another master key');
  }
}

function stateOf(seen: Observed, slots: readonly SlotDescription[]): KeyAreaState {
  return { generation: seen.generation, vmkCheck: toHex(seen.vmkCheck), slots };
}

function plannedState(editor: KeyAreaEditor): KeyAreaState {
  const { vmkCheck } = editor.observed;
  return {
    generation: editor.nextGeneration,
    vmkCheck: editor.rotatesMasterKey ? undefined : toHex(vmkCheck),
    slots: editor.slots,
  };
}
