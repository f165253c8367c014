// Room keys/: an exported public key as somebody a disk can be sealed to, without taking it into the
// store. This file does no I/O.
import { parseArmour } from './key-file.js';
import { liboqs } from './liboqs.js';
import type { Recipient } from './slot.js';

/** The recipient in armoured text, of a pair its public half. Kinds `bad_key`, `newer_version`. */
export function parseRecipient(text: string): Recipient {
  const { name, kem, encapsulationKey, privatePart } = parseArmour(text);
  if (privatePart?.protection === 'none') privatePart.decapsulationKey.wipe();
  return { provider: liboqs, kem, encapsulationKey, label: name };
}
