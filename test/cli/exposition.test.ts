// The reader of metrics refuses what Prometheus would refuse, so that its word counts elsewhere.
import { describe, expect, it } from 'vitest';
import { metricsOf, type ServedDisk } from '../../src/cli/metrics.js';
import type { Disk, LatencyStats } from '../../src/index.js';
import { parseExposition, total } from './exposition.js';

const head = (type: string, name = 'x') => `# HELP ${name} Help\n# TYPE ${name} ${type}\n`;

describe('the reader of metrics', () => {
  it.each([
    ['no end', '# HELP x Help\n# TYPE x gauge\nx 1'],
    ['no HELP', '# TYPE x gauge\nx 1\n'],
    ['HELP of another', '# HELP y Help\n# TYPE x gauge\nx 1\n'],
    ['no TYPE', 'x 1\n'],
    ['another name', `${head('gauge')}y 1\n`],
    ['a bad number', `${head('gauge')}x 1,5\n`],
    ['a bad label', `${head('gauge')}x{9="1"} 1\n`],
    ['an open quote', `${head('gauge')}x{a="1} 1\n`],
    ['a bad escape', `${head('gauge')}x{a="\\t"} 1\n`],
    ['a series twice', `${head('gauge')}x 1\nx 2\n`],
    [
      'a family twice',
      `${head('gauge')}x 1\n${head('gauge', 'y')}y 1\n${head('gauge')}x{a="b"} 1\n`,
    ],
    ['a counter without _total', `${head('counter')}x 1\n`],
    ['nothing', head('gauge')],
    ['no +Inf', `${head('histogram')}x_bucket{le="1"} 1\nx_sum 1\nx_count 1\n`],
    [
      'not cumulative',
      `${head('histogram')}x_bucket{le="1"} 2\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n`,
    ],
    [
      'descending',
      `${head('histogram')}x_bucket{le="2"} 1\nx_bucket{le="1"} 1\nx_bucket{le="+Inf"} 1\nx_sum 1\nx_count 1\n`,
    ],
    ['no sum', `${head('histogram')}x_bucket{le="+Inf"} 1\nx_count 1\n`],
  ])('refuses %s', (_, text) => {
    expect(() => parseExposition(text)).toThrow();
  });
});

describe('metrics', () => {
  it('of latencies are cumulative, in seconds, and escape what a disk is called', () => {
    const latency = (...buckets: number[]): LatencyStats => ({ buckets, sumNs: 1_500_000 });
    const none = latency(0, 0, 0);
    const disk = {
      size: 1,
      facts: { format: 'raw', engine: 'io_uring' },
      limits: { iopsMax: 7, iopsBurst: 0, bpsMax: 0, bpsBurst: 0 },
      stats: () => ({
        queues: [
          {
            ...{ reads: 6, writes: 0, flushes: 0, discards: 0, zeroes: 0, errors: 0 },
            ...{ readBytes: 0, writtenBytes: 0, inFlight: 2, throttled: 3 },
            latency: {
              reads: latency(1, 2, 3),
              writes: none,
              flushes: none,
              discards: none,
              zeroes: none,
            },
          },
        ],
        backend: { metadataReads: 0, metadataWrites: 0 },
      }),
    } as unknown as Disk;
    const name = 'a "b" \\ c\nd';
    const families = parseExposition(metricsOf([{ name, disk, servers: [] } as ServedDisk]));
    const count = (le: string) =>
      total(families, 'pqblk_request_duration_seconds_bucket', { disk: name, type: 'read', le });
    expect([count('0.000001024'), count('0.000002048'), count('+Inf')]).toEqual([1, 3, 6]);
    expect(total(families, 'pqblk_request_duration_seconds_sum')).toBe(0.0015);
    expect(total(families, 'pqblk_requests_in_flight')).toBe(2);
    expect(total(families, 'pqblk_limit_iops')).toBe(7);
    expect(families.has('pqblk_integrity_failures_total')).toBe(false);
    expect(families.has('pqblk_nbd_clients')).toBe(false);
  });
});
