// Room disk/: serving an open disk to others over NBD.
//
// Translates options and answers; the server is native/export/nbd_server.h.
import { PqblkError } from '../errors.js';
import { calling, type NativeDisk, type NativeNbdServer } from '../native.js';
import { DiskServer, given, type OnReport } from './server.js';

export interface NbdTls {
  /** Lines `name:hex` as GnuTLS's psktool writes them, readable by the owner only. */
  pskFile?: string | undefined;
  /** Directory of server-cert.pem, server-key.pem and ca-cert.pem, which signs clients' certificates. */
  certificates?: string | undefined;
}

export interface NbdOptions {
  /** Unix socket to make, mode 0600. A stale one is replaced. */
  path?: string | undefined;
  /** TCP: name or address to listen on; asks for `tls` or `insecure`. */
  host?: string | undefined;
  /** TCP. Default 0: any free port. */
  port?: number | undefined;
  /** With it, clients that do not start TLS are refused, on Unix sockets too. */
  tls?: NbdTls | undefined;
  /** TCP in plain text, or TLS without ca-cert.pem: whoever reaches the port has the disk. */
  insecure?: boolean | undefined;
  /** Default: the empty name, which is accepted in any case. */
  exportName?: string | undefined;
  description?: string | undefined;
  /** Clients at once. Default 32. */
  maxClients?: number | undefined;
  /** From the connection to the first request. Default 10. */
  handshakeSeconds?: number | undefined;
  /** Silence in the middle of a message. Default 30. */
  stallSeconds?: number | undefined;
  /** Silence between messages. Default: no limit, a guest may sleep. */
  idleSeconds?: number | undefined;
  /** What went wrong for a client: failed requests, refused handshakes. The server serves on. */
  onReport?: OnReport | undefined;
}

export interface NbdStats {
  readonly clients: number;
  readonly negotiating: number;
  readonly accepted: number;
  readonly refusedClients: number;
  readonly failedHandshakes: number;
  readonly timeouts: number;
  readonly reads: number;
  readonly writes: number;
  readonly flushes: number;
  readonly trims: number;
  readonly caches: number;
  readonly writeZeroes: number;
  readonly blockStatus: number;
  /** Requests that the disk failed. */
  readonly errors: number;
  /** Requests that the protocol or the export does not allow. */
  readonly refusedRequests: number;
  readonly receivedBytes: number;
  readonly sentBytes: number;
}

/** A running NBD server. It keeps the process alive until it, or its disk, is closed. */
export class NbdServer extends DiskServer<NativeNbdServer> {
  readonly path: string | undefined;
  readonly host: string | undefined;
  /** TCP: the port that was chosen. */
  readonly port: number | undefined;

  /** Use `disk.serveNbd`. */
  constructor(handle: NativeNbdServer, options: NbdOptions, owner: object) {
    super(handle, owner, options.onReport);
    this.path = options.path;
    this.host = options.host;
    this.port = options.host === undefined ? undefined : handle.port;
  }

  stats(): NbdStats {
    return this.native.stats() as unknown as NbdStats;
  }
}

const MS = 1000;

/** Kinds `invalid_argument`, `exists` (path or port is taken), `permission`, `not_found`. */
export async function serveNbd(
  disk: NativeDisk,
  owner: object,
  options: NbdOptions,
): Promise<NbdServer> {
  const { path, host, port, tls, insecure, exportName, description, maxClients } = options;
  const ms = (name: 'handshakeSeconds' | 'stallSeconds' | 'idleSeconds') => {
    const seconds = options[name];
    if (seconds === undefined) return undefined;
    if (seconds >= 0 && seconds <= 2 ** 21) return Math.round(seconds * MS);
    throw new PqblkError('invalid_argument', `${name}: expected seconds, not ${seconds}`);
  };
  const wanted = {
    ...{ path, host, port, insecure, exportName, description, clientsMax: maxClients },
    ...{ pskFile: tls?.pskFile, certificates: tls?.certificates },
    handshakeMs: ms('handshakeSeconds'),
    stallMs: ms('stallSeconds'),
    idleMs: ms('idleSeconds'),
  };
  const handle = await calling(() => disk.serveNbd(given(wanted)));
  return new NbdServer(handle, options, owner);
}
