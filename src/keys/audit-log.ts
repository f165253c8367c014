// Room keys/: the audit log of one volume: who changed its keys, when, and how.
//
// One line of JSON for each change, each with the hash of the line before it; the key area, which only
// a key holder can make, has the number and the hash of the last one. A line is written before the key
// area that counts it, so a log may be ahead by changes that did not come about: those are of the
// generation that follows the key area's, or restores of a backup, and no others. Lines name keys by
// fingerprint and hold no secret.
import { constants } from 'node:fs';
import { access, type FileHandle, open, rm } from 'node:fs/promises';
import { hostname } from 'node:os';
import { dirname } from 'node:path';
import { fromSystem, PqblkError } from '../errors.js';
import { ascii, formatUuid, toHex } from './bytes.js';
import { sha3_256 } from './hash.js';
import type { AuditLine, AuditRemarks, AuditSubject, AuditTrail } from './key-area-change.js';
import type { AuditHead, SlotDescription } from './key-area-describe.js';
import { takeLock } from './lock-file.js';
import { type Who, whoAsks } from './who.js';

const NO_LINE = '00'.repeat(32);
/** About 60,000 changes of keys. */
const LOG_BYTES_MAX = 64 * 2 ** 20;

export interface AuditSlot {
  readonly index: number;
  readonly label: string;
  readonly role: string;
  readonly kem: string;
  readonly fingerprint: string;
  readonly from: string;
  readonly to: string;
}

export interface AuditRecord extends Who {
  /** From 1. */
  readonly line: number;
  /** ISO 8601, UTC. */
  readonly time: string;
  readonly host: string;
  readonly volume: string;
  readonly operation: string;
  /** Of the key area that the operation makes. */
  readonly generation: number;
  readonly unlockedBy: string;
  readonly approvedBy: readonly string[];
  readonly slots: readonly AuditSlot[];
  /** `begun`; another line says so when it failed. */
  readonly result: string;
  /** SHA3-256 of the line before, without its end, hex; zeros in the first one. */
  readonly previous: string;
  /**
   * In the first line of a log that takes the place of a lost one: lines that the key area counted;
   * `previous` is then the hash of the last of them.
   */
  readonly formerLines?: number;
  /** So many lines before this one are of changes that did not come about. */
  readonly uncounted?: number;
  /**
   * A header backup was put back: it counts so many lines, and what the others did is undone. Without
   * `uncounted` no key area could be asked whether it was done at all.
   */
  readonly restoredFrom?: number;
  readonly rotation?: AuditRemarks;
}

/**
 * Whether what a line says came about, did not, or did until an older key area was put back. `unknown`: not, or
 * until then.
 */
export type AuditStanding = 'counted' | 'uncounted' | 'undone' | 'unknown';

export interface AuditReport {
  readonly lines: number;
  /** Lines after the last one that the key area counts: changes that did not come about. */
  readonly beyond: number;
  /** Empty: the log is whole. */
  readonly findings: readonly string[];
  readonly records: readonly AuditRecord[];
  /** Of each record. */
  readonly standings: readonly AuditStanding[];
  /** Lines of a former log that this one took the place of. */
  readonly lost: number;
}

const hashOf = (line: string) => toHex(sha3_256(ascii(line)));

interface Content {
  readonly lines: readonly string[];
  /** Bytes of whole lines. */
  readonly length: number;
  /** Something follows the last line: a write that was cut short. */
  readonly torn: boolean;
}

function split(text: string): Content {
  const end = text.lastIndexOf('\n') + 1;
  const lines = end === 0 ? [] : text.slice(0, end - 1).split('\n');
  return { lines, length: Buffer.byteLength(text.slice(0, end)), torn: end < text.length };
}

/** Compares a log with the key area of its volume, line by line. */
export function verifyAuditLog(
  text: string,
  volume: string,
  known: AuditHead,
  generation: number,
): AuditReport {
  const { lines, torn } = split(text);
  const findings: string[] = [];
  const records: AuditRecord[] = [];
  const counted = known.lines;
  let previous = NO_LINE;
  let last = 0;
  lines.forEach((line, index) => {
    const record = parseRecord(line);
    if (!record) {
      findings.push(`line ${index + 1} is no record`);
    } else {
      records.push(record);
      if (record.line !== index + 1) findings.push(`line ${index + 1} has number ${record.line}`);
      if (record.previous !== previous && !beginsAnew(record)) {
        findings.push(`line ${index + 1} does not follow the line before it`);
      }
      if (record.volume !== volume) findings.push(`line ${index + 1} is of another volume`);
      const back = record.generation < last && !follows(last, record.generation);
      if (back && record.restoredFrom === undefined)
        findings.push(`line ${index + 1} goes back in generation`);
      if (index >= counted && !isAttempt(record, generation)) {
        findings.push(
          `line ${index + 1} is not counted by the key area (generation ${generation}) and made ` +
            `generation ${record.generation}: the key area is older than the log`,
        );
      }
      last = record.generation;
    }
    previous = hashOf(line);
    if (index + 1 === counted && previous !== known.hash) {
      findings.push(`line ${index + 1} is not the one that the key area knows`);
    }
  });
  if (lines.length < counted) {
    findings.push(`${lines.length} lines, and the key area counts ${counted}: lines were removed`);
  }
  if (torn && lines.length < counted) findings.push('the last line is cut short');
  const standings = standingsOf(records, counted);
  findings.push(...contradictions(records, standings));
  const beyond = Math.max(0, lines.length - counted);
  const lost = records[0]?.formerLines ?? 0;
  return { lines: lines.length, beyond, findings, records, standings, lost };
}

/**
 * What is counted by number need not have come about: a later line says of earlier ones that they did not, or
 * are undone. Of a line that is undone itself the latter is not so any more.
 */
function standingsOf(records: readonly AuditRecord[], counted: number): AuditStanding[] {
  const standings = records.map(
    ({ line }): AuditStanding => (line <= counted ? 'counted' : 'uncounted'),
  );
  const mark = (from: number, to: number, standing: AuditStanding, of: AuditStanding[]) => {
    for (const [at, { line }] of records.entries()) {
      const former = standings[at] as AuditStanding;
      if (line > from && line < to && of.includes(former)) standings[at] = standing;
    }
  };
  for (const [at, { line, uncounted, restoredFrom }] of [...records.entries()].reverse()) {
    const standing = standings[at];
    if (standing !== 'counted' && standing !== 'undone') continue;
    if (uncounted) mark(line - 1 - uncounted, line, 'uncounted', ['counted', 'undone']);
    if (restoredFrom === undefined) continue;
    const known = uncounted !== undefined;
    if (standing === 'counted') mark(restoredFrom, line, known ? 'undone' : 'unknown', ['counted']);
    else if (!known) mark(restoredFrom, line, 'unknown', ['undone']); // and nobody found out later
  }
  return standings;
}

/** One change makes a generation. */
function contradictions(
  records: readonly AuditRecord[],
  standings: readonly AuditStanding[],
): string[] {
  const makers = new Map<number, number>();
  return records.flatMap(({ line, generation, result }, at) => {
    if (standings[at] !== 'counted' || result !== 'begun') return [];
    if (generation === 1 && makers.has(Number.MAX_SAFE_INTEGER)) makers.clear();
    const other = makers.get(generation);
    makers.set(generation, line);
    return other === undefined
      ? []
      : [`lines ${other} and ${line} both claim to have made generation ${generation}`];
  });
}

/** The former log is lost; what its last line was is known from the key area, and not to whoever verifies. */
const beginsAnew = (record: AuditRecord | undefined) =>
  record?.line === 1 && (record.formerLines ?? 0) > 0;

/** Under a new master key the highest generation is followed by the first. */
const follows = (generation: number, next: number) =>
  next === generation + 1 || (generation === Number.MAX_SAFE_INTEGER && next === 1);

/** A change that did not come about, or its failure after the key area had it. */
function isAttempt(record: AuditRecord, generation: number): boolean {
  if (follows(generation, record.generation)) return true;
  // It would have followed the generation of the backup.
  if (record.operation === 'header-restore') return record.generation <= generation;
  return record.generation === generation && record.result.startsWith('failed');
}

const TEXTS = [
  ...(['time', 'user', 'host', 'volume', 'operation', 'unlockedBy', 'result'] as const),
  'previous',
] as const;
const SLOT_TEXTS = ['label', 'fingerprint', 'from', 'to'] as const;

const isText = (value: unknown) => typeof value === 'string';

function areAll<T>(values: readonly T[] | undefined, fits: (value: T) => boolean): boolean {
  return Array.isArray(values) && values.every(fits);
}

function parseRecord(line: string): AuditRecord | undefined {
  try {
    const value = JSON.parse(line) as Partial<AuditRecord> | null;
    const whole =
      value !== null &&
      [value.line, value.generation].every(Number.isSafeInteger) &&
      TEXTS.every((name) => isText(value[name])) &&
      areAll(value.approvedBy, isText) &&
      areAll(value.slots, (slot) => SLOT_TEXTS.every((name) => isText(slot?.[name])));
    return whole ? (value as AuditRecord) : undefined;
  } catch {
    return undefined;
  }
}

/** The text of a log; kind `audit_log` when there is none, or it cannot be read. */
export async function readAuditLog(path: string): Promise<string> {
  let file: FileHandle | undefined;
  try {
    file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
    return await textOf(file, path);
  } catch (error) {
    throw unreachable(error, { path, operation: 'read audit log' });
  } finally {
    await file?.close();
  }
}

/** Scripts shall know that it is the log: one kind, whatever is in the way of reading or writing it. */
function unreachable(
  error: unknown,
  details: { path: string; operation: string; hint?: string },
): PqblkError {
  const ours = ['audit_log', 'audit_broken', 'locked'];
  if (error instanceof PqblkError && ours.includes(error.kind)) return error;
  const { message, hint = details.hint } = fromSystem(error);
  return new PqblkError('audit_log', message, { ...details, hint, cause: error });
}

/** Kind `audit_log` (a device or a pipe, which may have no end; too long). */
async function textOf(file: FileHandle, path: string): Promise<string> {
  const details = { path, operation: 'read audit log' };
  const stats = await file.stat();
  if (!stats.isFile()) {
    throw new PqblkError('audit_log', 'an audit log is a regular file', details);
  }
  if (stats.size > LOG_BYTES_MAX) {
    const message = `the audit log has ${stats.size} bytes: begin a new one`;
    throw new PqblkError('audit_log', message, details);
  }
  return await file.readFile('utf8');
}

interface OpenLog {
  readonly file: FileHandle;
  /** There was none. */
  readonly made: boolean;
}

/** Of a file that was to be made. */
function unlessThere(error: NodeJS.ErrnoException): undefined {
  if (error.code !== 'EEXIST') throw error;
}

/** Nothing is added to, or cut off from, what is no log of this disk. */
function requireEmpty(text: string, path: string): void {
  if (text === '') return;
  throw new PqblkError(
    'audit_broken',
    'the file is not empty, and the log of a new disk begins it',
    {
      path,
      hint: 'name a file that is not there',
    },
  );
}

/** The log in the file at `path`, made when the key area counts no line yet. */
export class AuditLog implements AuditTrail {
  readonly #path: string;
  readonly restarts: boolean;

  /** `restart`: where the former log is lost a new one begins; its first line says so. */
  constructor(path: string, { restart = false } = {}) {
    this.#path = path;
    this.restarts = restart;
  }

  /**
   * Kinds `locked` (another change is writing it), `audit_broken` (it is not the log that the key area
   * knows), `audit_log` (it cannot be written, or is gone).
   */
  async prepare(subject: AuditSubject): Promise<AuditLine> {
    // One writer at a time: a chain has no branches.
    const release = await takeLock(this.#path, 'write audit log').catch((error: unknown) =>
      Promise.reject(this.#openingFailed(error, subject)),
    );
    let log: OpenLog | undefined;
    try {
      log = await this.#open(subject.known);
      return await this.#line(log, subject, release);
    } catch (error) {
      await log?.file.close();
      await release();
      throw this.#openingFailed(error, subject);
    }
  }

  async rehearse(subject: AuditSubject): Promise<void> {
    const begins = this.restarts || subject.known.lines === 0;
    const { O_RDWR, O_NOFOLLOW, O_NONBLOCK } = constants;
    let file: FileHandle | undefined;
    try {
      if (begins) await access(dirname(this.#path), constants.W_OK | constants.X_OK);
      file = await open(this.#path, O_RDWR | O_NOFOLLOW | O_NONBLOCK);
      this.#requireContinued(await textOf(file, this.#path), subject);
    } catch (error) {
      const isNew = begins && (error as NodeJS.ErrnoException).syscall === 'open';
      if (isNew && (error as NodeJS.ErrnoException).code === 'ENOENT') return;
      throw this.#openingFailed(error, subject);
    } finally {
      await file?.close();
    }
  }

  #openingFailed(error: unknown, { known }: AuditSubject): PqblkError {
    const details = { path: this.#path, operation: 'open audit log' };
    if ((error as NodeJS.ErrnoException).code === 'ELOOP') {
      const hint = 'name the file that it leads to: a link could be turned to another log';
      return new PqblkError('audit_log', 'an audit log is no symbolic link', { ...details, hint });
    }
    if (fromSystem(error).kind !== 'not_found' || known.lines === 0) {
      const hint = 'nothing is changed without its line in the log: mend that first';
      return unreachable(error, { ...details, hint });
    }
    return new PqblkError('audit_log', `no audit log; the disk counts ${known.lines} lines`, {
      ...details,
      hint: 'bring it back; where it is lost, --restart-audit begins a new one that says so',
    });
  }

  async #open(known: AuditHead): Promise<OpenLog> {
    const { O_RDWR, O_APPEND, O_NOFOLLOW, O_NONBLOCK, O_CREAT, O_EXCL } = constants;
    const flags = O_RDWR | O_APPEND | O_NOFOLLOW | O_NONBLOCK;
    if (this.restarts || known.lines === 0) {
      const made = await open(this.#path, flags | O_CREAT | O_EXCL, 0o600).catch(unlessThere);
      if (made) return { file: made, made: true };
    }
    return { file: await open(this.#path, flags), made: false };
  }

  async #line(
    { file, made }: OpenLog,
    subject: AuditSubject,
    release: () => Promise<void>,
  ): Promise<AuditLine> {
    const text = await textOf(file, this.#path);
    if (subject.operation === 'create') requireEmpty(text, this.#path);
    const uncounted = this.#requireContinued(text, subject);
    const { lines, length, torn } = split(text);
    if (torn) await file.truncate(length); // never acknowledged, never counted
    const { known, remarks: rotation } = subject;
    const restores = subject.operation === 'header-restore';
    const anew = this.#beginsAnew(text);
    const first = anew ? known.hash : NO_LINE;
    const line = JSON.stringify({
      ...recordOf(subject, 'begun', lines, first),
      ...(anew && { formerLines: known.lines }),
      ...(restores && { restoredFrom: known.lines }),
      ...(uncounted !== undefined && (restores || uncounted > 0) && { uncounted }),
      ...(rotation && { rotation }),
    });
    let begun = false;
    const write = async (text: string) => {
      begun = true;
      await file.appendFile(`${text}\n`);
      await file.sync();
    };
    const failed = async (error: unknown) => {
      const code = error instanceof PqblkError ? error.code : 'PQBLK_ERROR';
      const record = recordOf(subject, `failed: ${code}`, [...lines, line], first);
      await write(JSON.stringify(record)).catch(() => undefined);
    };
    return {
      lines: lines.length + 1,
      hash: hashOf(line),
      append: () => write(line).catch((error: unknown) => Promise.reject(this.#wrap(error))),
      failed,
      withdraw: async (error) => {
        const undone = made ? rm(this.#path) : file.truncate(length);
        await undone.catch(() => (begun ? failed(error) : undefined));
      },
      close: async () => {
        await file.close();
        await release();
      },
    };
  }

  #wrap(error: unknown): PqblkError {
    return unreachable(error, { path: this.#path, operation: 'write audit log' });
  }

  /** The log that is there goes on, restarted or not: the next change of the same run finds it. */
  #beginsAnew(text: string): boolean {
    return this.restarts && text === '';
  }

  /**
   * Returns how many lines are of changes that did not come about; undefined where a backup takes the place
   * of a key area that cannot tell.
   */
  #requireContinued(text: string, subject: AuditSubject): number | undefined {
    const { lines } = split(text);
    const { known, replaced, volumeUuid, generation, operation } = subject;
    const former = generation > 1 ? generation - 1 : Number.MAX_SAFE_INTEGER;
    const own = operation === 'header-restore' ? replaced : { ...known, generation: former };
    const other = lines.find((line) => parseRecord(line)?.volume !== formatUuid(volumeUuid));
    const has = (head: AuditHead) =>
      this.#beginsAnew(text) ||
      head.lines === 0 ||
      hashOf(lines[head.lines - 1] ?? '') === head.hash;
    const whole = has(known) && (own === undefined || has(own));
    const linked = lines.every(
      (line, index) =>
        (index === 0 && beginsAnew(parseRecord(line))) ||
        parseRecord(line)?.previous === (index === 0 ? NO_LINE : hashOf(lines[index - 1] ?? '')),
    );
    // One that is older than the backup knows nothing of what followed the backup.
    const judge = own && own.lines >= known.lines ? own : undefined;
    const beyond = lines.slice(judge?.lines).map(parseRecord);
    const close = !judge || beyond.every((record) => record && isAttempt(record, judge.generation));
    if (other === undefined && whole && linked && close) return judge && beyond.length;
    throw new PqblkError('audit_broken', 'not the audit log that the key area knows', {
      path: this.#path,
      hint: '`pqblk audit verify` tells what is wrong; with it out of the way --restart-audit begins a new log',
    });
  }
}

function recordOf(
  subject: AuditSubject,
  result: string,
  lines: readonly string[],
  first: string,
): AuditRecord {
  return {
    line: lines.length + 1,
    time: new Date().toISOString(),
    ...whoAsks(),
    host: hostname(),
    volume: formatUuid(subject.volumeUuid),
    operation: subject.operation,
    generation: subject.generation,
    unlockedBy: subject.unlockedBy,
    approvedBy: subject.approvedBy,
    slots: slotChanges(subject.before, subject.after),
    result,
    previous: lines.length === 0 ? first : hashOf(lines.at(-1) as string),
  };
}

/** Slots whose key or state is another one afterwards. */
function slotChanges(
  before: readonly SlotDescription[],
  after: readonly SlotDescription[],
): AuditSlot[] {
  return after.flatMap((slot) => {
    const former = before.find(({ index }) => index === slot.index);
    const same = former?.fingerprint === slot.fingerprint && former.state === slot.state;
    if (same) return [];
    const { index, label, role, kem, fingerprint, state: to } = slot;
    const from = former === undefined ? 'empty' : `${former.state} ${former.fingerprint}`;
    return [{ index, label, role, kem, fingerprint, from, to }];
  });
}
