// Room keys/: a private key that fits on a piece of paper.
//
// 32 random bytes, written as four lines of 16 characters: 8 bytes of it and 2 that check them and the
// number of their line, so that a misread line is named. A KEM pair is made from the bytes, and its
// public half gets a slot like any other. What is drawn here is never stored: only the paper has it.
import { PqblkError } from '../errors.js';
import { ascii, concat, toHex } from './bytes.js';
import { sha3_256, shake256 } from './hash.js';
import type { SlotDescription } from './key-area-describe.js';
import { liboqs, softwareIdentity } from './liboqs.js';
import { fingerprintOf, Kem, type KemId, kemParameters } from './ml-kem.js';
import type { Identity } from './provider.js';
import { Secret } from './secret.js';
import type { Recipient } from './slot.js';
import { publicHalfOf } from './x-wing.js';

const SECRET_BYTES = 32;
const LINES = 4;
const DATA_BYTES = SECRET_BYTES / LINES;
const CHECK_BYTES = 2;
const LINE_SYMBOLS = ((DATA_BYTES + CHECK_BYTES) * 8) / 5;
const GROUP_SYMBOLS = 4;
/** Crockford's base 32: no I, L, O, U. */
const ALPHABET = '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
const LOOKALIKES: Readonly<Record<string, string>> = { I: '1', L: '1', O: '0' };
/** What stands before the code in a QR code, so that a reader knows what it is. */
export const RECOVERY_PREFIX = 'PQBLK1:';

function checkOf(line: number, data: Uint8Array): Uint8Array {
  const label = ascii('pqblk/v1 recovery line');
  return sha3_256(label, Uint8Array.of(line), data).subarray(0, CHECK_BYTES);
}

/** Four lines of four groups; strings, because they are for paper. */
export function encodeRecoveryCode(secret: Secret): string[] {
  return secret.use((bytes) =>
    Array.from({ length: LINES }, (_, line) => {
      const data = bytes.subarray(line * DATA_BYTES, (line + 1) * DATA_BYTES);
      let bits = 0n;
      for (const byte of concat(data, checkOf(line, data))) bits = (bits << 8n) | BigInt(byte);
      let symbols = '';
      for (let at = LINE_SYMBOLS - 1; at >= 0; at -= 1) {
        symbols += ALPHABET[Number((bits >> BigInt(5 * at)) & 31n)];
      }
      return (symbols.match(new RegExp(`.{${GROUP_SYMBOLS}}`, 'g')) ?? []).join(' ');
    }),
  );
}

/**
 * The reverse, from what somebody typed or scanned: in any case, with or without spaces, dashes, line
 * ends and line numbers like `1.`, O and 0 alike, I, L and 1 alike. Kind `bad_key` names the line that
 * was misread. The caller wipes the result.
 */
export function parseRecoveryCode(typed: Secret): Secret {
  const symbols = typed.use((bytes) => symbolsOf(new TextDecoder().decode(bytes)));
  const wanted = LINES * LINE_SYMBOLS;
  if (symbols.length !== wanted) {
    throw new PqblkError(
      'bad_key',
      `a recovery code has ${wanted} characters, not ${symbols.length}`,
    );
  }
  const secret = Secret.zeros(SECRET_BYTES);
  for (let line = 0; line < LINES; line += 1) {
    let bits = 0n;
    for (const symbol of symbols.slice(line * LINE_SYMBOLS, (line + 1) * LINE_SYMBOLS)) {
      bits = (bits << 5n) | BigInt(symbol);
    }
    const bytes = new Uint8Array(DATA_BYTES + CHECK_BYTES);
    for (let at = bytes.length - 1; at >= 0; at -= 1, bits >>= 8n) bytes[at] = Number(bits & 255n);
    const data = bytes.subarray(0, DATA_BYTES);
    const check = toHex(bytes.subarray(DATA_BYTES));
    if (toHex(checkOf(line, data)) !== check) {
      secret.wipe();
      throw new PqblkError('bad_key', `line ${line + 1} of the recovery code was misread`);
    }
    secret.use((all) => all.set(data, line * DATA_BYTES));
    bytes.fill(0);
  }
  return secret;
}

function symbolsOf(text: string): number[] {
  const plain = text
    .toUpperCase()
    .replace(RECOVERY_PREFIX, '')
    .replaceAll(/^\s*[1-4][.:)]/gm, '')
    .replaceAll(/[\s\p{Dash_Punctuation}]/gu, '');
  return [...plain].map((symbol) => {
    const value = ALPHABET.indexOf(LOOKALIKES[symbol] ?? symbol);
    if (value >= 0) return value;
    throw new PqblkError('bad_key', `a recovery code has no ${JSON.stringify(symbol)}`);
  });
}

/** Bytes for a new recovery code. The caller wipes them. */
export const newRecoverySecret = (): Secret => Secret.random(SECRET_BYTES);

/** The decapsulation key that a recovery secret stands for, of this KEM. The caller wipes it. */
async function derive(secret: Secret, kem: KemId): Promise<Secret> {
  const label = Secret.copyOf(ascii(`pqblk/v1 recovery ${kemParameters(kem).name}`));
  using input = secret.use((bytes) => label.use((text) => new Secret(concat(text, bytes))));
  if (kem === Kem.xWing) return shake256(input, SECRET_BYTES);
  const { ml_kem768, ml_kem1024 } = await import('@noble/post-quantum/ml-kem.js');
  using seed = shake256(input, 64);
  const scheme = kem === Kem.mlKem768 ? ml_kem768 : ml_kem1024;
  return new Secret(seed.use((bytes) => scheme.keygen(bytes).secretKey));
}

/** Whom a disk is sealed to for a recovery code: its public half. */
export async function recoveryRecipient(
  secret: Secret,
  kem: KemId,
  label: string,
): Promise<Recipient> {
  using key = await derive(secret, kem);
  return { provider: liboqs, kem, encapsulationKey: await publicHalfOf(kem, key), label };
}

/** The key of a recovery code that opens one of these slots. Kind `no_slot` when none is for it. */
export async function recoveryIdentity(
  secret: Secret,
  slots: readonly SlotDescription[],
): Promise<Identity> {
  for (const kem of Object.values(Kem)) {
    const key = await derive(secret, kem);
    const fingerprint = fingerprintOf(await publicHalfOf(kem, key));
    if (slots.some((slot) => slot.fingerprint === toHex(fingerprint))) {
      return softwareIdentity(kem, key, fingerprint);
    }
    key.wipe();
  }
  throw new PqblkError('no_slot', 'no slot for this recovery code', {
    operation: 'open key area',
    hint: 'it may be of another disk, or its slot was wiped and used again',
  });
}
