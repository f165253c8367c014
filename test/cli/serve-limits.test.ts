// Limits of a served disk, as its clients feel them. The exact arithmetic is in
// test/native/image/throttle_test.cc; here a slow machine may stay below a limit, never above it.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openDisk } from '../../src/index.js';
import { parseExposition, total } from './exposition.js';
import { exitCode, peer, pqblk, pqblkJson, scratch } from './helpers.js';
import { httpGet, serve } from './serving.js';

const dir = scratch('/dev/shm');
const at = (name: string) => join(dir, name);
const KiB = 1024;
const MiB = 1024 * KiB;

interface FioJob {
  jobs: { read: { iops: number; bw_bytes: number } }[];
}

describe('serve --iops-max, --bps-max', () => {
  it.each([
    ['requests', ['--iops-max', '1000', '--iops-burst', '10'], '4k', 1000 * 4 * KiB],
    ['bytes', ['--bps-max', '4M', '--bps-burst', '64k'], '16k', 4 * MiB],
  ])('holds %s back, for all clients together', async (name, limits, bs, bytesPerSecond) => {
    await pqblkJson('create', at(`${name}.raw`), '16M', '--format', 'raw');
    const argv = ['--nbd', at('l.sock'), '--stats', at('m.sock'), '--queues', '2'];
    const server = await serve(at(`${name}.raw`), ...argv, ...limits);
    const said = peer(
      'fio',
      ...['--name=limit', '--ioengine=nbd', `--uri=${server.uris[0]}`, '--rw=randread'],
      ...[`--bs=${bs}`, '--size=16m', '--iodepth=16', '--numjobs=2', '--group_reporting'],
      ...['--time_based', '--runtime=2', '--ramp_time=0.5', '--output-format=json'],
    );
    const fio = JSON.parse(said.slice(said.indexOf('\n{'))) as FioJob; // it greets each client first
    const rate = Number(fio.jobs[0]?.read.bw_bytes) / bytesPerSecond;
    console.log(`NOTE: limit of ${name}: ${(rate * 100).toFixed(1)} % of what is allowed`);
    expect(rate).toBeLessThan(1.05);
    expect(rate).toBeGreaterThan(0.5);
    const families = parseExposition((await httpGet(at('m.sock'), '/metrics')).body);
    expect(total(families, 'pqblk_throttled_requests_total')).toBeGreaterThan(100);
    expect(await server.end()).toBe(0);
  });

  it.each(['--iops-max', '--bps-max', '--bps-burst', '--max-clients'])(
    '%s takes no 0',
    async (option) => {
      const { code, stderr } = await pqblk(
        'serve',
        at('x.raw'),
        '--nbd',
        at('x.sock'),
        option,
        '0',
      );
      expect(code).toBe(exitCode('usage'));
      expect(stderr).toContain('leave the option out for none');
    },
  );

  it('refuses a burst of nothing, and serves nothing then', async () => {
    await pqblkJson('create', at('refused.raw'), '1M', '--format', 'raw');
    const refused = await pqblk(
      'serve',
      at('refused.raw'),
      '--nbd',
      at('r.sock'),
      '--iops-burst',
      '9',
    );
    expect(refused.code).toBe(exitCode('invalid_argument'));
    expect(refused.stderr).toContain('a burst needs the limit');
  });
});

describe('Disk.setLimits', () => {
  it('reaches requests that wait, and closing does not wait for them', async () => {
    writeFileSync(at('api.raw'), Buffer.alloc(MiB));
    const disk = await openDisk(at('api.raw'), { format: 'raw' });
    expect(disk.limits).toEqual({ iopsMax: 0, iopsBurst: 0, bpsMax: 0, bpsBurst: 0 });
    const reads = () =>
      Promise.all(Array.from({ length: 100 }, () => disk.read(Buffer.alloc(512), 0)));
    disk.setLimits({ iopsMax: 1, iopsBurst: 1 });
    const slow = reads();
    await disk.flush();
    expect(disk.stats().queues[0]?.inFlight).toBeGreaterThan(90);
    disk.setLimits({});
    await slow;
    disk.setLimits({ bpsMax: 1 });
    expect(() => disk.setLimits({ iopsBurst: 5 })).toThrow(
      expect.objectContaining({ kind: 'invalid_argument' }),
    );
    expect(disk.limits.bpsMax).toBe(1);
    const last = reads();
    await disk.close();
    await last;
    expect(() => disk.setLimits({})).toThrow(expect.objectContaining({ kind: 'closed' }));
  });
});
