// Room cli/: what a serving process tells of itself: HTTP on a Unix socket, for Prometheus and people.
//
//   GET /metrics   Prometheus text format 0.0.4
//   GET /stats     the same numbers as JSON
import { lstat, rm } from 'node:fs/promises';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { connect } from 'node:net';
import { fromSystem, PqblkError } from '../errors.js';
import type { BackendStats, Disk, QueueStats } from '../index.js';

/** What a server of the disk counts, by name; clients and the like are gauges. */
export interface ServerNumbers {
  readonly protocol: string;
  stats(): Readonly<Record<string, number>>;
}

export interface MetricsServer {
  close(): Promise<void>;
}

interface Metric {
  readonly name: string;
  readonly type: 'counter' | 'gauge';
  readonly help: string;
  readonly rows: readonly (readonly [labels: Record<string, string | number>, value: number])[];
}

const QUEUE_REQUESTS = {
  read: 'reads',
  write: 'writes',
  flush: 'flushes',
  discard: 'discards',
  write_zeroes: 'zeroes',
} as const satisfies Record<string, keyof QueueStats>;

const BACKEND_COUNTERS = {
  metadata_reads_total: ['metadataReads', 'Reads of image metadata'],
  metadata_writes_total: ['metadataWrites', 'Writes of image metadata'],
  cache_hits_total: ['cacheHits', 'Look-ups answered by the metadata caches'],
  cache_misses_total: ['cacheMisses', 'Look-ups that had to be read'],
  log_bytes_total: ['logBytes', 'Sealed: bytes written to the log'],
  checkpoints_total: ['checkpoints', 'Sealed: checkpoints of the log'],
  integrity_failures_total: ['integrityFailures', 'Sealed: sectors whose tag did not hold'],
  sectors_sealed_total: ['sectorsSealed', 'Sealed: sectors encrypted'],
  sectors_opened_total: ['sectorsOpened', 'Sealed: sectors decrypted'],
} as const satisfies Record<string, readonly [keyof BackendStats, string]>;

/** Everything there is to tell, as Prometheus metrics. */
export function metricsOf(disk: Disk, servers: readonly ServerNumbers[]): string {
  const { queues, backend } = disk.stats();
  const perQueue = (value: (stats: QueueStats) => number) =>
    queues.map((stats, queue) => [{ queue }, value(stats)] as const);
  const metrics: Metric[] = [
    { name: 'info', type: 'gauge', help: 'What is served', rows: [[infoOf(disk), 1]] },
    { name: 'size_bytes', type: 'gauge', help: 'Of the disk', rows: [[{}, disk.size]] },
    {
      name: 'requests_total',
      type: 'counter',
      help: 'Requests completed without an error',
      rows: Object.entries(QUEUE_REQUESTS).flatMap(([type, key]) =>
        queues.map((stats, queue) => [{ queue, type }, stats[key]] as const),
      ),
    },
    {
      name: 'request_errors_total',
      type: 'counter',
      help: 'Requests that failed',
      rows: perQueue(({ errors }) => errors),
    },
    {
      name: 'bytes_total',
      type: 'counter',
      help: 'Bytes of reads and writes',
      rows: queues.flatMap(({ readBytes, writtenBytes }, queue) => [
        [{ queue, direction: 'read' }, readBytes] as const,
        [{ queue, direction: 'write' }, writtenBytes] as const,
      ]),
    },
    ...Object.entries(BACKEND_COUNTERS).map(
      ([name, [key, help]]): Metric => ({
        name,
        type: 'counter',
        help,
        rows: [[{}, backend[key]]],
      }),
    ),
    gauge('log_used_bytes', 'Sealed: bytes of the log in use', backend.logUsed),
    gauge('log_capacity_bytes', 'Sealed: bytes the log can hold', backend.logCapacity),
    {
      name: 'server',
      type: 'gauge',
      help: 'Counters of the servers since their start, and clients now',
      rows: servers.flatMap(({ protocol, stats }) =>
        Object.entries(stats()).map(([what, value]) => [{ protocol, what }, value] as const),
      ),
    },
  ];
  return metrics.map(textOf).join('');
}

function gauge(name: string, help: string, value: number): Metric {
  return { name, type: 'gauge', help, rows: [[{}, value]] };
}

function infoOf({ facts }: Disk): Record<string, string> {
  const { format, engine, suite = '', aead = '' } = facts;
  return { format, engine, suite, aead };
}

function textOf({ name, type, help, rows }: Metric): string {
  const full = `pqblk_${name}`;
  const lines = rows.map(([labels, value]) => {
    const inner = Object.entries(labels).map(([label, text]) => `${label}=${quoted(text)}`);
    return `${full}${inner.length > 0 ? `{${inner.join(',')}}` : ''} ${value}\n`;
  });
  return `# HELP ${full} ${help}\n# TYPE ${full} ${type}\n${lines.join('')}`;
}

function quoted(text: string | number): string {
  return `"${String(text).replace(/[\\"\n]/g, (c) => (c === '\n' ? '\\n' : `\\${c}`))}"`;
}

/** Listens on `path`. A stale socket is replaced. Kinds `exists` and those of the file system. */
export async function serveMetrics(
  path: string,
  disk: Disk,
  servers: readonly ServerNumbers[],
): Promise<MetricsServer> {
  const answer = (request: IncomingMessage, response: ServerResponse) => {
    const send = (status: number, type: string, body: string) => {
      response.writeHead(status, { 'content-type': type }).end(body);
    };
    if (request.method !== 'GET') return send(405, 'text/plain', 'GET only\n');
    if (disk.closed) return send(503, 'text/plain', 'the disk is being closed\n');
    if (request.url === '/metrics') {
      return send(200, 'text/plain; version=0.0.4; charset=utf-8', metricsOf(disk, servers));
    }
    if (request.url === '/stats') {
      const counted = servers.map(({ protocol, stats }) => ({ protocol, ...stats() }));
      const body = { disk: disk.facts, ...disk.stats(), servers: counted };
      return send(200, 'application/json', `${JSON.stringify(body, null, 2)}\n`);
    }
    return send(404, 'text/plain', '/metrics or /stats\n');
  };
  await clearStale(path);
  const server = createServer({ requestTimeout: 10_000, headersTimeout: 10_000 }, answer);
  server.maxConnections = 16;
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
