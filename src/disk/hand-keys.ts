// Room disk/: the keys of a sealed disk for processes that are not Node (docs/handing-keys.md).
//
// The disk itself is not opened. The bytes that go out are made and wiped in the addon.
import { PqblkError } from '../errors.js';
import { calling, type LongWork, longCall, type NativeKeys, native } from '../native.js';
import type { KeyOptions } from './types.js';
import { type UnlockedVolume, unlock } from './unlock.js';

export interface KeyAgentOptions extends KeyOptions, Pick<LongWork, 'signal'> {
  /** Path of the Unix socket, mode 0600. Only processes of the same user are answered. */
  socket: string;
  /** How often the keys are handed over before the agent ends. Default 1. */
  count?: number | undefined;
  /** Milliseconds until the agent ends, whoever asked by then. Default: no limit. */
  timeoutMs?: number | undefined;
  /** Called once clients can connect. */
  onReady?: (() => void) | undefined;
}

const UINT32_MAX = 2 ** 32 - 1;

/**
 * Unlocks the disk at `path` and writes its keys to the open descriptor `fd`, which stays open. Kinds
 * `permission` (a terminal, or a file that others have access to), `io_error`, and those of unlocking.
 */
export async function handKeys(path: string, options: KeyOptions & { fd: number }): Promise<void> {
  const fd = requireCount('fd', options.fd, 0);
  using volume = await unlock(path, options);
  await calling(() =>
    volume.lendKeys((keys) => native().handKeys({ fd, uuid: volume.uuid }, bound(volume, keys))),
  );
  await volume.record();
}

/**
 * Unlocks the disk at `path` and hands its keys to who asks on a socket; resolves when they were handed
 * over `count` times. Kinds `exists` (the socket), `canceled` (by `signal` or the time limit), and those
 * of unlocking. The keys are wiped and the socket is removed in any case.
 */
export async function serveKeys(path: string, options: KeyAgentOptions): Promise<void> {
  const { socket, signal, onReady } = options;
  const limits = {
    count: requireCount('count', options.count ?? 1, 1),
    timeoutMs: requireCount('timeoutMs', options.timeoutMs ?? 0, 0),
  };
  const agent = await listen(path, options, { path: socket, ...limits });
  onReady?.();
  await longCall({ signal }, (token) => agent.serve(token));
}

/** The volume's keys are the agent's alone from here on. */
async function listen(
  path: string,
  options: KeyOptions,
  how: { path: string; count: number; timeoutMs: number },
) {
  using volume: UnlockedVolume = await unlock(path, options);
  const agent = await calling(() =>
    volume.lendKeys((keys) =>
      native().keyAgent({ ...how, uuid: volume.uuid }, bound(volume, keys)),
    ),
  );
  await volume.record();
  return agent;
}

/**
 * While a rotation is under way the bundle is good for this key area only: who writes under a data key that
 * was given up writes for nobody. In a quiet time no change of the key area takes one of the keys back, but for
 * a rotation that has ended, and that the engine sees.
 */
function bound({ rotating }: UnlockedVolume, keys: NativeKeys): NativeKeys {
  return rotating ? keys : { ...keys, keyAreaState: undefined };
}

function requireCount(name: string, value: number, least: number): number {
  if (Number.isInteger(value) && value >= least && value <= UINT32_MAX) return value;
  const range = `from ${least} to ${UINT32_MAX}`;
  throw new PqblkError('invalid_argument', `${name}: expected an integer ${range}, not ${value}`);
}
