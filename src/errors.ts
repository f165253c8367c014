// Room errors: what can go wrong, told once for the whole TypeScript side.
//
// The table below is the only list of error kinds, their `.code` strings and the exit codes of the
// command line. It knows no disk, no key and no command; every other room imports it. Messages
// never carry secrets: what is put into a PqblkError may end up in a log or a bug report.

/**
 * Kind → `.code` of the API and exit code of the command line. Kinds the native engine raises carry
 * its names (native/base/error.h). `wrong_key` and `no_slot` share an exit code on purpose: to a
 * script both say "this key does not open this disk"; every other kind has a number of its own.
 */
export const ERROR_TABLE = {
  general: { code: 'PQBLK_ERROR', exitCode: 1 },
  usage: { code: 'PQBLK_USAGE', exitCode: 2 },
  wrong_key: { code: 'PQBLK_WRONG_KEY', exitCode: 3 },
  no_slot: { code: 'PQBLK_NO_SLOT', exitCode: 3 },
  token_unavailable: { code: 'PQBLK_TOKEN_UNAVAILABLE', exitCode: 4 },
  integrity: { code: 'PQBLK_INTEGRITY', exitCode: 5 },
  policy: { code: 'PQBLK_POLICY', exitCode: 6 },
  interrupted: { code: 'PQBLK_INTERRUPTED', exitCode: 7 },
  locked: { code: 'PQBLK_LOCKED', exitCode: 8 },
  no_space: { code: 'PQBLK_NO_SPACE', exitCode: 9 },
  not_found: { code: 'PQBLK_NOT_FOUND', exitCode: 10 },
  corrupt: { code: 'PQBLK_CORRUPT', exitCode: 11 },
  unsupported: { code: 'PQBLK_UNSUPPORTED', exitCode: 12 },
  read_only: { code: 'PQBLK_READ_ONLY', exitCode: 13 },
  io_error: { code: 'PQBLK_IO', exitCode: 14 },
  rollback: { code: 'PQBLK_ROLLBACK', exitCode: 15 },
  vmk_changed: { code: 'PQBLK_VMK_CHANGED', exitCode: 16 },
  slot_revoked: { code: 'PQBLK_SLOT_REVOKED', exitCode: 17 },
  key_area_damaged: { code: 'PQBLK_KEY_AREA_DAMAGED', exitCode: 18 },
  uuid_mismatch: { code: 'PQBLK_UUID_MISMATCH', exitCode: 19 },
  newer_version: { code: 'PQBLK_NEWER_VERSION', exitCode: 20 },
  no_key: { code: 'PQBLK_NO_KEY', exitCode: 21 },
  wrong_passphrase: { code: 'PQBLK_WRONG_PASSPHRASE', exitCode: 22 },
  passphrase_needed: { code: 'PQBLK_PASSPHRASE_NEEDED', exitCode: 23 },
  bad_key: { code: 'PQBLK_BAD_KEY', exitCode: 24 },
  permission: { code: 'PQBLK_PERMISSION', exitCode: 25 },
  exists: { code: 'PQBLK_EXISTS', exitCode: 26 },
  invalid_argument: { code: 'PQBLK_INVALID_ARGUMENT', exitCode: 27 },
  out_of_range: { code: 'PQBLK_OUT_OF_RANGE', exitCode: 28 },
  closed: { code: 'PQBLK_CLOSED', exitCode: 29 },
  canceled: { code: 'PQBLK_CANCELED', exitCode: 30 },
  needs_recovery: { code: 'PQBLK_NEEDS_RECOVERY', exitCode: 31 },
  no_random: { code: 'PQBLK_NO_RANDOM', exitCode: 32 },
  gate_refused: { code: 'PQBLK_GATE_REFUSED', exitCode: 33 },
  no_memory: { code: 'PQBLK_NO_MEMORY', exitCode: 34 },
  hypervisor: { code: 'PQBLK_HYPERVISOR', exitCode: 35 },
  timed_out: { code: 'PQBLK_TIMED_OUT', exitCode: 36 },
  // Tokens. token_unavailable (4): there is none to ask; the others say what became of asking.
  wrong_pin: { code: 'PQBLK_WRONG_PIN', exitCode: 40 },
  pin_locked: { code: 'PQBLK_PIN_LOCKED', exitCode: 41 },
  token_crashed: { code: 'PQBLK_TOKEN_CRASHED', exitCode: 42 },
  token_timeout: { code: 'PQBLK_TOKEN_TIMEOUT', exitCode: 43 },
  token_removed: { code: 'PQBLK_TOKEN_REMOVED', exitCode: 44 },
  token_session_lost: { code: 'PQBLK_TOKEN_SESSION_LOST', exitCode: 45 },
  token_refused: { code: 'PQBLK_TOKEN_REFUSED', exitCode: 46 },
  token_mistrusted: { code: 'PQBLK_TOKEN_MISTRUSTED', exitCode: 47 },
  bad_module: { code: 'PQBLK_BAD_MODULE', exitCode: 48 },
  bad_profile: { code: 'PQBLK_BAD_PROFILE', exitCode: 49 },
  bad_uri: { code: 'PQBLK_BAD_URI', exitCode: 50 },
  ambiguous: { code: 'PQBLK_AMBIGUOUS', exitCode: 51 },
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
