// The second reader: docs/format.md section 3, the two copies of the session table.
//
// An entry counts when its own MAC holds, whatever became of the head beside it. That a writer needs
// a valid head (for the high-water mark) does not matter to a reader, but a table of which both heads
// are bad has been tampered with, and an oracle says so.
import { ensure, Fields, isZero, join, same } from './bytes.js';
import { hmacSha3 } from './crypto.js';

export const SESSION_ID_MAX = 2 ** 30 - 1;
const ENTRY_BYTES = 128;

export interface Session {
  readonly id: number;
  readonly epoch: number;
  /** Seconds since 1970. */
  readonly created: number;
  readonly salt: Uint8Array;
}

export interface SessionTable {
  readonly sessions: ReadonlyMap<number, Session>;
  /** The larger one of the valid heads. */
  readonly highWater: number;
  /** Of the copies A and B: is the head valid, and how many entries are neither free nor valid? */
  readonly copies: readonly { readonly headValid: boolean; readonly invalidEntries: number }[];
}

export function readSessions(
  copies: readonly Uint8Array[],
  key: Uint8Array,
  uuid: Uint8Array,
): SessionTable {
  const sessions = new Map<number, Session>();
  const states: { headValid: boolean; invalidEntries: number }[] = [];
  let highWater = 0;
  for (const bytes of copies) {
    const head = parseHead(bytes.subarray(0, ENTRY_BYTES), key, uuid);
    highWater = Math.max(highWater, head ?? 0);
    let invalidEntries = 0;
    for (let at = ENTRY_BYTES; at + ENTRY_BYTES <= bytes.length; at += ENTRY_BYTES) {
      const raw = bytes.subarray(at, at + ENTRY_BYTES);
      if (isZero(raw)) continue;
      const session = parseEntry(raw, key, uuid);
      if (session) add(sessions, session);
      else invalidEntries += 1;
    }
    states.push({ headValid: head !== undefined, invalidEntries });
  }
  const someHead = states.some((state) => state.headValid);
  ensure(someHead, 'sessions', 'no copy of the session table has a valid head');
  return { sessions, highWater, copies: states };
}

function macHolds(raw: Uint8Array, label: string, key: Uint8Array, uuid: Uint8Array): boolean {
  return same(hmacSha3(key, join(label, uuid, raw.subarray(0, 96))), raw.subarray(96, 128));
}

function parseHead(raw: Uint8Array, key: Uint8Array, uuid: Uint8Array): number | undefined {
  const fields = new Fields(raw, 'sessions');
  if (fields.text(0, 8) !== 'PQBLKSES' || !macHolds(raw, 'head', key, uuid)) return undefined;
  ensure(fields.u32(8) === 1, 'sessions', `session table of version ${fields.u32(8)}`);
  fields.zero(16, 80, 'reserved bytes of the session table');
  return fields.u32(12);
}

function parseEntry(raw: Uint8Array, key: Uint8Array, uuid: Uint8Array): Session | undefined {
  if (!macHolds(raw, 'entry', key, uuid)) return undefined;
  const fields = new Fields(raw, 'sessions');
  fields.zero(48, 48, 'reserved bytes of a session');
  const id = fields.u32(0);
  ensure(id >= 1 && id <= SESSION_ID_MAX, 'sessions', `session id ${id}`);
  return { id, epoch: fields.u32(4), created: fields.u64(8), salt: fields.slice(16, 32) };
}

/** The copies may each hold an entry; two that differ come from two copies of the image, spliced. */
function add(sessions: Map<number, Session>, session: Session): void {
  const other = sessions.get(session.id);
  const agrees = !other || (same(other.salt, session.salt) && other.epoch === session.epoch);
  ensure(agrees, 'sessions', `session ${session.id} has two different entries`);
  sessions.set(session.id, session);
}
