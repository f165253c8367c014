// Room keys/pkcs11: how many wrong PINs a token still bears, and not trying the last one unasked.
import { PqblkError } from '../../errors.js';
import { TokenFlag } from './numbers.js';

/** Whose PIN it is: how the token tells of its tries, and what is left when it is locked. */
export interface PinOwner {
  readonly pin: string;
  readonly locked: number;
  readonly finalTry: number;
  readonly wayOut: string;
  /** Of `pqblk token`. */
  readonly command: string;
}

export const USER: PinOwner = {
  pin: 'PIN',
  locked: TokenFlag.userPinLocked,
  finalTry: TokenFlag.userPinFinalTry,
  wayOut: 'the security officer of the token can set a new one',
  command: 'test',
};
export const SECURITY_OFFICER: PinOwner = {
  pin: "security officer's PIN",
  locked: TokenFlag.soPinLocked,
  finalTry: TokenFlag.soPinFinalTry,
  wayOut: 'only erasing the token sets a new one; its vendor has a tool for that',
  command: 'init',
};

/** Kinds `pin_locked`; `policy` when a wrong PIN would lock the token, unless `lastTry`. */
export function requireTries(
  { label, flags }: { readonly label: string; readonly flags: number },
  who: PinOwner,
  { module: path, lastTry }: { module: string; lastTry?: boolean | undefined },
): void {
  if (flags & who.locked) {
    const message = `the ${who.pin} of token "${label}" is locked`;
    throw new PqblkError('pin_locked', message, { path, hint: who.wayOut });
  }
  if (flags & who.finalTry && !lastTry) {
    const message = `one more wrong ${who.pin} locks the token "${label}"; it was not tried`;
    const hint = `when you are sure of the PIN: \`pqblk token ${who.command} --last-try\``;
    throw new PqblkError('policy', message, { path, hint });
  }
}
