// Room keys/: the two copies of a key area, and which of them counts.
//
// Checksum and number of a copy are under no key: whoever can write the file can put an old copy back
// and call it the newest. What counts is the generation inside, which the MAC covers. So the copies are
// tried in the order of what they say of themselves, and one that key, MAC or pin refuse makes room for
// the other: at once where it is plainly false, else only where the pin of this host knows the other.
import { PqblkError } from '../errors.js';
import { equalConstantTime, toHex } from './bytes.js';
import { generationIn, parseKeyArea } from './key-area-codec.js';
import {
  confirms,
  type Observed,
  type Pin,
  type PinOptions,
  type Pins,
  type PinVerdict,
} from './pins.js';

/** 0 and 1 are A and B of docs/format.md. */
export type CopyIndex = 0 | 1;

/** One copy as it lies on the disk. */
export interface KeyAreaCopy {
  /** 64 KiB; empty: its checksum does not hold. */
  readonly blob: Uint8Array;
  /** The generation of its blob, says a head that nothing vouches for. */
  readonly number: bigint;
}

/** Both copies of a key area. */
export interface KeyAreaCopies {
  readonly volumeUuid: Uint8Array;
  readonly copies: readonly [KeyAreaCopy, KeyAreaCopy];
  /** The whole ones, that first which says that it is the newest. */
  readonly order: readonly CopyIndex[];
  /** The first of them, 64 KiB; empty when both copies are damaged. */
  readonly blob: Uint8Array;
  /** Of copy A and B. */
  readonly damaged: readonly [boolean, boolean];
  /** Both are whole and not the same. */
  readonly differ: boolean;
  /** What is wrong, for people, as far as it can be seen without a key. */
  readonly findings: readonly string[];
  /** Another one once either copy has changed. */
  readonly state: Uint8Array;
}

/** Where a key area lies and who may replace it. */
export interface KeyAreaPlace {
  read(): Promise<KeyAreaCopies>;
  /** Throws what writing now would throw, and changes nothing. */
  probe(expected: Uint8Array): Promise<void>;
  /**
   * Makes one copy `blob`, durably. Kind `locked` when somebody else has the disk, or changed a copy
   * since the state `expected` was read.
   */
  write(index: CopyIndex, blob: Uint8Array, expected: Uint8Array): Promise<void>;
  /**
   * The pins of who serves the disk, unless they are `pins`: he opens the disk again as it will be. To be
   * told as one's own are: announce before the first copy is written, record after both.
   */
  readonly follower?: PinFollower | undefined;
}

/** Somebody else on this host who remembers the volume. */
export interface PinFollower {
  /** Kinds as Pins.hold; nobody else changes his pin until `record`, or until the connection ends. */
  announce(seen: Observed, next: Observed, pins: Pins | undefined): Promise<void>;
  record(seen: Observed): Promise<void>;
}

/** What is on the disk, put in order. */
export function orderCopies(
  volumeUuid: Uint8Array,
  copies: readonly [KeyAreaCopy, KeyAreaCopy],
  state: Uint8Array,
): KeyAreaCopies {
  const [a, b] = copies;
  const damaged = [isDamaged(a, volumeUuid), isDamaged(b, volumeUuid)] as const;
  const order = ([0, 1] as const).filter((index) => !damaged[index]);
  if (order.length === 2 && isNewer(b, a)) order.reverse();
  const [first] = order;
  const blob = first === undefined ? new Uint8Array(0) : copies[first].blob;
  const differ = order.length === 2 && !equalConstantTime(a.blob, b.blob);
  const found = { volumeUuid, copies, order, blob, damaged, differ, state };
  return { ...found, findings: findingsIn(found) };
}

/** What no key needs to be tried on: no checksum, no key area, or one of another volume. */
function isDamaged({ blob }: KeyAreaCopy, volumeUuid: Uint8Array): boolean {
  if (blob.length === 0) return true;
  try {
    return !equalConstantTime(parseKeyArea(blob).head.volumeUuid, volumeUuid);
  } catch (error) {
    return !(error instanceof PqblkError && error.kind === 'newer_version');
  }
}

function isNewer(one: KeyAreaCopy, other: KeyAreaCopy): boolean {
  const [mine, its] = [generationIn(one.blob), generationIn(other.blob)];
  return mine === its ? one.number > other.number : mine > its;
}

const isMisnumbered = ({ blob, number }: KeyAreaCopy) =>
  blob.length > 0 && generationIn(blob) !== number;

function findingsIn({ copies, damaged, differ }: Omit<KeyAreaCopies, 'findings'>): string[] {
  const findings: string[] = [];
  for (const [index, copy] of copies.entries()) {
    const name = `copy ${index + 1} of the key area`;
    if (damaged[index]) findings.push(`${name} is damaged`);
    else if (isMisnumbered(copy)) {
      findings.push(`${name} has number ${copy.number} and generation ${generationIn(copy.blob)}`);
    }
  }
  if (differ) {
    findings.push(
      'the copies of the key area differ: a change of keys was cut short, or an older copy put back',
    );
  }
  return findings;
}

/** A copy that key, MAC or pin refused although it says that it is the newest. */
export interface Refusal {
  readonly index: CopyIndex;
  readonly error: PqblkError;
  /** It may be true all the same: of a change elsewhere. */
  readonly contested: boolean;
  /** Somebody has given his word that its sister is the one. */
  readonly confirmed: boolean;
}

export interface Chosen<T> {
  readonly opened: T;
  readonly index: CopyIndex;
  readonly refused: Refusal | undefined;
}

/** Refusals that a copy must earn by being false, if its sister opens with the same key. */
const FALSE = new Set(['key_area_damaged', 'wrong_key', 'uuid_mismatch']);
/**
 * Refusals that an honest successor may earn as well. One that opens, under a master key that this host does
 * not know, shows what was rotated elsewhere, or what a former key can still make: only a human can tell.
 */
const CONTESTED = new Set(['vmk_changed', 'no_slot', 'slot_revoked', 'newer_version']);

/** Whether an error says that a copy is plainly false: an honest one never earns it. */
export const isPlainlyFalse = ({ kind }: PqblkError) => FALSE.has(kind);
/** Whether an error says that a copy does not open, and that it may be true all the same. */
export const isContested = ({ kind }: PqblkError) => CONTESTED.has(kind);

export interface OpenNewest<T> extends PinOptions {
  readonly pins: Pins | undefined;
  readonly open: (blob: Uint8Array) => Promise<T>;
  readonly observe: (opened: T) => Observed;
}

/**
 * Opens the copy that counts: of those that are authentic, and that the pin accepts, the one of the
 * highest generation. Kinds: those of `open` and of Pins.check; `key_area_damaged`.
 */
export async function openNewest<T extends Disposable>(
  copies: KeyAreaCopies,
  options: OpenNewest<T>,
): Promise<Chosen<T>> {
  requireReadable(copies);
  const pin = await options.pins?.get(copies.volumeUuid);
  const refusals: Refusal[] = [];
  for (const index of copies.differ ? copies.order : copies.order.slice(0, 1)) {
    const { blob } = copies.copies[index];
    const tried = await tryCopy(blob, options);
    if ('error' in tried) {
      const { error } = tried;
      refusals.push({ index, error, contested: CONTESTED.has(error.kind), confirmed: false });
      continue;
    }
    const [refused] = refusals;
    if (!refused) return { opened: tried.opened, index, refused };
    const check = toHex(options.observe(tried.opened).vmkCheck);
    const confirmed = confirms(check, options.confirmVmk);
    if (givesWay(refused, copies, pin, tried.verdict, confirmed)) {
      return { opened: tried.opened, index, refused: { ...refused, confirmed } };
    }
    tried.opened[Symbol.dispose]();
    if (refused.error.kind === 'vmk_changed') throw eitherOf(refused, index, check);
  }
  const telling = refusals.find(({ error }) => !FALSE.has(error.kind)) ?? refusals[0];
  throw (telling as Refusal).error;
}

type Tried<T> = { opened: T; verdict: PinVerdict } | { error: PqblkError };

/** Errors that say nothing of the copy (a token that was pulled, say) are thrown. */
async function tryCopy<T extends Disposable>(
  blob: Uint8Array,
  { pins, open, observe, ...accepted }: OpenNewest<T>,
): Promise<Tried<T>> {
  let opened: T | undefined;
  try {
    opened = await open(blob);
    const verdict = (await pins?.check(observe(opened), accepted)) ?? 'new';
    return { opened, verdict };
  } catch (error) {
    opened?.[Symbol.dispose]();
    if (!(error instanceof PqblkError)) throw error;
    if (!FALSE.has(error.kind) && !CONTESTED.has(error.kind) && error.kind !== 'rollback') {
      throw error;
    }
    return { error };
  }
}

/** Two copies that open, with two master keys. */
function eitherOf({ index, error }: Refusal, sister: CopyIndex, check: string): PqblkError {
  const back =
    `if copy ${index + 1} of the key area is nobody's doing, \`pqblk check --repair --confirm-vmk ${check}\` ` +
    `goes back to copy ${sister + 1}, should all sectors open with it`;
  return new PqblkError(error.kind, error.message, {
    operation: error.operation,
    hint: `${error.hint}; ${back}`,
    cause: error,
  });
}

/** Whether a copy that says that it is the newest is passed over for its sister, which opened. */
function givesWay(
  { index, error }: Refusal,
  { copies }: KeyAreaCopies,
  pin: Pin | undefined,
  verdict: PinVerdict,
  confirmed: boolean,
): boolean {
  if (FALSE.has(error.kind)) return true;
  // A change of this very host that was cut short: it has ended the key that was tried.
  const announced = pin?.announced?.generation;
  if (announced !== undefined && generationIn(copies[index].blob) === BigInt(announced)) {
    return false;
  }
  if (confirmed) return true;
  return error.kind !== 'vmk_changed' && (verdict === 'same' || verdict === 'newer');
}

/** What the findings of the copies are, once one of them was opened. */
export function findingsOf(
  copies: KeyAreaCopies,
  { refused }: Pick<Chosen<unknown>, 'refused'>,
): readonly string[] {
  if (!refused) return copies.findings;
  const { index, error } = refused;
  const what = `copy ${index + 1} of the key area says that it is the newest, and was passed over: `;
  return [...copies.findings, what + error.message];
}

/**
 * A change begins at the copy that counts only if its sister is known to be false: undoing what somebody
 * else did elsewhere wants a word of its own. Throws what refused the sister.
 */
export function requireUncontested({ refused }: Pick<Chosen<unknown>, 'refused'>): void {
  if (!refused?.contested) return;
  const { index, error } = refused;
  throw new PqblkError(
    error.kind,
    `copy ${index + 1} of the key area says that it is newer than the one that this host knows: ` +
      error.message,
    {
      operation: 'change key area',
      hint:
        'if keys were changed elsewhere, have that run again there; if not, `pqblk check --repair ' +
        '--confirm-vmk …`, with the check value of `pqblk pin list`, puts the copy that this host knows ' +
        'in its place',
    },
  );
}

export function requireReadable({ blob }: KeyAreaCopies): void {
  if (blob.length > 0) return;
  throw new PqblkError('key_area_damaged', 'both copies of the key area are damaged', {
    hint: 'restore them from a header backup',
  });
}

/** A copy is damaged, another one than its sister, or misnumbered. */
export const needsMending = ({ findings }: Pick<KeyAreaCopies, 'findings'>) => findings.length > 0;

/** Makes the sister of a copy the same, and then the number of the copy itself right. */
export async function mendCopies(
  place: KeyAreaPlace,
  copies: KeyAreaCopies,
  index: CopyIndex,
): Promise<void> {
  const { blob } = copies.copies[index];
  const sister = sisterOf(index);
  let { state } = copies;
  if (copies.damaged[sister] || copies.differ || isMisnumbered(copies.copies[sister])) {
    await place.write(sister, blob, state);
    ({ state } = await place.read());
  }
  if (isMisnumbered(copies.copies[index])) await place.write(index, blob, state);
}

export const sisterOf = (index: CopyIndex): CopyIndex => (index === 0 ? 1 : 0);
