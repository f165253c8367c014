// Room keys/: which key of the store opens a disk, when the user names none.
import { PqblkError } from '../errors.js';
import type { SlotDescription } from './key-area-describe.js';
import type { KeyInfo, KeyStore } from './store.js';

/**
 * The first slot's key that the store has the private half of; one without a passphrase is preferred,
 * since nobody needs to be asked. Kind `no_key` when there is none. Slots are not authenticated here:
 * a wrong hint costs a refusal later, never a key.
 */
export async function chooseKey(
  store: KeyStore,
  slots: readonly SlotDescription[],
): Promise<KeyInfo> {
  const { keys } = await store.list();
  const usable = slots
    .filter((slot) => slot.state !== 'revoked')
    .flatMap((slot) => keys.filter((key) => key.fingerprint === slot.fingerprint))
    .filter((key) => key.protection !== 'public-only');
  const chosen = usable.find((key) => key.protection === 'none') ?? usable[0];
  if (chosen) return chosen;
  const labels = slots.map((slot) => `${slot.label} (${slot.fingerprint.slice(0, 8)})`).join(', ');
  throw new PqblkError('no_key', 'no key of the store opens this disk', {
    path: store.path,
    hint: `the disk is sealed to ${labels || 'nobody'}`,
  });
}
