// Room keys/: what a key area shows of itself to people, as plain values ready for JSON.
//
// Public fields only, read without a key: nothing in here is authenticated unless whoever asks has
// opened the key area as well.
import { formatUuid, toHex } from './bytes.js';
import { type Head, type KeyArea, parseKeyArea } from './key-area-codec.js';
import { fingerprintOf, kemParameters } from './ml-kem.js';
import { ProviderKind } from './provider.js';
import { draftSlot, type Recipient, type Slot, SlotRole, SlotState } from './slot.js';

/** One slot. */
export interface SlotDescription {
  readonly index: number;
  readonly id: string;
  readonly state: 'active' | 'decrypt-only' | 'revoked';
  readonly role: 'primary' | 'recovery' | 'escrow';
  readonly provider: 'software' | 'pkcs11';
  readonly kem: string;
  readonly label: string;
  /** SHA3-256 of the encapsulation key, hex. */
  readonly fingerprint: string;
  readonly created: string;
  readonly notAfter: string | undefined;
  readonly tokenReference: string | undefined;
}

export interface KeyAreaDescription {
  readonly version: number;
  readonly generation: number;
  readonly volumeUuid: string;
  readonly currentEpoch: number;
  readonly nextEpoch: number | undefined;
  /** Always false: without a key nothing in here is authenticated. */
  readonly authenticated: false;
  /** What it counts of the audit log. */
  readonly audit: AuditHead;
  readonly slots: readonly SlotDescription[];
}

export interface AuditHead {
  readonly lines: number;
  /** SHA3-256 of the last line, hex; zeros while there is none. */
  readonly hash: string;
}

export function describeAudit({ auditLength, auditHead }: Head): AuditHead {
  return { lines: Number(auditLength), hash: toHex(auditHead) };
}

const nameIn = <T extends Record<string, number>>(table: T, value: T[keyof T]) =>
  Object.keys(table).find((key) => table[key] === value) as keyof T & string;

const isoTime = (seconds: number) => new Date(seconds * 1000).toISOString();

export function describeSlot(slot: Slot, index: number): SlotDescription {
  const state = nameIn(SlotState, slot.state);
  return {
    index,
    id: toHex(slot.id),
    state: state === 'decryptOnly' ? 'decrypt-only' : state,
    role: nameIn(SlotRole, slot.role),
    provider: nameIn(ProviderKind, slot.provider),
    kem: kemParameters(slot.kem).name,
    label: slot.label,
    fingerprint: toHex(fingerprintOf(slot.encapsulationKey)),
    created: isoTime(slot.created),
    notAfter: slot.notAfter === 0 ? undefined : isoTime(slot.notAfter),
    tokenReference: slot.tokenReference || undefined,
  };
}

export function describeSlots(slots: KeyArea['slots']): SlotDescription[] {
  return slots.flatMap((slot, index) => (slot ? [describeSlot(slot, index)] : []));
}

/** The slots that these recipients would get on a new disk. */
export function describeRecipients(recipients: readonly Recipient[]): SlotDescription[] {
  const now = Math.floor(Date.now() / 1000);
  return describeSlots(recipients.map((recipient) => draftSlot(recipient, now)));
}

/** What the blob says of itself, without a key. Kinds `key_area_damaged`, `newer_version`. */
export function describeKeyArea(blob: Uint8Array): KeyAreaDescription {
  const { head, slots } = parseKeyArea(blob);
  return {
    version: head.version,
    generation: head.generation,
    volumeUuid: formatUuid(head.volumeUuid),
    currentEpoch: head.currentEpoch,
    nextEpoch: head.nextEpoch || undefined,
    authenticated: false,
    audit: describeAudit(head),
    slots: describeSlots(slots),
  };
}
