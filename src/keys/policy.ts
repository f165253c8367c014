// Room keys/: what a security team demands of every disk: which keys, how many slots, whose word.
//
// A policy is checked against the slots that a change would leave; what is wrong already may stay, or
// nobody could mend a disk step by step, but nothing may get worse. It binds whoever uses this program
// and not whoever holds a key and another program. Reading the file is the command line's business.
import { dirname, resolve } from 'node:path';
import { PqblkError } from '../errors.js';
import type { SlotDescription } from './key-area-describe.js';
import { Kem, kemByName } from './ml-kem.js';

/** What is done to a key area, as policies and the audit log name it. */
export const OPERATIONS = [
  'create',
  'slot-add',
  'slot-retire',
  'slot-activate',
  'slot-revoke',
  'rewrap',
  'rotate-master-key',
  'rotate-data-key',
  'header-restore',
  'audit-restart',
] as const;
export type KeyOperation = (typeof OPERATIONS)[number];

export interface Policy {
  /** Names of KEMs that slots may have; undefined: any. */
  readonly kems?: readonly string[] | undefined;
  /** Active slots, at least. */
  readonly minimumSlots: number;
  /** An active slot of role recovery must remain. */
  readonly recoverySlot: boolean;
  /** Days since a key got its slot. */
  readonly maximumKeyAgeDays?: number | undefined;
  /** Slots with and without X25519 beside ML-KEM on one disk. */
  readonly mixedKems: 'allow' | 'refuse';
  /** Opening through a slot that is past its date, or older than `maximumKeyAgeDays`. */
  readonly expiredSlots: 'warn' | 'refuse';
  /** Fingerprints, hex, of keys that slots may be sealed to whoever else does not know them. */
  readonly trusted: readonly string[];
  /** Operations that a second person must approve with a key of the same disk. */
  readonly twoPersons: readonly KeyOperation[];
  /** Directory of audit logs, one for each volume; demanded when it is named. Absolute. */
  readonly auditDirectory?: string | undefined;
}

export interface Violation {
  readonly rule: string;
  /** The slot and its key, or undefined for the disk as a whole. */
  readonly slot?: number;
  readonly fingerprint?: string;
  /** How far from the rule: more is worse. */
  readonly measure: number;
  readonly message: string;
}

const DAY = 86_400_000;

/** Everything about these slots that the policy does not allow. `now` in milliseconds since 1970. */
export function violations(
  policy: Policy,
  slots: readonly SlotDescription[],
  now = Date.now(),
): Violation[] {
  const active = slots.filter((slot) => slot.state === 'active');
  const found: Violation[] = [];
  const missing = policy.minimumSlots - active.length;
  if (missing > 0) {
    const message = `${active.length} active slots, at least ${policy.minimumSlots} demanded`;
    found.push({ rule: 'minimum-slots', measure: missing, message });
  }
  if (policy.recoverySlot && !active.some((slot) => slot.role === 'recovery')) {
    found.push({ rule: 'recovery-slot', measure: 1, message: 'no active recovery slot' });
  }
  const others = withoutX25519(slots);
  const hybrid = active.length - others;
  if (policy.mixedKems === 'refuse' && hybrid > 0 && others > 0) {
    const message = `${hybrid} of ${active.length} active slots are hybrid: all or none demanded`;
    found.push({ rule: MIXED, measure: others, message });
  }
  for (const slot of active) found.push(...slotViolations(policy, slot, now));
  return found;
}

const MIXED = 'mixed-kems';

const withoutX25519 = (slots: readonly SlotDescription[]) =>
  slots.filter(({ state, kem }) => state === 'active' && kemByName(kem).id !== Kem.xWing).length;

function slotViolations(policy: Policy, slot: SlotDescription, now: number): Violation[] {
  const found: Violation[] = [];
  const say = (rule: string, what: string) =>
    found.push({
      rule,
      slot: slot.index,
      fingerprint: slot.fingerprint,
      measure: 1,
      message: `slot ${slot.index} ("${slot.label}") ${what}`,
    });
  if (policy.kems && !policy.kems.includes(slot.kem)) {
    say('kem', `uses ${slot.kem}, allowed: ${policy.kems.join(', ')}`);
  }
  const { maximumKeyAgeDays: days } = policy;
  if (days !== undefined && now > Date.parse(slot.created) + days * DAY) {
    say(
      'key-age',
      `has had its key since ${slot.created.slice(0, 10)}, at most ${days} days allowed`,
    );
  }
  if (slot.notAfter !== undefined && now > Date.parse(slot.notAfter)) {
    say('not-after', `is past its date, ${slot.notAfter.slice(0, 10)}`);
  }
  return found;
}

export interface PolicyQuestion {
  readonly operation: KeyOperation;
  /** Undefined: the disk is being made. */
  readonly before: readonly SlotDescription[] | undefined;
  readonly after: readonly SlotDescription[];
  /** Fingerprints of second keys that opened the disk. */
  readonly approvedBy: readonly string[];
  readonly audited: boolean;
  readonly rotatesMasterKey?: boolean | undefined;
  /** A new audit log takes the place of a lost one. */
  readonly restartsAudit?: boolean | undefined;
}

/**
 * What a change amounts to, whatever it is called: a rewrap to another key revokes one and adds one, and
 * a rotation of the master key revokes what was retired.
 */
function operationsIn(question: PolicyQuestion): Set<KeyOperation> {
  const { operation, before, after, rotatesMasterKey, restartsAudit } = question;
  const found = new Set<KeyOperation>([operation]);
  if (rotatesMasterKey) found.add('rotate-master-key');
  if (restartsAudit) found.add('audit-restart');
  if (before === undefined) return found;
  const in_ = (slots: readonly SlotDescription[], states: readonly string[]) =>
    new Set(slots.filter(({ state }) => states.includes(state)).map((slot) => slot.fingerprint));
  const live = ['active', 'decrypt-only'];
  const [liveBefore, liveAfter] = [in_(before, live), in_(after, live)];
  const [activeBefore, activeAfter] = [in_(before, ['active']), in_(after, ['active'])];
  for (const key of liveBefore) {
    if (!liveAfter.has(key)) found.add('slot-revoke');
    else if (activeBefore.has(key) && !activeAfter.has(key)) found.add('slot-retire');
    else if (!activeBefore.has(key) && activeAfter.has(key)) found.add('slot-activate');
  }
  for (const key of liveAfter) if (!liveBefore.has(key)) found.add('slot-add');
  return found;
}

/** Kind `policy` unless this change is allowed. */
export function requireAllowed(policy: Policy, question: PolicyQuestion): void {
  const { operation, before, after, approvedBy, audited } = question;
  const operations = operationsIn(question);
  const refused = (message: string, hint?: string) =>
    new PqblkError('policy', message, { operation: `policy on ${operation}`, hint });
  if (policy.auditDirectory !== undefined && !audited) {
    throw refused('an audit log is demanded');
  }
  const restricted = policy.twoPersons.find((one) => operations.has(one));
  if (restricted !== undefined && approvedBy.length === 0) {
    const what = restricted === operation ? 'this' : `this, which amounts to ${restricted}`;
    throw refused(`a second person has to approve ${what}`, 'name the second key with --approve');
  }
  // What a key is excused for is not passed on with its slot.
  const key = ({ rule, fingerprint }: Pick<Violation, 'rule' | 'fingerprint'>) =>
    `${rule} ${fingerprint ?? ''}`;
  const formerly = before === undefined ? [] : violations(policy, before);
  const known = new Map(formerly.map((violation) => [key(violation), violation.measure]));
  // Slots are moved one by one: each time fewer are left of the others.
  const mixed = key({ rule: MIXED });
  if (before && !known.has(mixed)) known.set(mixed, withoutX25519(before) - 1);
  const worse = violations(policy, after).filter(
    (violation) => violation.measure > (known.get(key(violation)) ?? 0),
  );
  if (worse.length > 0) throw refused(worse.map(({ message }) => message).join('; '));
}

/** Kind `key_expired` when the slot is out of date and the policy refuses to open through it. */
export function requireOpenable(policy: Policy, slot: SlotDescription): void {
  const rules = ['key-age', 'not-after'];
  const stale = slotViolations(policy, slot, Date.now()).find(({ rule }) => rules.includes(rule));
  if (!stale || policy.expiredSlots !== 'refuse') return;
  throw new PqblkError('key_expired', stale.message, {
    operation: 'policy on opening',
    hint: 'open it with another key, then `pqblk rewrap` this slot to a new one',
  });
}

// ---- reading ---------------------------------------------------------------------------------------

const VERSION = 1;
const FIELDS = [
  'version',
  'kems',
  'minimumSlots',
  'recoverySlot',
  'maximumKeyAgeDays',
  'mixedKems',
  'expiredSlots',
  'trusted',
  'twoPersons',
  'auditDirectory',
];

/**
 * A policy from the document in its file. A field that is not known is an error: a rule that nobody
 * checks would look like one. Kinds `invalid_argument`, `newer_version`.
 */
export function parsePolicy(document: unknown, path?: string): Policy {
  const fail = (message: string, hint?: string): never => {
    throw new PqblkError('invalid_argument', `policy: ${message}`, { path, hint });
  };
  if (typeof document !== 'object' || document === null || Array.isArray(document)) {
    return fail('not a mapping of fields');
  }
  const fields = document as Record<string, unknown>;
  if (fields.version !== VERSION) {
    throw new PqblkError(
      typeof fields.version === 'number' ? 'newer_version' : 'invalid_argument',
      `policy: version ${JSON.stringify(fields.version)}, expected ${VERSION}`,
      { path },
    );
  }
  const unknown = Object.keys(fields).find((name) => !FIELDS.includes(name));
  if (unknown !== undefined) fail(`unknown field ${JSON.stringify(unknown)}`);
  const count = (name: string): number | undefined => {
    const value = fields[name];
    if (value === undefined) return undefined;
    if (Number.isSafeInteger(value) && (value as number) >= 0) return value as number;
    return fail(`${name}: expected a number from 0 on`);
  };
  const choice = <T extends string>(name: string, allowed: readonly T[]): T => {
    const value = fields[name] ?? allowed[0];
    return allowed.find((one) => one === value) ?? fail(`${name}: one of ${allowed.join(', ')}`);
  };
  const list = (
    name: string,
    fits: (text: string) => boolean,
    expected: string,
  ): string[] | undefined => {
    const value = fields[name];
    if (value === undefined) return undefined;
    const texts = Array.isArray(value) ? value : fail(`${name}: expected a list`);
    const wrong = texts.find((text) => typeof text !== 'string' || !fits(text));
    if (wrong === undefined) return texts as string[];
    const hint = wrong === UNAPPROVABLE ? NO_SECOND_KEY : undefined;
    return fail(`${name}: found ${JSON.stringify(wrong)}, expected ${expected}`, hint);
  };
  const isKem = (name: string) => Object.values(Kem).some((id) => id === idOf(name));
  const flag = fields.recoverySlot ?? false;
  if (typeof flag !== 'boolean') fail('recoverySlot: expected true or false');
  const directory = fields.auditDirectory;
  if (directory !== undefined && typeof directory !== 'string')
    return fail('auditDirectory: a path');
  return {
    kems: list('kems', isKem, 'names of KEMs, as `pqblk key gen --kem` takes them')?.map(
      (name) => kemByName(name).name,
    ),
    minimumSlots: count('minimumSlots') ?? 1,
    recoverySlot: flag as boolean,
    maximumKeyAgeDays: count('maximumKeyAgeDays'),
    mixedKems: choice('mixedKems', ['allow', 'refuse']),
    expiredSlots: choice('expiredSlots', ['warn', 'refuse']),
    trusted: (list('trusted', isFingerprint, 'fingerprints of 64 hex digits') ?? []).map((text) =>
      text.toLowerCase(),
    ),
    twoPersons: (list('twoPersons', isApprovable, APPROVABLE.join(', ')) ?? []) as KeyOperation[],
    auditDirectory: directory === undefined ? undefined : resolve(dirname(path ?? '/'), directory),
  };
}

const isFingerprint = (text: string) => /^[0-9a-f]{64}$/i.test(text);

/** It ends no key, and the disk that would know a second one is not there. */
const UNAPPROVABLE: KeyOperation = 'create';
const NO_SECOND_KEY =
  'leave it out: a disk that is being made has no keys yet that could approve, and its first ones are ' +
  'judged by the other rules; slot-add covers those that come later';
const APPROVABLE = OPERATIONS.filter((operation) => operation !== UNAPPROVABLE);
const isApprovable = (text: string) => APPROVABLE.some((operation) => operation === text);

function idOf(name: string): number | undefined {
  try {
    return kemByName(name).id;
  } catch {
    return undefined;
  }
}
