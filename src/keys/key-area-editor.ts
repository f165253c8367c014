// Room keys/: making the successor of a key area: who may open the disk from now on.
//
// An editor opens a blob, collects changes, and seals the next generation; until then nothing has
// happened. Whatever a change makes stale is sealed anew: one slot when it moves, every active slot
// when the master key changes. A slot is sealed to the encapsulation key that the image stores, which
// whoever once knew the VMK could have put there: `sealedFromImage` names those keys, and the caller
// compares them with what he trusts. Writing the blob is change.ts.
import { PqblkError } from '../errors.js';
import { fromHex, toHex } from './bytes.js';
import { deriveMasterKeys, KEY_BYTES } from './kdf.js';
import {
  type HeadFields,
  nowSeconds,
  type OpenKeyAreaOptions,
  requireRoom,
  sealKeyArea,
  type Unlocked,
  unlockKeyArea,
  type VolumeKeys,
  volumeKeys,
} from './key-area.js';
import { EPOCHS_MAX, type Head, KEY_AREA_VERSION, SLOTS_MAX } from './key-area-codec.js';
import {
  type AuditHead,
  describeAudit,
  describeSlot,
  describeSlots,
  type SlotDescription,
} from './key-area-describe.js';
import { liboqs } from './liboqs.js';
import { fingerprintOf } from './ml-kem.js';
import type { Observed } from './pins.js';
import type { Identity, KemProvider } from './provider.js';
import { Secret } from './secret.js';
import {
  draftSlot,
  type Recipient,
  revokedSlot,
  type Slot,
  SlotState,
  type SlotStateId,
  sealSlot,
} from './slot.js';

export interface SealedKeyArea {
  /** The 64 KiB for both copies. */
  readonly blob: Uint8Array;
  /** What it will show of itself when it is opened: for the pin. */
  readonly observed: Observed;
}

export interface RewrapOptions {
  /** Somebody else's key from now on; the same key, encapsulated to anew, when left out. */
  readonly recipient?: Recipient | undefined;
  /** Keep the slot of the former key as decrypt-only, in a slot of its own. */
  readonly keepOld?: boolean | undefined;
}

/** Changes to one opened key area. Holds its VMK: dispose of it. */
export class KeyAreaEditor {
  readonly #opened: Unlocked;
  readonly #keys: VolumeKeys;
  readonly #slots: (Slot | undefined)[];
  /** Slots to be sealed when the blob is made, and who computes the encapsulation. */
  readonly #renewed = new Map<number, KemProvider>();
  /** Keys that the caller named or whose private half he has: not the image's word alone. */
  readonly #vouched = new Set<string>();
  readonly #dataKeys: Map<number, Secret>;
  #head: Head;
  #rotates = false;
  #touched = false;

  private constructor(opened: Unlocked, identity: Identity) {
    this.#opened = opened;
    this.#keys = volumeKeys(opened.area.head, opened.table, opened.master);
    this.#slots = [...opened.area.slots];
    this.#head = opened.area.head;
    this.#dataKeys = new Map(opened.table.dataKeys);
    this.#vouched.add(toHex(identity.fingerprint));
  }

  /** Kinds as openKeyArea, and `newer_version` for a blob that this version must not replace. */
  static async open(
    blob: Uint8Array,
    identity: Identity,
    options: OpenKeyAreaOptions = {},
  ): Promise<KeyAreaEditor> {
    const editor = new KeyAreaEditor(await unlockKeyArea(blob, identity, options), identity);
    try {
      requireWritable(editor.#head);
      return editor;
    } catch (error) {
      editor[Symbol.dispose]();
      throw error;
    }
  }

  /** What was opened, before any change. */
  get observed(): Observed {
    return this.#keys;
  }

  /** The slot that opened it. */
  get ownIndex(): number {
    return this.#opened.slotIndex;
  }

  /** The slots as they will be. */
  get slots(): SlotDescription[] {
    return describeSlots(this.#slots);
  }

  /** What the blob that was opened counts of the audit log. */
  get audit(): AuditHead {
    return describeAudit(this.#opened.area.head);
  }

  /** Its successor is to be sealed, though with the same slots and keys. */
  renew(): void {
    this.#touched = true;
  }

  /** Whether anything was changed at all. */
  get changed(): boolean {
    return this.#touched;
  }

  /** Of the key area that `seal` makes. Kind `out_of_range`. */
  get nextGeneration(): number {
    return successorOf(this.#head, this.#rotates);
  }

  get rotatesMasterKey(): boolean {
    return this.#rotates;
  }

  /** The current and, while a rotation of the data key is under way, the next epoch. */
  get epochs(): { current: number; next: number | undefined; all: number[] } {
    const { currentEpoch: current, nextEpoch } = this.#head;
    return { current, next: nextEpoch || undefined, all: [...this.#dataKeys.keys()] };
  }

  /** Whether it has this very key, and not just one of that number. */
  hasDataKey(epoch: number, key: Secret): boolean {
    return this.#dataKeys.get(epoch)?.equals(key) ?? false;
  }

  /** Whether this key opens the same VMK through a slot that is live now. Kinds as openKeyArea. */
  async opensFor(blob: Uint8Array, identity: Identity): Promise<SlotDescription> {
    const other = await unlockKeyArea(blob, identity, {});
    using vmk = other.vmk;
    using _master = other.master;
    using _keys = volumeKeys(other.area.head, other.table, other.master);
    if (!vmk.equals(this.#opened.vmk)) {
      throw new PqblkError('wrong_key', 'the two keys open different master keys');
    }
    return describeSlot(other.area.slots[other.slotIndex] as Slot, other.slotIndex);
  }

  /** One more key. Returns its position. Kinds `exists`, `no_space` (15 slots), `bad_key`. */
  add(recipient: Recipient, created = nowSeconds()): number {
    this.#requireNew(recipient);
    const position = freePosition(this.#slots);
    this.#place(position, draftSlot(recipient, created), recipient.provider);
    this.#vouched.add(toHex(fingerprintOf(recipient.encapsulationKey)));
    return position;
  }

  /**
   * Seals a slot anew: to the same key, or to another one that takes its place, role and date. Kind `policy`
   * where that date has passed and the recipient says nothing else.
   */
  rewrap(index: number, { recipient, keepOld }: RewrapOptions = {}, created = nowSeconds()): void {
    const slot = this.#live(index);
    if (!recipient) {
      this.#place(index, slot);
      return;
    }
    this.#requireNew(recipient);
    const role = recipient.role ?? slot.role;
    const notAfter = recipient.notAfter ?? slot.notAfter;
    if (recipient.notAfter === undefined && notAfter > 0 && notAfter <= created) {
      throw new PqblkError('policy', `slot ${index} ("${slot.label}") is past its date`, {
        operation: 'move slot',
        hint: 'say with --not-after until when the new key may open the disk, or never',
      });
    }
    if (keepOld) {
      this.#place(freePosition(this.#slots), { ...slot, state: SlotState.decryptOnly });
    }
    this.#place(index, draftSlot({ ...recipient, role, notAfter }, created), recipient.provider);
    this.#vouched.add(toHex(fingerprintOf(recipient.encapsulationKey)));
  }

  /**
   * Active: rotations keep it. Decrypt-only: the next rotation of the master key ends it; kind `policy`
   * for the last active slot.
   */
  setState(index: number, state: Exclude<SlotStateId, typeof SlotState.revoked>): void {
    const slot = this.#live(index);
    if (slot.state === state) return;
    if (state === SlotState.decryptOnly) this.#requireAnotherActive(index, 'activate another one');
    this.#place(index, { ...slot, state });
  }

  /**
   * Wipes a slot, and changes the master key, which an old copy of the slot still opens. Does nothing
   * to a slot that is revoked already. Kind `policy` for the last active slot, unless forced.
   */
  revoke(index: number, { force = false } = {}): void {
    const slot = this.#slots[index];
    if (!slot) throw noSuchSlot(index);
    if (slot.state === SlotState.revoked) return;
    if (!force) this.#requireAnotherActive(index, '--force makes the disk unreadable for good');
    this.#slots[index] = revokedSlot(slot);
    this.#renewed.delete(index);
    this.rotateMasterKey();
  }

  /** Wipes a decrypt-only slot. The master key stays: an old copy of the slot still opens. */
  end(index: number): void {
    const slot = this.#live(index);
    if (slot.state === SlotState.active) {
      throw new PqblkError('invalid_argument', `slot ${index} ("${slot.label}") is active`);
    }
    this.#slots[index] = revokedSlot(slot);
    this.#renewed.delete(index);
    this.#touched = true;
  }

  /** A new VMK, sealed to every active slot; decrypt-only slots end here. */
  rotateMasterKey(): void {
    this.#rotates = true;
    this.#slots.forEach((slot, index) => {
      if (slot?.state === SlotState.decryptOnly) {
        this.#slots[index] = revokedSlot(slot);
        this.#renewed.delete(index);
      } else if (slot?.state === SlotState.active && !this.#renewed.has(index)) {
        this.#renewed.set(index, liboqs);
      }
    });
    this.#touched = true;
  }

  /** Begins a rotation of the data key: a key for the next epoch. Returns the epoch. */
  addDataKey(): number {
    if (this.#head.nextEpoch !== 0) {
      throw new PqblkError('exists', `epoch ${this.#head.nextEpoch} is under way already`);
    }
    if (this.#dataKeys.size >= EPOCHS_MAX) {
      throw new PqblkError('no_space', `a key table holds ${EPOCHS_MAX} epochs`);
    }
    const nextEpoch = Math.max(...this.#dataKeys.keys()) + 1;
    this.#dataKeys.set(nextEpoch, Secret.random(KEY_BYTES));
    this.#head = { ...this.#head, nextEpoch };
    this.#touched = true;
    return nextEpoch;
  }

  /** The next epoch becomes the current one. The former key stays until `forgetDataKey`. */
  commitDataKey(): void {
    const { nextEpoch } = this.#head;
    if (nextEpoch === 0) throw new PqblkError('not_found', 'no rotation of the data key');
    this.#head = { ...this.#head, currentEpoch: nextEpoch, nextEpoch: 0 };
    this.#touched = true;
  }

  /** Drops the key of an epoch: not the current one; of the next one, that is giving it up. */
  forgetDataKey(epoch: number): void {
    if (epoch === this.#head.currentEpoch || !this.#dataKeys.has(epoch)) {
      throw new PqblkError('invalid_argument', `epoch ${epoch} cannot be forgotten`);
    }
    this.#dataKeys.delete(epoch);
    if (epoch === this.#head.nextEpoch) this.#head = { ...this.#head, nextEpoch: 0 };
    this.#touched = true;
  }

  /** Keys that would be sealed to because the image names them, and for no better reason. */
  get sealedFromImage(): SlotDescription[] {
    return [...this.#renewed.keys()]
      .sort((a, b) => a - b)
      .map((index) => describeSlot(this.#slots[index] as Slot, index))
      .filter(({ fingerprint }) => !this.#vouched.has(fingerprint));
  }

  /** The next generation. The audit head is the caller's. May be called again. */
  async seal(audit = this.audit): Promise<SealedKeyArea> {
    const { volumeUuid } = this.#head;
    const old = this.#opened;
    using fresh = this.#rotates ? Secret.random(KEY_BYTES) : undefined;
    using freshMaster = fresh && deriveMasterKeys(fresh, volumeUuid);
    const [vmk, master] = [fresh ?? old.vmk, freshMaster ?? old.master];
    const slots = [...this.#slots];
    for (const [index, provider] of this.#renewed) {
      slots[index] = await sealSlot(vmk, volumeUuid, slots[index] as Slot, provider);
    }
    const head: HeadFields = {
      ...this.#head,
      generation: this.nextGeneration,
      auditLength: BigInt(audit.lines),
      auditHead: fromHex(audit.hash),
    };
    const table = { integrityKey: old.table.integrityKey, dataKeys: this.#dataKeys };
    const blob = sealKeyArea(master, head, slots, table);
    const { generation, currentEpoch } = head;
    const observed = { volumeUuid, generation, currentEpoch, vmkCheck: master.vmkCheck };
    return { blob, observed };
  }

  [Symbol.dispose](): void {
    this.#opened.vmk.wipe();
    this.#opened.master[Symbol.dispose]();
    this.#keys[Symbol.dispose]();
    for (const key of this.#dataKeys.values()) key.wipe();
  }

  #place(index: number, slot: Slot, provider: KemProvider = liboqs): void {
    this.#slots[index] = slot;
    this.#renewed.set(index, provider);
    this.#touched = true;
  }

  #live(index: number): Slot {
    const slot = this.#slots[index];
    if (!slot) throw noSuchSlot(index);
    if (slot.state !== SlotState.revoked) return slot;
    throw new PqblkError('slot_revoked', `slot ${index} ("${slot.label}") was revoked`);
  }

  #requireAnotherActive(index: number, hint: string): void {
    const others = this.#slots.some(
      (slot, other) => other !== index && slot?.state === SlotState.active,
    );
    if (others) return;
    throw new PqblkError(
      'policy',
      `slot ${index} is the last active one: nobody could open the disk`,
      {
        operation: 'change key slots',
        hint,
      },
    );
  }

  #requireNew({ encapsulationKey }: Recipient): void {
    const fingerprint = toHex(fingerprintOf(encapsulationKey));
    const other = this.slots.find(
      (slot) => slot.fingerprint === fingerprint && slot.state !== 'revoked',
    );
    if (!other) return;
    const { index, label, state } = other;
    const hint = '`pqblk slot retire --undo` makes it active again';
    throw new PqblkError(
      'slot_exists',
      `key ${fingerprint} would have two slots: it has slot ${index} ("${label}", ${state})`,
      { operation: 'change key slots', ...(state === 'decrypt-only' && { hint }) },
    );
  }
}

/** A blob in which one more key opens the disk: same VMK, generation + 1. Kinds as the editor's. */
export async function addSlot(
  blob: Uint8Array,
  identity: Identity,
  recipient: Recipient,
  created = nowSeconds(),
): Promise<Uint8Array> {
  using editor = await KeyAreaEditor.open(blob, identity);
  editor.add(recipient, created);
  return (await editor.seal()).blob;
}

/** Numbers do not end: under a new master key they begin anew, since its predecessor's mean nothing. */
function successorOf({ generation }: Head, rotates: boolean): number {
  if (generation < Number.MAX_SAFE_INTEGER) return generation + 1;
  if (rotates) return 1;
  throw new PqblkError('out_of_range', 'the generation of the key area cannot grow any more', {
    operation: 'change key area',
    hint: '`pqblk rotate-master-key` begins to count anew',
  });
}

const noSuchSlot = (index: number) => new PqblkError('slot_not_found', `there is no slot ${index}`);

/** The first empty position, else the first revoked one: a slot keeps its index for its life. */
function freePosition(slots: readonly (Slot | undefined)[]): number {
  const empty = slots.indexOf(undefined);
  if (empty >= 0) return empty;
  if (slots.length < SLOTS_MAX) return slots.length;
  const revoked = slots.findIndex((slot) => slot?.state === SlotState.revoked);
  if (revoked >= 0) return revoked;
  return requireRoom(SLOTS_MAX + 1);
}

/** An older writer must not replace what a newer one wrote: it would drop what it does not know. */
function requireWritable(head: Head): void {
  if (head.version === KEY_AREA_VERSION) return;
  throw new PqblkError(
    'newer_version',
    `the key area has version ${head.version}; this pqblk can read but not change it`,
    { hint: 'use a newer pqblk' },
  );
}
