// Room errors: what can go wrong, told once for the whole TypeScript side.
//
// The table below is the only list of error kinds, their `.code` strings and the exit codes of the
// command line. It knows no disk, no key and no command; every other room imports it. Messages
// never carry secrets: what is put into a PqblkError may end up in a log or a bug report.

/**
 * Kind → `.code` of the API, exit code of the command line, and what it tells. Kinds the native engine raises carry
 * its names (native/base/error.h). `wrong_key` and `no_slot` share an exit code on purpose: to a
 * script both say "this key does not open this disk"; every other kind has a number of its own.
 */
export const ERROR_TABLE = {
  general: {
    code: 'PQBLK_ERROR',
    exitCode: 1,
    means: 'something else failed; the message says what',
  },
  usage: { code: 'PQBLK_USAGE', exitCode: 2, means: 'the command line is wrong' },
  wrong_key: {
    code: 'PQBLK_WRONG_KEY',
    exitCode: 3,
    means: 'this key does not open this disk, or its slot was tampered with',
  },
  no_slot: { code: 'PQBLK_NO_SLOT', exitCode: 3, means: 'the disk has no slot for this key' },
  token_unavailable: { code: 'PQBLK_TOKEN_UNAVAILABLE', exitCode: 4, means: 'no token to ask' },
  integrity: { code: 'PQBLK_INTEGRITY', exitCode: 5, means: 'data does not authenticate' },
  policy: {
    code: 'PQBLK_POLICY',
    exitCode: 6,
    means: 'a rule for keys forbids it, or a second person or a confirmation is missing',
  },
  interrupted: {
    code: 'PQBLK_INTERRUPTED',
    exitCode: 7,
    means: 'stopped in the middle: the same command goes on',
  },
  locked: {
    code: 'PQBLK_LOCKED',
    exitCode: 8,
    means: 'somebody else has it open, or is changing it',
  },
  no_space: { code: 'PQBLK_NO_SPACE', exitCode: 9, means: 'no room is left' },
  not_found: {
    code: 'PQBLK_NOT_FOUND',
    exitCode: 10,
    means: 'no such file or directory, or nothing to do it to',
  },
  corrupt: { code: 'PQBLK_CORRUPT', exitCode: 11, means: 'the file contradicts itself' },
  unsupported: {
    code: 'PQBLK_UNSUPPORTED',
    exitCode: 12,
    means: 'this version, host or token cannot do that',
  },
  read_only: { code: 'PQBLK_READ_ONLY', exitCode: 13, means: 'it may only be read' },
  io_error: { code: 'PQBLK_IO', exitCode: 14, means: 'the storage failed a request' },
  rollback: {
    code: 'PQBLK_ROLLBACK',
    exitCode: 15,
    means: 'the key area is older than this host has seen',
  },
  vmk_changed: {
    code: 'PQBLK_VMK_CHANGED',
    exitCode: 16,
    means: 'the master key is another one than this host has seen',
  },
  slot_revoked: {
    code: 'PQBLK_SLOT_REVOKED',
    exitCode: 17,
    means: 'the slot of this key was revoked',
  },
  key_area_damaged: {
    code: 'PQBLK_KEY_AREA_DAMAGED',
    exitCode: 18,
    means: 'a copy of the key area is damaged, or both',
  },
  uuid_mismatch: { code: 'PQBLK_UUID_MISMATCH', exitCode: 19, means: 'it belongs to another disk' },
  newer_version: {
    code: 'PQBLK_NEWER_VERSION',
    exitCode: 20,
    means: 'it was made by a newer version',
  },
  no_key: {
    code: 'PQBLK_NO_KEY',
    exitCode: 21,
    means: 'no such key in the store or on the token, or none that fits',
  },
  wrong_passphrase: {
    code: 'PQBLK_WRONG_PASSPHRASE',
    exitCode: 22,
    means: 'the passphrase is wrong',
  },
  passphrase_needed: {
    code: 'PQBLK_PASSPHRASE_NEEDED',
    exitCode: 23,
    means: 'a passphrase or PIN is needed and there is none',
  },
  bad_key: { code: 'PQBLK_BAD_KEY', exitCode: 24, means: 'the key is damaged or no key' },
  permission: {
    code: 'PQBLK_PERMISSION',
    exitCode: 25,
    means: 'not allowed, or others could get at it',
  },
  exists: {
    code: 'PQBLK_EXISTS',
    exitCode: 26,
    means: 'it would overwrite something, or the name is taken',
  },
  invalid_argument: {
    code: 'PQBLK_INVALID_ARGUMENT',
    exitCode: 27,
    means: 'a value or a file is not of the expected form',
  },
  out_of_range: { code: 'PQBLK_OUT_OF_RANGE', exitCode: 28, means: 'beyond the end of the disk' },
  closed: { code: 'PQBLK_CLOSED', exitCode: 29, means: 'the disk or the connection was closed' },
  canceled: {
    code: 'PQBLK_CANCELED',
    exitCode: 30,
    means: 'stopped on request; nothing is left half done',
  },
  needs_recovery: {
    code: 'PQBLK_NEEDS_RECOVERY',
    exitCode: 31,
    means: 'it was not closed cleanly and cannot be recovered this way',
  },
  no_random: { code: 'PQBLK_NO_RANDOM', exitCode: 32, means: 'the random source failed' },
  gate_refused: {
    code: 'PQBLK_GATE_REFUSED',
    exitCode: 33,
    means: 'a backing file was not allowed by who opens the disk',
  },
  no_memory: { code: 'PQBLK_NO_MEMORY', exitCode: 34, means: 'no memory' },
  hypervisor: { code: 'PQBLK_HYPERVISOR', exitCode: 35, means: 'QEMU or libvirt refused' },
  timed_out: { code: 'PQBLK_TIMED_OUT', exitCode: 36, means: 'no answer in time' },
  superseded: {
    code: 'PQBLK_SUPERSEDED',
    exitCode: 37,
    means: 'somebody else has begun something else meanwhile',
  },
  slot_not_found: {
    code: 'PQBLK_SLOT_NOT_FOUND',
    exitCode: 38,
    means: 'the disk has no slot of that name',
  },
  data_key_missing: {
    code: 'PQBLK_DATA_KEY_MISSING',
    exitCode: 39,
    means: 'the key area does not hold the data keys of this disk',
  },
  // Tokens. token_unavailable (4): there is none to ask; the others say what became of asking.
  wrong_pin: {
    code: 'PQBLK_WRONG_PIN',
    exitCode: 40,
    means: 'the PIN is wrong; it was tried once',
  },
  pin_locked: {
    code: 'PQBLK_PIN_LOCKED',
    exitCode: 41,
    means: 'the PIN is locked, or has expired',
  },
  token_crashed: { code: 'PQBLK_TOKEN_CRASHED', exitCode: 42, means: "the token's module crashed" },
  token_timeout: {
    code: 'PQBLK_TOKEN_TIMEOUT',
    exitCode: 43,
    means: 'the token did not answer in time',
  },
  token_removed: { code: 'PQBLK_TOKEN_REMOVED', exitCode: 44, means: 'the token was removed' },
  token_session_lost: {
    code: 'PQBLK_TOKEN_SESSION_LOST',
    exitCode: 45,
    means: 'the token ended the session',
  },
  token_refused: { code: 'PQBLK_TOKEN_REFUSED', exitCode: 46, means: 'the token refused the call' },
  token_mistrusted: {
    code: 'PQBLK_TOKEN_MISTRUSTED',
    exitCode: 47,
    means: 'the token does not compute what it should',
  },
  bad_module: {
    code: 'PQBLK_BAD_MODULE',
    exitCode: 48,
    means: 'the file is no usable PKCS#11 module',
  },
  bad_profile: {
    code: 'PQBLK_BAD_PROFILE',
    exitCode: 49,
    means: 'the profile of the token is malformed',
  },
  bad_uri: { code: 'PQBLK_BAD_URI', exitCode: 50, means: 'the PKCS#11 URI is malformed' },
  ambiguous: { code: 'PQBLK_AMBIGUOUS', exitCode: 51, means: 'the name fits several' },
  // Slots, and the audit log.
  slot_exists: { code: 'PQBLK_SLOT_EXISTS', exitCode: 52, means: 'the key has a slot already' },
  key_expired: {
    code: 'PQBLK_KEY_EXPIRED',
    exitCode: 53,
    means: 'the slot is past its date or age, and the policy refuses those',
  },
  audit_log: {
    code: 'PQBLK_AUDIT_LOG',
    exitCode: 54,
    means: 'the audit log cannot be read or written',
  },
  audit_broken: {
    code: 'PQBLK_AUDIT_BROKEN',
    exitCode: 55,
    means: 'the audit log is not whole, or not that of this disk',
  },
  output: {
    code: 'PQBLK_OUTPUT',
    exitCode: 56,
    means: 'stdout took no more; what was to be done is done',
  },
} as const;

export type ErrorKind = keyof typeof ERROR_TABLE;
export type ErrorCode = (typeof ERROR_TABLE)[ErrorKind]['code'];

/** Where it happened and what to do about it; every field is optional. */
export interface ErrorDetails {
  /** The file, image or key file concerned. */
  path?: string | undefined;
  /** What was being done, as a short verb phrase ("read", "open backing file"). */
  operation?: string | undefined;
  /** Byte offset in `path`. A bigint when it came from the engine beyond 2^53. */
  offset?: number | bigint | undefined;
  /** What the user can do. */
  hint?: string | undefined;
  cause?: unknown;
}

/** What the native addon raises; its shell turns it into a PqblkError with `fromNative`. */
export interface NativeErrorShape {
  kind: string;
  message: string;
  path?: string | undefined;
  operation?: string | undefined;
  offset?: number | bigint | undefined;
}

/** The one error class of the package: a stable kind and code, where it happened, and the cause. */
export class PqblkError extends Error {
  override readonly name = 'PqblkError';
  readonly kind: ErrorKind;
  readonly code: ErrorCode;
  readonly exitCode: number;
  readonly path?: string;
  readonly operation?: string;
  readonly offset?: number | bigint;
  readonly hint?: string;

  constructor(kind: ErrorKind, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.kind = kind;
    this.code = ERROR_TABLE[kind].code;
    this.exitCode = ERROR_TABLE[kind].exitCode;
    if (details.path) this.path = details.path;
    if (details.operation) this.operation = details.operation;
    if (details.offset !== undefined) this.offset = details.offset;
    if (details.hint) this.hint = details.hint;
  }

  /** One line for people: `path: operation at offset N: message`. The hint is not part of it. */
  toLine(): string {
    let where = this.operation ?? '';
    if (this.offset !== undefined) where += `${where ? ' ' : ''}at offset ${this.offset}`;
    return [this.path, where, this.message].filter(Boolean).join(': ');
  }

  /** For `--json` output. The cause is left out: it may hold anything. */
  toJSON(): Record<string, unknown> {
    return {
      code: this.code,
      exitCode: this.exitCode,
      message: this.message,
      ...(this.path !== undefined && { path: this.path }),
      ...(this.operation !== undefined && { operation: this.operation }),
      ...(this.offset !== undefined && {
        offset: typeof this.offset === 'bigint' ? this.offset.toString() : this.offset,
      }),
      ...(this.hint !== undefined && { hint: this.hint }),
    };
  }
}

function isErrorKind(name: string): name is ErrorKind {
  return Object.hasOwn(ERROR_TABLE, name);
}

/** Turns an error of the native engine into a PqblkError; an unknown kind becomes `general`. */
export function fromNative(native: NativeErrorShape): PqblkError {
  const { kind, message, path, operation, offset } = native;
  if (isErrorKind(kind)) return new PqblkError(kind, message, { path, operation, offset });
  return new PqblkError('general', `${message} (${kind})`, { path, operation, offset });
}

const KIND_OF_ERRNO: Readonly<Record<string, ErrorKind>> = {
  ENOENT: 'not_found',
  ENOTDIR: 'not_found',
  EACCES: 'permission',
  EPERM: 'permission',
  ELOOP: 'permission',
  EEXIST: 'exists',
  ENOSPC: 'no_space',
  EDQUOT: 'no_space',
  EFBIG: 'no_space',
  EROFS: 'read_only',
  EINVAL: 'invalid_argument',
  EBADF: 'invalid_argument',
  EISDIR: 'invalid_argument',
  ENXIO: 'invalid_argument',
  ENOMEM: 'no_memory',
};

/** Turns what node:fs throws into a PqblkError; a PqblkError passes through unchanged. */
export function fromSystem(error: unknown, details: ErrorDetails = {}): PqblkError {
  if (error instanceof PqblkError) return error;
  const errno = (error as NodeJS.ErrnoException | undefined)?.code ?? '';
  const kind = KIND_OF_ERRNO[errno] ?? (/^E[A-Z0-9]+$/.test(errno) ? 'io_error' : 'general');
  const message = error instanceof Error ? error.message : String(error);
  return new PqblkError(kind, message, { ...details, cause: error });
}

/** The exit code of any thrown value: 1 when it is none of ours. */
export function exitCodeOf(error: unknown): number {
  return error instanceof PqblkError ? error.exitCode : ERROR_TABLE.general.exitCode;
}
