// The key area end to end: who opens it, what each kind of damage is called, and that no byte of it
// can change unnoticed.
import { expect, test } from 'vitest';
import {
  addSlot,
  createKeyArea,
  describeKeyArea,
  formatUuid,
  KEY_AREA_BYTES,
  Kem,
  openKeyArea,
  parseUuid,
  Secret,
  SLOTS_MAX,
  SlotRole,
  SlotState,
  toHex,
} from '../../src/keys/index.js';
import { deriveMasterKeys, deriveSlotKeys, gcmSeal } from '../../src/keys/kdf.js';
import { sealKeyArea } from '../../src/keys/key-area.js';
import { parseKeyArea } from '../../src/keys/key-area-codec.js';
import type { KemProvider } from '../../src/keys/provider.js';
import {
  draftSlot,
  encodeSlot,
  openSlot,
  parseSlot,
  type Recipient,
  type Slot,
  sealSlot,
} from '../../src/keys/slot.js';
import { errorOf, type Person, person } from './support.js';

const UUID = parseUuid('00112233-4455-6677-8899-aabbccddeeff');

async function areaFor(...people: Person[]) {
  return await createKeyArea({
    volumeUuid: UUID,
    recipients: people.map(({ recipient }) => recipient),
  });
}

const sealFor = (vmk: Secret, recipient: Recipient, created: number) =>
  sealSlot(vmk, UUID, draftSlot(recipient, created), recipient.provider);

const hexOf = (secret: Secret | undefined) => secret?.use(toHex);

function flipped(blob: Uint8Array, at: number, mask = 1): Uint8Array {
  const copy = Uint8Array.from(blob);
  copy[at] = (copy[at] ?? 0) ^ mask;
  return copy;
}

const withBytes = (blob: Uint8Array, at: number, ...bytes: number[]) => {
  const copy = Uint8Array.from(blob);
  copy.set(bytes, at);
  return copy;
};

test('each of several recipients opens the same keys', async () => {
  const people = [await person('alice'), await person('bob', Kem.mlKem1024), await person('eve')];
  const area = await areaFor(...people);
  expect(area.blob.length).toBe(KEY_AREA_BYTES);
  expect([area.generation, area.currentEpoch, area.nextEpoch]).toEqual([1, 1, undefined]);
  for (const [index, { identity }] of people.entries()) {
    const opened = await openKeyArea(area.blob, identity, { expectedVolumeUuid: UUID });
    expect(opened.slotIndex).toBe(index);
    expect(opened.integrityKey.equals(area.integrityKey)).toBe(true);
    expect([...opened.dataKeys.keys()]).toEqual([1]);
    expect(hexOf(opened.dataKeys.get(1))).toBe(hexOf(area.dataKeys.get(1)));
    expect(opened.vmkCheck).toEqual(area.vmkCheck);
    expect(formatUuid(opened.volumeUuid)).toBe('00112233-4455-6677-8899-aabbccddeeff');
    opened[Symbol.dispose]();
    expect(opened.integrityKey.wiped).toBe(true);
    expect(opened.dataKeys.get(1)?.wiped).toBe(true);
  }
});

test('keys are fresh for every volume, and no key is another', async () => {
  const alice = await person('alice');
  const [one, two] = [await areaFor(alice), await areaFor(alice)];
  const all = [one, two].flatMap((area) => [
    hexOf(area.integrityKey),
    hexOf(area.dataKeys.get(1)),
    toHex(area.vmkCheck),
  ]);
  expect(new Set(all).size).toBe(6);
  for (const key of [one.integrityKey, one.dataKeys.get(1)]) {
    expect(key?.length).toBe(32);
    expect(Buffer.from(one.blob).includes(key?.use((bytes) => Buffer.from(bytes)) ?? '')).toBe(
      false,
    );
  }
});

test('another key has no slot; the right fingerprint with a wrong key is a wrong key', async () => {
  const [alice, bob] = [await person('alice'), await person('bob')];
  const { blob } = await areaFor(alice);
  expect((await errorOf(() => openKeyArea(blob, bob.identity))).kind).toBe('no_slot');
  const posing = { ...bob.identity, fingerprint: alice.identity.fingerprint };
  const error = await errorOf(() => openKeyArea(blob, posing));
  expect(error.kind).toBe('wrong_key');
  expect(error.message).toMatch(/wrong key or tampered slot/);
});

test('no byte of head, own slot or other slots changes unnoticed', {
  timeout: 240_000,
}, async () => {
  const [alice, bob] = [await person('alice'), await person('bob')];
  const { blob } = await areaFor(alice, bob);
  const kinds = new Map<string, number>();
  for (let at = 0; at < 3 * 4096; at += 1) {
    const error = await errorOf(() =>
      openKeyArea(flipped(blob, at, 1 << (at % 8)), alice.identity),
    );
    kinds.set(error.kind, (kinds.get(error.kind) ?? 0) + 1);
  }
  for (let at = 3 * 4096; at < KEY_AREA_BYTES; at += 997) {
    const error = await errorOf(() => openKeyArea(flipped(blob, at), alice.identity));
    expect(error.kind).toBe('key_area_damaged');
  }
  expect([...kinds.keys()].sort()).toEqual([
    'key_area_damaged',
    'newer_version',
    'no_slot',
    'wrong_key',
  ]);
  // Ciphertext, commitment, nonce, wrapped key and tag of the own slot: no other check sees those.
  expect(kinds.get('wrong_key')).toBeGreaterThan(1088 + 32 + 12 + 32 + 16);
});

test('what the MAC alone protects', async () => {
  const [alice, bob] = [await person('alice'), await person('bob')];
  const { blob } = await areaFor(alice, bob);
  const attacks = {
    generation: withBytes(blob, 16, 2),
    epochs: withBytes(blob, 40, 1, 0, 0, 0, 2),
    'audit head': withBytes(blob, 64, 1),
    'label of another slot': flipped(blob, 2 * 4096 + 64),
    'state of another slot': withBytes(blob, 2 * 4096 + 6, SlotState.decryptOnly),
    'another slot removed': withBytes(blob.slice().fill(0, 2 * 4096, 3 * 4096), 12, 1),
    'another slot copied': blob
      .slice()
      .copyWithin(3 * 4096, 2 * 4096, 3 * 4096)
      .fill(3, 12, 13),
    mac: flipped(blob, 4095),
  };
  for (const [name, attacked] of Object.entries(attacks)) {
    const error = await errorOf(() => openKeyArea(attacked, alice.identity));
    expect(error.kind, name).toBe('key_area_damaged');
    expect(error.message, name).toMatch(/MAC/);
  }
});

test('parts of two volumes for the same key do not mix', async () => {
  const alice = await person('alice');
  const [one, two] = [await areaFor(alice), await areaFor(alice)];
  const head = withBytes(one.blob, 4096, ...two.blob.subarray(4096, 8192));
  expect((await errorOf(() => openKeyArea(head, alice.identity))).kind).toBe('key_area_damaged');
  // Another UUID alone changes the context of the slot.
  const moved = flipped(one.blob, 24);
  expect((await errorOf(() => openKeyArea(moved, alice.identity))).kind).toBe('wrong_key');
});

test('a volume other than the expected one is told apart', async () => {
  const alice = await person('alice');
  const { blob } = await areaFor(alice);
  const expectedVolumeUuid = new Uint8Array(16).fill(1);
  const error = await errorOf(() => openKeyArea(blob, alice.identity, { expectedVolumeUuid }));
  expect(error.kind).toBe('uuid_mismatch');
  expect(error.message).toContain('00112233-4455-6677-8899-aabbccddeeff');
});

test('a revoked slot, a broken twin, and decrypt-only', async () => {
  const [alice, bob] = [await person('alice'), await person('bob')];
  using vmk = Secret.random(32);
  using master = deriveMasterKeys(vmk, UUID);
  const slotFor = (who: Person) => sealFor(vmk, who.recipient, 1_700_000_000);
  const revoke = (slot: Slot): Slot => ({
    ...slot,
    state: SlotState.revoked,
    ciphertext: new Uint8Array(0),
    commitment: new Uint8Array(32),
    nonce: new Uint8Array(12),
    wrappedVmk: new Uint8Array(32),
    tag: new Uint8Array(16),
  });
  const head = {
    generation: 7,
    volumeUuid: UUID,
    currentEpoch: 2,
    nextEpoch: 5,
    auditLength: 3n,
    auditHead: new Uint8Array(32).fill(9),
  };
  const table = {
    integrityKey: Secret.random(32),
    dataKeys: new Map([1, 2, 5].map((epoch) => [epoch, Secret.random(32)])),
  };
  const [ours, theirs] = [await slotFor(alice), await slotFor(bob)];
  const compose = (...slots: (Slot | undefined)[]) => sealKeyArea(master, head, slots, table);

  const revoked = compose(revoke(ours), undefined, theirs);
  expect((await errorOf(() => openKeyArea(revoked, alice.identity))).kind).toBe('slot_revoked');
  const byBob = await openKeyArea(revoked, bob.identity);
  expect(byBob).toMatchObject({ generation: 7, currentEpoch: 2, nextEpoch: 5, slotIndex: 2 });
  expect([...byBob.dataKeys.keys()]).toEqual([1, 2, 5]);
  expect(hexOf(byBob.dataKeys.get(5))).toBe(hexOf(table.dataKeys.get(5)));
  expect(describeKeyArea(revoked).slots.map(({ index, state }) => [index, state])).toEqual([
    [0, 'revoked'],
    [2, 'active'],
  ]);

  // Neither a revoked nor a broken slot of the same key hides a good one.
  const broken = { ...ours, commitment: new Uint8Array(32) };
  const mixed = compose(revoke(ours), broken, ours);
  expect((await openKeyArea(mixed, alice.identity)).slotIndex).toBe(2);

  // The state is under the slot's tag: it cannot be flipped, even by who can compute the MAC.
  const flippedState = compose({ ...ours, state: SlotState.decryptOnly });
  expect((await errorOf(() => openKeyArea(flippedState, alice.identity))).kind).toBe('wrong_key');

  // A head whose epochs the table does not hold.
  const short = { ...table, dataKeys: new Map([...table.dataKeys].slice(0, 2)) };
  const incomplete = sealKeyArea(master, head, [ours], short);
  const error = await errorOf(() => openKeyArea(incomplete, alice.identity));
  expect(error.message).toMatch(/no data key of epoch 5/);
});

test('garbage, truncation and versions of the future', async () => {
  const alice = await person('alice');
  const { blob } = await areaFor(alice);
  const kindOf = async (bytes: Uint8Array) =>
    (await errorOf(() => openKeyArea(bytes, alice.identity))).kind;
  expect(await kindOf(new Uint8Array(KEY_AREA_BYTES))).toBe('key_area_damaged');
  expect(await kindOf(new Uint8Array(KEY_AREA_BYTES).fill(0xff))).toBe('key_area_damaged');
  expect(await kindOf(new Uint8Array(0))).toBe('key_area_damaged');
  expect(await kindOf(blob.subarray(0, 4096))).toBe('key_area_damaged');
  expect(await kindOf(withBytes(blob, 10, 2))).toBe('newer_version');
  expect((await errorOf(() => describeKeyArea(withBytes(blob, 10, 2)))).code).toBe(
    'PQBLK_NEWER_VERSION',
  );
  expect(await kindOf(withBytes(blob, 12, 0xff, 0xff))).toBe('key_area_damaged');
  expect(await kindOf(withBytes(blob, 14, 0xff, 0xff))).toBe('key_area_damaged');
  expect(await kindOf(withBytes(blob, 16, ...new Array(8).fill(0xff)))).toBe('key_area_damaged');
});

test('random damage to a blob never ends in anything but a PqblkError', async () => {
  const alice = await person('alice');
  const { blob } = await areaFor(alice);
  let seed = 2026;
  const random = (below: number) => {
    seed = (Math.imul(seed, 1_103_515_245) + 12_345) >>> 0;
    return Math.floor((seed / 2 ** 32) * below);
  };
  for (let round = 0; round < 500; round += 1) {
    const copy = Uint8Array.from(blob);
    // Mostly where lengths, versions and counts are.
    const limit = random(2) === 0 ? 64 : 2 * 4096;
    const changes = 1 + random(4);
    for (let i = 0; i < changes; i += 1) {
      copy[(random(2) * 4096 + random(limit)) % copy.length] = random(256);
    }
    if (Buffer.compare(copy, blob) === 0) continue;
    await errorOf(() => openKeyArea(copy, alice.identity));
    try {
      describeKeyArea(copy);
    } catch (error) {
      expect(error).toHaveProperty('code');
    }
  }
});

test('describing needs no key and shows who can open', async () => {
  const alice = await person('alice');
  const recovery = {
    ...(await person('unused')).recipient,
    label: 'Wiederherstellung · 恢复',
    role: SlotRole.recovery,
    notAfter: 1_900_000_000,
    tokenReference: 'pkcs11:token=vault;id=%01',
  };
  const { blob } = await createKeyArea({
    volumeUuid: UUID,
    recipients: [alice.recipient, recovery],
    created: 1_700_000_000,
  });
  const described = describeKeyArea(blob);
  expect(JSON.parse(JSON.stringify(described))).toMatchObject({
    version: 1,
    generation: 1,
    volumeUuid: '00112233-4455-6677-8899-aabbccddeeff',
    authenticated: false,
    slots: [
      {
        index: 0,
        state: 'active',
        role: 'primary',
        provider: 'software',
        kem: 'ML-KEM-768',
        label: 'alice',
        fingerprint: toHex(alice.identity.fingerprint),
        created: '2023-11-14T22:13:20.000Z',
      },
      {
        index: 1,
        role: 'recovery',
        label: 'Wiederherstellung · 恢复',
        notAfter: '2030-03-17T17:46:40.000Z',
        tokenReference: 'pkcs11:token=vault;id=%01',
      },
    ],
  });
});

test('a slot has one encoding, and text that could fool a terminal is refused', async () => {
  const alice = await person('alice');
  using vmk = Secret.random(32);
  const slot = await sealFor(vmk, alice.recipient, 1);
  const bytes = encodeSlot(slot);
  expect(parseSlot(bytes, 0)).toEqual(slot);
  const evil = Uint8Array.from(bytes);
  evil.set([0x1b, 0x5b, 0x32, 0x4a], 64); // ESC [ 2 J
  expect((await errorOf(() => parseSlot(evil, 4))).message).toMatch(/slot 4: field "label"/);
  for (const label of ['a\nb', '\u202eevil', 'x'.repeat(129), '\ud800']) {
    const recipient = { ...alice.recipient, label };
    const error = await errorOf(() => sealFor(vmk, recipient, 1));
    expect(error.kind).toBe('invalid_argument');
  }
});

test('unused bytes of a slot are zero, or the slot is damaged', async () => {
  const alice = await person('alice');
  using vmk = Secret.random(32);
  const slot = await sealFor(vmk, alice.recipient, 1);
  const bytes = encodeSlot(slot);
  const gaps = [9, 60, 64 + 120, 192, 512 + 1184, 2111, 2112 + 1088, 3711, 3712, 4003];
  for (const at of gaps) {
    expect((await errorOf(() => parseSlot(flipped(bytes, at), 0))).kind, `${at}`).toBe(
      'key_area_damaged',
    );
  }
  // A revoked slot that still holds something which opens is not a wiped one.
  const halfRevoked = { ...slot, state: SlotState.revoked, ciphertext: new Uint8Array(0) };
  const error = await errorOf(() => parseSlot(encodeSlot(halfRevoked), 0));
  expect(error.message).toMatch(/revoked key/);
});

test('the commitment stands by itself: a valid tag over a wrong one opens nothing', async () => {
  const alice = await person('alice');
  const { provider, privateKey } = alice.identity;
  using vmk = Secret.random(32);
  const slot = await sealFor(vmk, alice.recipient, 1);
  using shared = await provider.decapsulate(privateKey, slot.ciphertext);
  const { kek } = deriveSlotKeys(shared, { ...slot, volumeUuid: UUID, slotId: slot.id });
  const resealed = (commitment: Uint8Array): Slot => {
    const aad = encodeSlot({ ...slot, commitment }).subarray(0, 4036);
    const sealed = vmk.use((bytes) => gcmSeal(kek, slot.nonce, aad, bytes));
    return { ...slot, commitment, wrappedVmk: sealed.slice(0, 32), tag: sealed.slice(32) };
  };
  using opened = await openSlot(resealed(slot.commitment), UUID, alice.identity);
  expect(opened?.equals(vmk)).toBe(true);
  const wrong = resealed(flipped(slot.commitment, 31));
  expect(await openSlot(wrong, UUID, alice.identity)).toBeUndefined();
});

test('a slot can be added by who can open, and the generation grows', async () => {
  const [alice, bob, eve] = [await person('alice'), await person('bob'), await person('eve')];
  const area = await areaFor(alice);
  const grown = await addSlot(area.blob, alice.identity, bob.recipient);
  const opened = await openKeyArea(grown, bob.identity);
  expect(opened).toMatchObject({ generation: 2, slotIndex: 1 });
  expect(opened.integrityKey.equals(area.integrityKey)).toBe(true);
  expect(opened.vmkCheck).toEqual(area.vmkCheck);
  // The key table is under a fresh nonce, and the slot of alice is untouched.
  const [before, after] = [parseKeyArea(area.blob), parseKeyArea(grown)];
  expect(after.head.tableNonce).not.toEqual(before.head.tableNonce);
  expect(after.slots[0]).toEqual(before.slots[0]);
  const kind = async (action: () => unknown) => (await errorOf(action)).kind;
  expect(await kind(() => addSlot(grown, alice.identity, bob.recipient))).toBe('slot_exists');
  expect(await kind(() => addSlot(grown, eve.identity, eve.recipient))).toBe('no_slot');
});

test('limits of recipients', async () => {
  const alice = await person('alice');
  const kindFor = async (...people: Person[]) => (await errorOf(() => areaFor(...people))).kind;
  expect(await kindFor()).toBe('no_key');
  expect(await kindFor(alice, alice)).toBe('slot_exists');
  const many = await Promise.all(Array.from({ length: SLOTS_MAX + 1 }, (_, i) => person(`k${i}`)));
  expect(await kindFor(...many)).toBe('no_space');
  const full = await areaFor(...many.slice(0, SLOTS_MAX));
  const last = many[SLOTS_MAX - 1] as Person;
  expect((await openKeyArea(full.blob, last.identity)).slotIndex).toBe(SLOTS_MAX - 1);
  const error = await errorOf(() => addSlot(full.blob, last.identity, alice.recipient));
  expect(error.kind).toBe('no_space');
});

test('a recipient key failing FIPS 203 is refused even if its provider does not look', async () => {
  const alice = await person('alice');
  const careless: KemProvider = Object.create(alice.recipient.provider, {
    encapsulate: {
      value: async () => ({ ciphertext: new Uint8Array(1088), sharedSecret: Secret.random(32) }),
    },
  });
  const recipient = {
    ...alice.recipient,
    provider: careless,
    encapsulationKey: Uint8Array.from(alice.recipient.encapsulationKey).fill(0xff, 0, 3),
  };
  const error = await errorOf(() => createKeyArea({ volumeUuid: UUID, recipients: [recipient] }));
  expect(error.kind).toBe('bad_key');
});
