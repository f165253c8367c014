// Room keys/: who runs this process, for the audit log.
//
// `user` is whose rights it has. Behind sudo, su or a service that is not who asked for it: sudo tells
// in the environment, which that user can change, and the kernel keeps the user id of the login, which
// only root can.
import { readFileSync } from 'node:fs';
import { userInfo } from 'node:os';

/** An id that was never set, of processes that no login is behind. */
const NO_LOGIN = 0xffff_ffff;
const NAME_LENGTH_MAX = 64;

export interface Who {
  /** The name, or `uid N` where the system has none for it. */
  readonly user: string;
  /** Who called sudo, as the environment says. */
  readonly sudoUser?: string;
  /** User id of the login, where that is another one. */
  readonly loginUid?: number;
}

export function whoAsks(env: NodeJS.ProcessEnv = process.env): Who {
  const uid = process.geteuid?.() ?? 0;
  const sudoUser = env.SUDO_USER?.slice(0, NAME_LENGTH_MAX);
  const login = loginUid();
  return {
    user: nameOf(uid),
    ...(sudoUser && { sudoUser }),
    ...(login !== undefined && login !== uid && { loginUid: login }),
  };
}

/** Containers and services run as ids that no passwd knows. */
function nameOf(uid: number): string {
  try {
    return userInfo().username;
  } catch {
    return `uid ${uid}`;
  }
}

function loginUid(): number | undefined {
  try {
    const uid = Number(readFileSync('/proc/self/loginuid', 'ascii'));
    return Number.isSafeInteger(uid) && uid !== NO_LOGIN ? uid : undefined;
  } catch {
    return undefined; // a kernel without it
  }
}
