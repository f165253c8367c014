// Room disk/: serving an open disk to a hypervisor over vhost-user-blk.
//
// Translates options and answers; the server is native/export/vhost_user.h.
import { PqblkError } from '../errors.js';
import { calling, type NativeDisk, type NativeVhostUserServer } from '../native.js';
import { DiskServer, given, type OnReport } from './server.js';

export interface VhostUserOptions {
  /** Unix socket to make, mode 0600. A stale one is replaced; kind `exists` when one is in use. */
  path?: string | undefined;
  /**
   * Instead: an inherited descriptor, of a listening socket or of the connection to the front-end.
   * It belongs to the server from then on, unless it is no Unix stream socket (`invalid_argument`).
   */
  fd?: number | undefined;
  /** Rings of the device, 1 to 64. Default: as many as the disk has queues. */
  queues?: number | undefined;
  /** What a front-end did wrong, why a request failed. The server serves on. */
  onReport?: OnReport | undefined;
}

export interface VhostUserStats {
  /** A front-end is there. */
  readonly connected: boolean;
  /** Of the device. */
  readonly rings: number;
  /** Of those, in use by the guest now. */
  readonly runningRings: number;
  /** Front-ends so far. */
  readonly accepted: number;
  /** Turned away: another one was there. */
  readonly refusedFrontEnds: number;
  /** Answered; of those, with an error. */
  readonly requests: number;
  readonly errors: number;
}

/** A running server. It keeps the process alive until it, or its disk, is closed. */
export class VhostUserServer extends DiskServer<NativeVhostUserServer> {
  readonly path: string | undefined;

  /** Use `disk.serveVhostUser`. */
  constructor(handle: NativeVhostUserServer, options: VhostUserOptions, owner: object) {
    super(handle, owner, options.onReport);
    this.path = options.path;
  }

  /** False once it was closed, or the inherited connection has ended. */
  get serving(): boolean {
    return this.native.serving();
  }

  stats(): VhostUserStats {
    return this.native.stats() as unknown as VhostUserStats;
  }
}

/** Kinds `invalid_argument`, `exists` (the path is taken), `permission`, `not_found`. */
export async function serveVhostUser(
  disk: NativeDisk,
  owner: object,
  options: VhostUserOptions,
): Promise<VhostUserServer> {
  const { path, fd, queues } = options;
  if ((path === undefined) === (fd === undefined)) {
    throw new PqblkError('invalid_argument', 'vhost-user: expected either a path or a descriptor');
  }
  const handle = await calling(() => disk.serveVhostUser(given({ path, fd, queues })));
  return new VhostUserServer(handle, options, owner);
}
