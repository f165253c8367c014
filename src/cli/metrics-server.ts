// Room cli/: what a serving process tells of itself: HTTP on a Unix socket, for Prometheus and people.
//
//   GET /metrics   Prometheus text format 0.0.4
//   GET /stats     the same numbers as JSON
import { chmod, lstat, rm } from 'node:fs/promises';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { connect } from 'node:net';
import { fromSystem, PqblkError } from '../errors.js';
import { metricsOf, numbersOf, type ServedDisk } from './metrics.js';

const CONNECTIONS_MAX = 16;

export interface MetricsServer {
  close(): Promise<void>;
}

/** Listens on `path`. A stale socket is replaced. Kinds `exists` and those of the file system. */
export async function serveMetrics(
  path: string,
  disks: readonly ServedDisk[],
): Promise<MetricsServer> {
  const answer = (request: IncomingMessage, response: ServerResponse) => {
    const send = (status: number, type: string, body: string) => {
      response.writeHead(status, { 'content-type': type }).end(body);
    };
    if (request.method !== 'GET') return send(405, 'text/plain', 'GET only\n');
    const open = disks.filter(({ disk }) => !disk.closed);
    const [path] = (request.url ?? '').split('?', 1);
    if (path === '/metrics') {
      return send(200, 'text/plain; version=0.0.4; charset=utf-8', metricsOf(open));
    }
    if (path === '/stats') {
      return send(200, 'application/json', `${JSON.stringify(numbersOf(open), null, 2)}\n`);
    }
    return send(404, 'text/plain', '/metrics or /stats\n');
  };
  await clearStale(path);
  // Clients that say nothing do not keep others out for long.
  const headersTimeout = 2000;
  const limits = { headersTimeout, requestTimeout: 10_000, connectionsCheckingInterval: 500 };
  const server = createServer(limits, answer);
  server.maxConnections = CONNECTIONS_MAX;
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error: NodeJS.ErrnoException) => {
      const details = { path, operation: 'listen' };
      const taken = error.code === 'EADDRINUSE';
      reject(
        taken ? new PqblkError('exists', 'the path is taken', details) : fromSystem(error, details),
      );
    });
    server.listen(path, resolve);
  });
  await chmod(path, 0o600); // whatever the umask
  return {
    close: () =>
      new Promise<void>((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

/** Removes a socket that nobody listens on any more. */
async function clearStale(path: string): Promise<void> {
  const status = await lstat(path).catch(() => undefined);
  if (!status?.isSocket()) return; // connecting to a file is refused too
  const refused = await new Promise<boolean>((resolve) => {
    const probe = connect(path);
    probe.once('connect', () => {
      probe.destroy();
      resolve(false);
    });
    probe.once('error', (error: NodeJS.ErrnoException) => resolve(error.code === 'ECONNREFUSED'));
  });
  if (refused) await rm(path, { force: true });
}
