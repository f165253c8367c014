// Room keys/pkcs11: what a module says of itself and of its tokens.
import { TokenFlag } from './numbers.js';
import type { TokenUri } from './uri.js';
import type { MessageReader } from './wire.js';

export interface ModuleInfo {
  readonly cryptoki: string;
  readonly manufacturer: string;
  readonly library: string;
  readonly version: string;
  readonly interface: string;
}

/** How a token lets somebody in. */
export type LoginWay = 'pin' | 'pinpad' | 'none';

export interface TokenInfo {
  readonly slotId: number;
  readonly slot: string;
  readonly label: string;
  readonly manufacturer: string;
  readonly model: string;
  readonly serial: string;
  readonly flags: number;
  readonly login: LoginWay;
  /** False while there is no user PIN yet. */
  readonly ready: boolean;
}

export function isMeant(uri: TokenUri, token: TokenInfo): boolean {
  return (
    (uri.token === undefined || uri.token === token.label) &&
    (uri.manufacturer === undefined || uri.manufacturer === token.manufacturer) &&
    (uri.model === undefined || uri.model === token.model) &&
    (uri.serial === undefined || uri.serial === token.serial) &&
    (uri.slotId === undefined || uri.slotId === token.slotId)
  );
}

/** The attributes that tell a token from others. Slot numbers change with the ports. */
export function nameOf(token: TokenInfo): TokenUri {
  return {
    ...(token.label && { token: token.label }),
    ...(token.serial && { serial: token.serial }),
    ...(!token.label && !token.serial && { slotId: token.slotId }),
  };
}

export function readHandles(reply: MessageReader): bigint[] {
  return Array.from({ length: reply.u32() }, () => reply.u64());
}

function readVersion(reply: MessageReader): string {
  return `${reply.u8()}.${reply.u8()}`;
}

export function readLoaded(reply: MessageReader): { info: ModuleInfo; slots: bigint[] } {
  const info = {
    cryptoki: readVersion(reply),
    manufacturer: reply.text(),
    library: reply.text(),
    version: readVersion(reply),
    interface: readVersion(reply),
  };
  return { info, slots: readHandles(reply) };
}

export function readToken(slotId: number, reply: MessageReader): TokenInfo {
  const slot = reply.text();
  const [label, manufacturer] = [reply.text(), reply.text()];
  const [model, serial] = [reply.text(), reply.text()];
  const flags = Number(reply.u64());
  const pinpad = (flags & TokenFlag.protectedAuthenticationPath) !== 0;
  const loginRequired = (flags & TokenFlag.loginRequired) !== 0;
  return {
    slotId,
    slot,
    label,
    manufacturer,
    model,
    serial,
    flags,
    login: !loginRequired ? 'none' : pinpad ? 'pinpad' : 'pin',
    ready: !loginRequired || (flags & TokenFlag.userPinInitialized) !== 0,
  };
}
