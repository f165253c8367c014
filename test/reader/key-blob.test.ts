// Key areas that the product's key layer makes must open in the second reader, which parses the bytes
// of docs/keys.md by itself and decapsulates with noble instead of liboqs.
import { describe, expect, it } from 'vitest';
import {
  addSlot,
  createKeyArea,
  fingerprintOf,
  Kem,
  type KemId,
  liboqs,
  openKeyArea,
  SlotRole,
  softwareIdentity,
} from '../../src/keys/index.js';
import { buildKeyBlob } from './builder-keys.js';
import { faultOf } from './fixture.js';
import { openBlob } from './key-area.js';

const volumeUuid = Uint8Array.from({ length: 16 }, (_, at) => at + 1);

async function person(kem: KemId, label: string) {
  const { encapsulationKey, privateKey } = await liboqs.generate(kem);
  if (privateKey.type !== 'software') throw new Error('not a software key');
  const { decapsulationKey } = privateKey;
  return {
    recipient: { provider: liboqs, kem, encapsulationKey, label, role: SlotRole.recovery },
    identity: softwareIdentity(kem, decapsulationKey, fingerprintOf(encapsulationKey)),
    secretKey: decapsulationKey.use((bytes) => Uint8Array.from(bytes)),
  };
}

describe.each([
  { name: 'ML-KEM-768', kem: Kem.mlKem768 },
  { name: 'ML-KEM-1024', kem: Kem.mlKem1024 },
  { name: 'X-Wing', kem: Kem.xWing },
])('a key area for $name', ({ kem }) => {
  it('gives each recipient the keys that the key layer gave, strangers none', async () => {
    const [ada, bob, eve] = await Promise.all(['ada', 'böb', 'eve'].map((l) => person(kem, l)));
    if (!ada || !bob || !eve) throw new Error('three people');
    const area = await createKeyArea({ volumeUuid, recipients: [ada.recipient] });
    const blob = await addSlot(area.blob, ada.identity, bob.recipient);
    const integrityKey = area.integrityKey.use((bytes) => Uint8Array.from(bytes));
    const dataKey = area.dataKeys.get(1)?.use((bytes) => Uint8Array.from(bytes));
    for (const { secretKey } of [ada, bob]) {
      const keys = openBlob(blob, volumeUuid, secretKey);
      expect(keys.integrityKey).toEqual(integrityKey);
      expect([...keys.dataKeys]).toEqual([[1, dataKey]]);
    }
    expect(faultOf(() => openBlob(blob, volumeUuid, eve.secretKey))).toBe('wrong-key');
    expect(faultOf(() => openBlob(area.blob, volumeUuid, bob.secretKey))).toBe('wrong-key');
    expect(faultOf(() => openBlob(blob, new Uint8Array(16), ada.secretKey))).toBe('key-area');
  });
});

it('opens, in the key layer, what the test builder wrote from docs/keys.md', async () => {
  const { recipient, identity } = await person(Kem.mlKem768, 'ada');
  const integrityKey = new Uint8Array(32).fill(3);
  const dataKeys = new Map([[1, new Uint8Array(32).fill(4)]]);
  const recipients = [recipient.encapsulationKey];
  const blob = buildKeyBlob({ uuid: volumeUuid, integrityKey, dataKeys, recipients });
  const opened = await openKeyArea(blob, identity, { expectedVolumeUuid: volumeUuid });
  expect(opened.integrityKey.use((bytes) => Uint8Array.from(bytes))).toEqual(integrityKey);
  expect(opened.dataKeys.get(1)?.use((bytes) => bytes[31])).toBe(4);
});
