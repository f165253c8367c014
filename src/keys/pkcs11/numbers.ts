// Room keys/pkcs11: the numbers of PKCS#11 that this room uses, and what a token's refusals mean.
//
// From the tables of OASIS PKCS#11 2.40 to 3.2. Mechanisms and key types of KEMs are not here: they
// differ between tokens and belong to profiles.
import type { ErrorKind } from '../../errors.js';

export const ObjectClass = { publicKey: 2, privateKey: 3, secretKey: 4 } as const;

export const Attribute = {
  class: 0x000,
  token: 0x001,
  private: 0x002,
  label: 0x003,
  value: 0x011,
  keyType: 0x100,
  id: 0x102,
  sensitive: 0x103,
  encrypt: 0x104,
  decrypt: 0x105,
  derive: 0x10c,
  valueLength: 0x161,
  extractable: 0x162,
  neverExtractable: 0x164,
  parameterSet: 0x61d,
  encapsulate: 0x633,
  decapsulate: 0x634,
} as const;

export const GENERIC_SECRET = 0x10; // CKK_GENERIC_SECRET

export const TokenFlag = {
  loginRequired: 0x4,
  userPinInitialized: 0x8,
  protectedAuthenticationPath: 0x100,
  tokenInitialized: 0x400,
  userPinCountLow: 0x10000,
  userPinFinalTry: 0x20000,
  userPinLocked: 0x40000,
  soPinFinalTry: 0x200000,
  soPinLocked: 0x400000,
} as const;

interface Meaning {
  readonly name: string;
  readonly kind: ErrorKind;
  readonly text: string;
  readonly hint?: string;
}

const removed = { kind: 'token_removed', text: 'the token was removed' } as const;
const lost = {
  kind: 'token_session_lost',
  text: 'the token ended the session',
  hint: 'run the command again: it goes on with what was begun',
} as const;
const unsuited = {
  kind: 'unsupported',
  text: 'the token does not do this',
  hint: 'does the profile fit the token? `pqblk token list` shows what it offers',
} as const;
const noRights = { kind: 'permission', text: 'the token does not allow this' } as const;

/** Every CKR_… value that deserves a kind of its own; the rest is `token_refused` with its name. */
export const MEANINGS: Readonly<Record<number, Meaning>> = {
  48: { name: 'CKR_DEVICE_ERROR', kind: 'token_refused', text: 'the token reports a fault' },
  49: { name: 'CKR_DEVICE_MEMORY', kind: 'token_refused', text: 'the token is full' },
  50: { name: 'CKR_DEVICE_REMOVED', ...removed },
  224: { name: 'CKR_TOKEN_NOT_PRESENT', ...removed },
  160: {
    name: 'CKR_PIN_INCORRECT',
    kind: 'wrong_pin',
    text: 'wrong PIN',
    hint: 'it was tried once; too many wrong PINs lock a token',
  },
  161: { name: 'CKR_PIN_INVALID', kind: 'wrong_pin', text: 'the token takes no such PIN' },
  162: {
    name: 'CKR_PIN_LEN_RANGE',
    kind: 'wrong_pin',
    text: 'the token takes no PIN of this length',
  },
  163: { name: 'CKR_PIN_EXPIRED', kind: 'pin_locked', text: 'the PIN has expired' },
  164: {
    name: 'CKR_PIN_LOCKED',
    kind: 'pin_locked',
    text: 'the PIN is locked',
    hint: 'the security officer of the token can set a new one',
  },
  258: {
    name: 'CKR_USER_PIN_NOT_INITIALIZED',
    kind: 'token_unavailable',
    text: 'the token has no user PIN yet',
    hint: '`pqblk token init` gives it one',
  },
  257: { name: 'CKR_USER_NOT_LOGGED_IN', ...lost },
  176: { name: 'CKR_SESSION_CLOSED', ...lost },
  179: { name: 'CKR_SESSION_HANDLE_INVALID', ...lost },
  96: { name: 'CKR_KEY_HANDLE_INVALID', ...lost },
  130: { name: 'CKR_OBJECT_HANDLE_INVALID', ...lost },
  84: { name: 'CKR_FUNCTION_NOT_SUPPORTED', ...unsuited },
  99: { name: 'CKR_KEY_TYPE_INCONSISTENT', ...unsuited },
  112: { name: 'CKR_MECHANISM_INVALID', ...unsuited },
  113: { name: 'CKR_MECHANISM_PARAM_INVALID', ...unsuited },
  19: { name: 'CKR_ATTRIBUTE_VALUE_INVALID', ...unsuited },
  18: { name: 'CKR_ATTRIBUTE_TYPE_INVALID', ...unsuited },
  208: { name: 'CKR_TEMPLATE_INCOMPLETE', ...unsuited },
  209: { name: 'CKR_TEMPLATE_INCONSISTENT', ...unsuited },
  104: { name: 'CKR_KEY_FUNCTION_NOT_PERMITTED', ...noRights },
  181: { name: 'CKR_SESSION_READ_ONLY', ...noRights },
  226: {
    name: 'CKR_TOKEN_WRITE_PROTECTED',
    kind: 'read_only',
    text: 'the token is write-protected',
  },
  177: { name: 'CKR_SESSION_COUNT', kind: 'token_unavailable', text: 'the token is busy' },
  3: {
    name: 'CKR_SLOT_ID_INVALID',
    kind: 'token_unavailable',
    text: 'there is no such slot',
  },
  225: {
    name: 'CKR_TOKEN_NOT_RECOGNIZED',
    kind: 'token_unavailable',
    text: 'the module does not know this token',
  },
};

const OTHER_NAMES: Readonly<Record<number, string>> = {
  1: 'CKR_CANCEL',
  2: 'CKR_HOST_MEMORY',
  5: 'CKR_GENERAL_ERROR',
  6: 'CKR_FUNCTION_FAILED',
  7: 'CKR_ARGUMENTS_BAD',
  32: 'CKR_DATA_INVALID',
  33: 'CKR_DATA_LEN_RANGE',
  64: 'CKR_ENCRYPTED_DATA_INVALID',
  65: 'CKR_ENCRYPTED_DATA_LEN_RANGE',
  80: 'CKR_FUNCTION_CANCELED',
  144: 'CKR_OPERATION_ACTIVE',
  336: 'CKR_BUFFER_TOO_SMALL',
  400: 'CKR_CRYPTOKI_NOT_INITIALIZED',
};

/** What CKR number `rv` is to pqblk. */
export function meaningOf(rv: bigint): Meaning {
  const number = Number(rv);
  const known = MEANINGS[number];
  if (known) return known;
  const name = OTHER_NAMES[number] ?? `CKR 0x${rv.toString(16)}`;
  return { name, kind: 'token_refused', text: 'the token refuses' };
}
