// Room keys/: a private key that fits on a piece of paper.
//
// 32 random bytes, written as four lines of 16 characters: 8 bytes of it and 2 that check them and the
// number of their line, so that a misread line is named. A KEM pair is made from the bytes, and its
// public half gets a slot like any other. What is drawn here is never stored: only the paper has it.
import { PqblkError } from '../errors.js';
import { ascii, concat, equalConstantTime, toHex } from './bytes.js';
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
  using symbols = symbolsOf(typed);
  const wanted = LINES * LINE_SYMBOLS;
  if (symbols.length !== wanted) {
    throw new PqblkError(
      'bad_key',
      `a recovery code has ${wanted} characters, not ${symbols.length}`,
    );
  }
  const secret = Secret.zeros(SECRET_BYTES);
  using line = Secret.zeros(DATA_BYTES + CHECK_BYTES);
  for (let index = 0; index < LINES; index += 1) {
    const from = index * LINE_SYMBOLS;
    symbols.use((all) =>
      line.use((bytes) => toBytes(all.subarray(from, from + LINE_SYMBOLS), bytes)),
    );
    const whole = line.use((bytes) => {
      const data = bytes.subarray(0, DATA_BYTES);
      secret.use((all) => all.set(data, index * DATA_BYTES));
      return equalConstantTime(checkOf(index, data), bytes.subarray(DATA_BYTES));
    });
    if (whole) continue;
    secret.wipe();
    throw new PqblkError('bad_key', `line ${index + 1} of the recovery code was misread`);
  }
  return secret;
}

/** Symbols of five bits, the first ones highest, to bytes. */
function toBytes(symbols: Uint8Array, bytes: Uint8Array): void {
  let [bits, pending, at] = [0, 0, 0];
  for (const symbol of symbols) {
    pending = ((pending << 5) | symbol) & 0xfff;
    bits += 5;
    if (bits < 8) continue;
    bits -= 8;
    bytes[at++] = pending >> bits;
  }
}

/**
 * The values of the symbols. Character by character, in memory that is wiped: of a string that holds a
 * code, a server would keep copies for its life.
 */
function symbolsOf(typed: Secret): Secret {
  using values = Secret.zeros(typed.length);
  let length = 0;
  for (const character of meaningfulIn(typed)) {
    const value =
      character.length === 1 ? ALPHABET.indexOf(LOOKALIKES[character] ?? character) : -1;
    if (value < 0) {
      throw new PqblkError('bad_key', `a recovery code has no ${JSON.stringify(character)}`);
    }
    const at = length++;
    values.use((bytes) => bytes.fill(value, at, at + 1));
  }
  return values.use((bytes) => Secret.copyOf(bytes.subarray(0, length)));
}

/** The characters that are no space, dash, line number or prefix, in upper case. */
function* meaningfulIn(typed: Secret): Generator<string, void, void> {
  let beginsLine = true;
  let isPrefixed = false;
  for (let at = 0; at < typed.length; ) {
    const { character, next } = characterAt(typed, at);
    const isNumber =
      beginsLine && /[1-4]/.test(character) && /[.:)]/.test(characterAt(typed, next).character);
    if (!isPrefixed && isPrefixAt(typed, at)) {
      isPrefixed = true;
      at += RECOVERY_PREFIX.length;
      beginsLine = false;
    } else if (isNumber) {
      at = next + 1;
      beginsLine = false;
    } else {
      at = next;
      if (/[\n\r\u2028\u2029]/.test(character)) beginsLine = true;
      if (/[\s\p{Dash_Punctuation}]/u.test(character)) continue;
      beginsLine = false;
      yield character;
    }
  }
}

const isPrefixAt = (typed: Secret, at: number) =>
  [...RECOVERY_PREFIX].every(
    (symbol, index) => characterAt(typed, at + index).character === symbol,
  );

const utf8 = new TextDecoder('utf-8', { ignoreBOM: true }); // else a mark would become nothing

/** One character of UTF-8, in upper case; empty at the end. */
function characterAt(typed: Secret, at: number): { character: string; next: number } {
  return typed.use((bytes) => {
    let next = at + 1;
    while (((bytes[next] ?? 0) & 0xc0) === 0x80) next += 1;
    const character = utf8.decode(bytes.subarray(at, next)).toUpperCase();
    return { character, next };
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
