// Room cli/: the numbers of the disks that this process serves, as Prometheus metrics and as JSON.
//
// One table says what each metric is and where its value comes from. Every sample has a label `disk`.
// Histograms appear with their first request, as do the metrics of a protocol with its server.
import {
  type BackendStats,
  type Disk,
  type DiskStats,
  latencyBucketSeconds,
  type NbdStats,
  type QueueStats,
  type RateLimits,
  type RequestKind,
  type VhostUserStats,
} from '../index.js';

/** A server of the disk, and what it counts. */
export type ServerNumbers =
  | { readonly protocol: 'nbd'; stats(): NbdStats }
  | { readonly protocol: 'vhost-user-blk'; stats(): VhostUserStats };

export interface ServedDisk {
  readonly name: string;
  readonly disk: Disk;
  readonly servers: readonly ServerNumbers[];
}

type Labels = Readonly<Record<string, string | number>>;

interface Sample {
  /** Of a histogram: what is added to its name. */
  readonly suffix?: string;
  readonly labels: Labels;
  readonly value: number;
}

/** The numbers of one disk at one moment. */
interface Snapshot {
  readonly disk: Disk;
  readonly stats: DiskStats;
  readonly nbd: readonly NbdStats[];
  readonly vhostUser: readonly VhostUserStats[];
}

interface Metric {
  readonly name: string;
  readonly type: 'counter' | 'gauge' | 'histogram';
  readonly help: string;
  samples(of: Snapshot): readonly Sample[];
}

const REQUEST_TYPES = {
  read: 'reads',
  write: 'writes',
  flush: 'flushes',
  discard: 'discards',
  write_zeroes: 'zeroes',
} as const satisfies Record<string, RequestKind>;

const NBD_TYPES = {
  read: 'reads',
  write: 'writes',
  flush: 'flushes',
  trim: 'trims',
  cache: 'caches',
  write_zeroes: 'writeZeroes',
  block_status: 'blockStatus',
} as const satisfies Record<string, keyof NbdStats>;

const one = (value: number, labels: Labels = {}): Sample[] => [{ labels, value }];

function perQueue(value: (stats: QueueStats) => number): Metric['samples'] {
  return ({ stats }) =>
    stats.queues.map((queue, index) => ({ labels: { queue: index }, value: value(queue) }));
}

const ofBackend =
  (key: keyof BackendStats): Metric['samples'] =>
  ({ stats }) =>
    one(stats.backend[key]);

function ofCaches(l2: keyof BackendStats, entry: keyof BackendStats): Metric['samples'] {
  return ({ disk, stats: { backend } }) => {
    const { format } = disk.facts;
    if (format === 'raw') return [];
    const tables = one(backend[l2], { cache: 'l2' });
    return format === 'sealed' ? [...tables, ...one(backend[entry], { cache: 'entry' })] : tables;
  };
}

const ofSealed =
  (key: keyof BackendStats): Metric['samples'] =>
  (of) =>
    of.disk.facts.format === 'sealed' ? ofBackend(key)(of) : [];

/** A disk has one server of a protocol at most, but one that was closed and one that is new. */
function sum<T>(servers: readonly T[], value: (stats: T) => number): Sample[] {
  if (servers.length === 0) return [];
  return one(servers.reduce((total, stats) => total + value(stats), 0));
}

const ofNbd =
  (value: (stats: NbdStats) => number): Metric['samples'] =>
  ({ nbd }) =>
    sum(nbd, value);

const ofVhostUser =
  (value: (stats: VhostUserStats) => number): Metric['samples'] =>
  ({ vhostUser }) =>
    sum(vhostUser, value);

const ofLimits =
  (key: keyof RateLimits): Metric['samples'] =>
  ({ disk }) =>
    one(disk.limits[key] ?? 0);

function durations({ stats }: Snapshot): Sample[] {
  return stats.queues.flatMap(({ latency }, queue) =>
    Object.entries(REQUEST_TYPES).flatMap(([type, kind]) => {
      const { buckets, sumNs } = latency[kind];
      if (buckets.every((count) => count === 0)) return [];
      let count = 0;
      const samples = buckets.map((own, index): Sample => {
        count += own;
        const le = latencyBucketSeconds(index, buckets.length);
        const labels = { queue, type, le: le === Number.POSITIVE_INFINITY ? '+Inf' : le };
        return { suffix: '_bucket', labels, value: count };
      });
      samples.push({ suffix: '_sum', labels: { queue, type }, value: sumNs / 1e9 });
      samples.push({ suffix: '_count', labels: { queue, type }, value: count });
      return samples;
    }),
  );
}

const metric = (
  type: Metric['type'],
  name: string,
  help: string,
  samples: Metric['samples'],
): Metric => ({ name: `pqblk_${name}`, type, help, samples });

const METRICS: readonly Metric[] = [
  metric('gauge', 'info', 'What is served', ({ disk }) => {
    const { format, engine, suite = '', aead = '' } = disk.facts;
    return one(1, { format, engine, suite, aead });
  }),
  metric('gauge', 'size_bytes', 'Of the disk', ({ disk }) => one(disk.size)),
  metric('counter', 'requests_total', 'Requests completed without an error', ({ stats }) =>
    Object.entries(REQUEST_TYPES).flatMap(([type, key]) =>
      stats.queues.map((queue, index) => ({ labels: { queue: index, type }, value: queue[key] })),
    ),
  ),
  metric(
    'counter',
    'request_errors_total',
    'Requests that failed',
    perQueue(({ errors }) => errors),
  ),
  metric('counter', 'bytes_total', 'Bytes of reads and writes that went well', ({ stats }) =>
    stats.queues.flatMap(({ readBytes, writtenBytes }, queue) => [
      ...one(readBytes, { queue, direction: 'read' }),
      ...one(writtenBytes, { queue, direction: 'write' }),
    ]),
  ),
  metric(
    'histogram',
    'request_duration_seconds',
    'From when its queue saw a request to its completion',
    durations,
  ),
  metric(
    'gauge',
    'requests_in_flight',
    'Requests that are not completed yet',
    perQueue(({ inFlight }) => inFlight),
  ),
  metric(
    'counter',
    'throttled_requests_total',
    'Requests that had to wait for the limits',
    perQueue(({ throttled }) => throttled),
  ),
  metric('gauge', 'limit_iops', 'Requests a second; 0: no limit', ofLimits('iopsMax')),
  metric('gauge', 'limit_bytes_per_second', 'Bytes a second; 0: no limit', ofLimits('bpsMax')),
  metric(
    'counter',
    'cache_hits_total',
    'Look-ups that a metadata cache answered',
    ofCaches('l2Hits', 'entryHits'),
  ),
  metric(
    'counter',
    'cache_misses_total',
    'Look-ups that had to be read',
    ofCaches('l2Misses', 'entryMisses'),
  ),
  metric('counter', 'metadata_reads_total', 'Reads of image metadata', ofBackend('metadataReads')),
  metric(
    'counter',
    'metadata_writes_total',
    'Writes of image metadata',
    ofBackend('metadataWrites'),
  ),
  metric('counter', 'log_bytes_total', 'Bytes written to the log', ofSealed('logBytes')),
  metric('gauge', 'log_used_bytes', 'Bytes of the log in use', ofSealed('logUsed')),
  metric('gauge', 'log_capacity_bytes', 'Bytes that the log can hold', ofSealed('logCapacity')),
  metric('counter', 'checkpoints_total', 'Checkpoints of the log', ofSealed('checkpoints')),
  metric(
    'counter',
    'integrity_failures_total',
    'Sectors whose tag did not hold',
    ofSealed('integrityFailures'),
  ),
  metric('counter', 'sectors_sealed_total', 'Sectors encrypted', ofSealed('sectorsSealed')),
  metric('counter', 'sectors_opened_total', 'Sectors decrypted', ofSealed('sectorsOpened')),

  metric(
    'gauge',
    'nbd_clients',
    'Clients now',
    ofNbd(({ clients }) => clients),
  ),
  metric(
    'gauge',
    'nbd_negotiating_clients',
    'Clients in their handshake',
    ofNbd(({ negotiating }) => negotiating),
  ),
  metric(
    'counter',
    'nbd_connections_total',
    'Connections, refused ones included',
    ofNbd(({ accepted }) => accepted),
  ),
  metric(
    'counter',
    'nbd_refused_connections_total',
    'Connections beyond the number of clients allowed',
    ofNbd(({ refusedClients }) => refusedClients),
  ),
  metric(
    'counter',
    'nbd_failed_handshakes_total',
    'TLS handshakes that failed',
    ofNbd(({ failedHandshakes }) => failedHandshakes),
  ),
  metric(
    'counter',
    'nbd_timeouts_total',
    'Clients that were silent for too long',
    ofNbd(({ timeouts }) => timeouts),
  ),
  metric('counter', 'nbd_requests_total', 'Requests answered', ({ nbd }) =>
    Object.entries(NBD_TYPES).flatMap(([type, key]) =>
      sum(nbd, (stats) => stats[key]).map(({ value }) => ({ labels: { type }, value })),
    ),
  ),
  metric(
    'counter',
    'nbd_request_errors_total',
    'Requests that the disk failed',
    ofNbd(({ errors }) => errors),
  ),
  metric(
    'counter',
    'nbd_refused_requests_total',
    'Requests that the protocol or the export does not allow',
    ofNbd(({ refusedRequests }) => refusedRequests),
  ),
  metric(
    'counter',
    'nbd_received_bytes_total',
    'Bytes from clients',
    ofNbd(({ receivedBytes }) => receivedBytes),
  ),
  metric(
    'counter',
    'nbd_sent_bytes_total',
    'Bytes to clients',
    ofNbd(({ sentBytes }) => sentBytes),
  ),

  metric(
    'gauge',
    'vhost_user_connected',
    'Whether a front-end is there',
    ofVhostUser(({ connected }) => Number(connected)),
  ),
  metric(
    'gauge',
    'vhost_user_rings',
    'Rings of the device',
    ofVhostUser(({ rings }) => rings),
  ),
  metric(
    'gauge',
    'vhost_user_running_rings',
    'Rings that the guest uses',
    ofVhostUser(({ runningRings }) => runningRings),
  ),
  metric(
    'counter',
    'vhost_user_connections_total',
    'Front-ends that were served',
    ofVhostUser(({ accepted }) => accepted),
  ),
  metric(
    'counter',
    'vhost_user_refused_connections_total',
    'Front-ends turned away while another one was there',
    ofVhostUser(({ refusedFrontEnds }) => refusedFrontEnds),
  ),
  metric(
    'counter',
    'vhost_user_requests_total',
    'Requests answered',
    ofVhostUser(({ requests }) => requests),
  ),
  metric(
    'counter',
    'vhost_user_request_errors_total',
    'Requests answered with an error',
    ofVhostUser(({ errors }) => errors),
  ),
];

function snapshotOf({ disk, servers }: ServedDisk): Snapshot {
  const nbd = servers.flatMap((one) => (one.protocol === 'nbd' ? [one.stats()] : []));
  const vhostUser = servers.flatMap((one) =>
    one.protocol === 'vhost-user-blk' ? [one.stats()] : [],
  );
  return { disk, stats: disk.stats(), nbd, vhostUser };
}

/** Everything there is to tell, as Prometheus reads it. The disks are open. */
export function metricsOf(disks: readonly ServedDisk[]): string {
  const snapshots = disks.map((served) => [served.name, snapshotOf(served)] as const);
  return METRICS.map(({ name, type, help, samples }) => {
    const lines = snapshots.flatMap(([disk, snapshot]) =>
      samples(snapshot).map(
        ({ suffix = '', labels, value }) =>
          `${name}${suffix}{${labelsText({ disk, ...labels })}} ${value}\n`,
      ),
    );
    if (lines.length === 0) return '';
    return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${lines.join('')}`;
  }).join('');
}

function labelsText(labels: Labels): string {
  const quoted = (text: string | number) =>
    `"${String(text).replace(/[\\"\n]/g, (c) => (c === '\n' ? '\\n' : `\\${c}`))}"`;
  return Object.entries(labels)
    .map(([label, text]) => `${label}=${quoted(text)}`)
    .join(',');
}

/** The same as a value for JSON. */
export function numbersOf(disks: readonly ServedDisk[]): unknown {
  const of = ({ name, disk, servers }: ServedDisk) => ({
    name,
    ...disk.facts,
    limits: disk.limits,
    ...disk.stats(),
    servers: servers.map((server) => ({ protocol: server.protocol, ...server.stats() })),
  });
  return { disks: disks.map(of) };
}
