// `pqblk serve` with the peers that people use: libnbd's tools, qemu-img, qemu-io and fio.
import { spawn, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { connect, createServer } from 'node:net';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { type CheckResult, KeyStore, openDisk } from '../../src/index.js';
import { parseExposition, total } from './exposition.js';
import { exitCode, peer, pqblk, pqblkJson, scratch } from './helpers.js';
import { httpGet, running, serve, serveWith } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const MiB = 2 ** 20;
const source = at('source.raw');
const store = ['--store', at('keys')];
const PATIENCE = { timeout: 120_000, interval: 20 };

beforeAll(async () => {
  peer('qemu-img', 'create', '-q', '-f', 'raw', source, '16M');
  writeFileSync(at('noise'), randomBytes(3 * MiB));
  peer('qemu-io', '-f', 'raw', '-c', `write -q -s ${at('noise')} 1M 3M`, source);
  peer('qemu-io', '-f', 'raw', '-c', 'write -q -P 9 9M 70k', source);
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', ...store);
});

async function sealedDisk(name: string, size = '16M'): Promise<string> {
  await pqblkJson('create', at(name), size, '--key', 'alice', ...store);
  return at(name);
}

describe('serve --nbd', () => {
  it('serves what nbdinfo understands and nbdcopy fills and reads', async () => {
    const disk = await sealedDisk('copied.sealed');
    const server = await serve(disk, '--nbd', at('c.sock'), '--queues', '2', ...store);
    const uri = `nbd+unix:///?socket=${at('c.sock')}`;
    expect(server.uris).toEqual([uri]);
    const info = JSON.parse(peer('nbdinfo', '--json', uri)) as {
      exports: Record<string, unknown>[];
    };
    expect(info.exports[0]).toMatchObject({
      'export-size': 16 * MiB,
      can_multi_conn: true,
      can_fua: true,
      can_trim: true,
      can_zero: true,
      can_fast_zero: true,
      can_df: true,
      is_read_only: false,
      block_size_minimum: 1,
      block_size_preferred: 4096,
      block_size_maximum: 32 * MiB,
      contexts: ['base:allocation'],
    });
    peer('nbdcopy', '--connections=4', source, uri);
    peer('nbdcopy', uri, at('copied.raw'));
    peer('cmp', source, at('copied.raw'));
    peer('qemu-img', 'compare', '-q', '-f', 'raw', '-F', 'raw', source, uri);
    const map = JSON.parse(peer('nbdinfo', '--map', '--json', uri)) as {
      offset: number;
      length: number;
      type: number;
    }[];
    expect(map.reduce((sum, { length }) => sum + length, 0)).toBe(16 * MiB);
    for (const { offset, length, type } of map) {
      if (type === 0) expect(offset + length > MiB && offset < 10 * MiB).toBe(true);
    }
    expect(map.some(({ type }) => type === 3)).toBe(true);
    expect(await server.end()).toBe(0);
    expect(existsSync(at('c.sock'))).toBe(false);
    expect(server.stderr()).toBe('');
    expect(await pqblkJson<CheckResult>('check', disk, ...store)).toMatchObject({ clean: true });
  });

  it.each(['vmdk', 'vpc', 'vhdx'])(
    'takes a %s into a sealed disk and gives it back',
    async (format) => {
      const foreign = at(`source.${format}`);
      const options = format === 'vpc' ? ['-o', 'force_size=on'] : [];
      peer('qemu-img', 'convert', '-q', '-f', 'raw', '-O', format, ...options, source, foreign);
      const disk = await sealedDisk(`${format}.sealed`);
      const server = await serve(disk, '--nbd', at('f.sock'), ...store);
      const uri = String(server.uris[0]);
      peer('qemu-img', 'convert', '-q', '-n', '-f', format, '-O', 'raw', foreign, uri);
      peer('qemu-img', 'compare', '-q', '-f', format, '-F', 'raw', foreign, uri);
      const back = at(`back.${format}`);
      peer('qemu-img', 'convert', '-q', '-f', 'raw', '-O', format, ...options, uri, back);
      peer('qemu-img', 'compare', '-q', '-f', format, '-F', 'raw', back, source);
      expect(await server.end()).toBe(0);
    },
  );

  it('passes fio with checksums on its nbd engine', async (context) => {
    if (!peer('fio', '--enghelp').includes('nbd')) {
      console.log('SKIP: this fio has no nbd engine');
      context.skip();
    }
    const server = await serve(await sealedDisk('fio.sealed'), '--nbd', at('fio.sock'), ...store);
    peer(
      'fio',
      ...['--name=verify', '--ioengine=nbd', `--uri=${server.uris[0]}`, '--rw=randwrite'],
      ...['--bsrange=512-128k', '--bs_unaligned', '--size=16m', '--iodepth=32'],
      ...['--verify=crc32c', '--verify_fatal=1', '--randseed=7', `--aux-path=${dir}`],
    );
    expect(await server.end()).toBe(0);
  });

  it('is read-only when asked, and tells its export name', async () => {
    const disk = await sealedDisk('ro.sealed');
    const named = ['--export-name', 'my disk', '--read-only'];
    const server = await serve(disk, '--nbd', at('ro.sock'), ...named, ...store);
    expect(server.uris).toEqual([`nbd+unix:///my%20disk?socket=${at('ro.sock')}`]);
    const uri = String(server.uris[0]);
    expect(peer('nbdinfo', uri)).toMatch(/is_read_only: true/);
    expect(peer('nbdinfo', '--list', uri)).toContain('export="my disk"');
    expect(() => peer('nbdcopy', source, uri)).toThrow();
    expect(() => peer('nbdinfo', uri.replace('my%20', 'your%20'))).toThrow(
      /server replied with error/,
    );
    expect(await server.end()).toBe(0);
  });

  it('has an address that clients understand, wherever its socket is', async () => {
    mkdirSync(at('100% a&b#c?d'));
    const disk = await sealedDisk('odd.sealed');
    const server = await serve(disk, '--nbd', at('100% a&b#c?d/s.sock'), ...store);
    expect(Number(peer('nbdinfo', '--size', String(server.uris[0])))).toBe(16 * MiB);
    expect(await server.end()).toBe(0);
  });

  it.each([['sealed'], ['raw'], ['qcow2']])('grows a %s disk that is served', async (format) => {
    const disk = at(`grows.${format}`);
    const keys = format === 'sealed' ? ['--key', 'alice', ...store] : [];
    await pqblkJson('create', disk, '16M', '--format', format, ...keys);
    const server = await serve(disk, '--nbd', at('g.sock'), '--format', format, ...store);
    const uri = String(server.uris[0]);
    const grown = { before: 16 * MiB, after: 24 * MiB, served: true };
    expect(await pqblkJson('resize', disk, '+8M')).toMatchObject(grown);
    expect(Number(peer('nbdinfo', '--size', uri))).toBe(24 * MiB);
    peer('qemu-io', '-f', 'raw', '-c', 'write -q -P 7 16M 8M', uri);
    const shrink = await pqblk('resize', disk, '1M');
    expect(shrink.code).toBe(exitCode('invalid_argument'));
    expect(await server.end()).toBe(0);
    const alone = await pqblkJson('resize', disk, '+1M', '--format', format, ...store);
    expect(alone).toMatchObject({ before: 24 * MiB, served: false });
  });

  // The header names tables then that lie beyond what the file was when the server opened it.
  it('changes the keys of a disk that has grown since it was served', async () => {
    const disk = at('grown-keys.sealed');
    const small = ['--cluster-size', '4k', '--log-size', '8M'];
    await pqblkJson('create', disk, '16M', '--key', 'alice', ...small, ...store);
    const server = await serve(disk, '--nbd', at('k.sock'), ...store);
    peer('qemu-io', '-f', 'raw', '-c', 'write -q -P 7 0 16M', String(server.uris[0]));
    expect(await pqblkJson('resize', disk, '8G')).toMatchObject({ served: true });
    const rotated = await pqblk('rotate-master-key', disk, '--key', 'alice', ...store);
    expect(rotated).toMatchObject({ code: 0 });
    expect(await server.end()).toBe(0);
    expect(await pqblk('check', disk, ...store)).toMatchObject({ code: 0 });
  });

  it('fails only the requests that meet a damaged sector, says why, and serves on', async () => {
    const disk = at('flipped.sealed');
    await pqblkJson('import', source, disk, '--key', 'alice', ...store);
    const bytes = readFileSync(disk);
    // Some sector that is damaged on the host: the last one that holds ciphertext of the guest's.
    const place = lastDataSector(bytes);
    bytes.writeUInt8(bytes.readUInt8(place) ^ 1, place);
    writeFileSync(disk, bytes);
    const bad = (await pqblk('check', disk, '--json', ...store)).stdout;
    const [sector] = (JSON.parse(bad) as { badSectors: number[] }).badSectors;
    const server = await serve(disk, '--nbd', at('e.sock'), '--stats', at('e.stats'), ...store);
    const uri = String(server.uris[0]);
    const offset = Number(sector) * 4096;
    const io = (command: string) =>
      spawnSync('qemu-io', ['-f', 'raw', '-c', command, uri], { encoding: 'utf8' });
    expect(io(`read -q ${offset} 512`).stdout).toMatch(/Input\/output error/);
    expect(io(`read -q -P 9 9M 4k`).stdout).not.toMatch(/error|failed/);
    const line = `pqblk: nbd: read of 512 bytes at ${offset}: `;
    await vi.waitFor(() => expect(server.stderr()).toContain(line), PATIENCE);
    expect(server.stderr()).toContain(`tag`);
    const families = parseExposition((await httpGet(at('e.stats'), '/metrics')).body);
    expect(total(families, 'pqblk_integrity_failures_total')).toBeGreaterThanOrEqual(1);
    expect(total(families, 'pqblk_nbd_request_errors_total')).toBeGreaterThanOrEqual(1);
    // Written anew, the sector is good again.
    expect(io(`write -q -P 5 ${offset} 4k`).stdout).toBe('');
    expect(io(`read -q -P 5 ${offset} 4k`).stdout).toBe('');
    expect(await server.end()).toBe(0);
  });

  it('answers a full host disk with ENOSPC, keeps what it acknowledged, and serves on', async (c) => {
    mkdirSync(at('small'));
    const mount = ['-t', 'tmpfs', '-o', 'size=24m,mode=700', 'pqblk-test', at('small')];
    if (spawnSync('mount', mount).status !== 0) {
      console.log('SKIP: mounting a small file system needs rights');
      c.skip();
    }
    try {
      const disk = await sealedDisk(join('small', 'full.sealed'), '64M');
      const server = await serve(disk, '--nbd', at('full.sock'), ...store);
      const io = (...commands: string[]) =>
        spawnSync(
          'qemu-io',
          ['-f', 'raw', ...commands.flatMap((text) => ['-c', text]), String(server.uris[0])],
          { encoding: 'utf8' },
        ).stdout;
      const steps = Array.from({ length: 48 }, (_, mib) => `write -P ${mib + 1} ${mib}M 1M`);
      const said = io(...steps).split('\n');
      const written = said.filter((line) => line.startsWith('wrote')).length;
      expect(written).toBeGreaterThan(4);
      expect(written).toBeLessThan(24);
      expect(said.filter((line) => line.includes('No space left on device')).length).toBe(
        48 - written,
      );
      const good = Array.from({ length: written }, (_, mib) => `read -q -P ${mib + 1} ${mib}M 1M`);
      expect(io(...good)).toBe('');
      const line = /pqblk: nbd: write of 1048576 bytes at \d+: .*[Ss]pace/;
      await vi.waitFor(() => expect(server.stderr()).toMatch(line), PATIENCE);
      expect(await server.end()).toBe(0);
      expect(await pqblkJson<CheckResult>('check', disk, ...store)).toMatchObject({ clean: true });
    } finally {
      peer('umount', '--lazy', at('small'));
    }
  });

  it('goes away cleanly while a client is busy', async () => {
    const disk = await sealedDisk('busy.sealed', '64M');
    const server = await serve(disk, '--nbd', at('b.sock'), '--queues', '2', ...store);
    const uri = String(server.uris[0]);
    const load = spawn('qemu-img', [
      ...['bench', '-q', '-w', '-n', '-f', 'raw', '-c', '1000000', '-d', '32', '-t', 'none', uri],
    ]);
    running.add(load);
    const gone = once(load, 'close');
    await new Promise((go) => setTimeout(go, 700));
    expect(await server.end()).toBe(0);
    load.kill('SIGKILL');
    await gone;
    running.delete(load);
    expect(await pqblkJson<CheckResult>('check', disk, ...store)).toMatchObject({ clean: true });
  });

  it('tells a service manager', async () => {
    const socket = at('notify.sock');
    const script =
      'use Socket; socket(S, PF_UNIX, SOCK_DGRAM, 0); bind(S, sockaddr_un($ARGV[0])) or die; ' +
      '$| = 1; print "listening\\n"; for (1, 2) { recv(S, $m, 999, 0); print "$m;\\n" }';
    const manager = spawn('perl', ['-e', script, socket], { stdio: ['ignore', 'pipe', 'inherit'] });
    running.add(manager);
    let said = '';
    manager.stdout.on('data', (text) => {
      said += text;
    });
    const ended = once(manager, 'close');
    while (!said.includes('listening')) await new Promise((go) => setTimeout(go, 20));
    const disk = await sealedDisk('notify.sealed');
    const env = { NOTIFY_SOCKET: socket };
    const server = await serveWith(env, disk, '--nbd', at('n.sock'), ...store);
    const pid = server.child.pid;
    expect(await server.end()).toBe(0);
    await ended;
    running.delete(manager);
    expect(said).toContain(`READY=1\nMAINPID=${pid}\nSTATUS=serving 1 of 1 disks;`);
    expect(said).toContain('STOPPING=1;');
  });
});

describe('serve --stats', () => {
  it('counts for Prometheus and as JSON', async () => {
    const disk = await sealedDisk('stats.sealed');
    const stats = ['--stats', at('stats.sock'), '--queues', '2'];
    const server = await serve(disk, '--nbd', at('s.sock'), ...stats, ...store);
    peer('nbdcopy', source, String(server.uris[0]));
    const get = (path: string) => httpGet(at('stats.sock'), path);
    const families = parseExposition((await get('/metrics')).body);
    const labels = { disk: 'stats.sealed' };
    const of = (name: string, more = {}) => total(families, name, { ...labels, ...more });
    const asked = Number(of('pqblk_nbd_requests_total', { type: 'write' }));
    expect(asked).toBeGreaterThan(0);
    expect(of('pqblk_requests_total', { type: 'write' })).toBe(asked);
    expect(of('pqblk_request_duration_seconds_count', { type: 'write' })).toBe(asked);
    expect(of('pqblk_request_duration_seconds_sum', { type: 'write' })).toBeGreaterThan(0);
    expect(of('pqblk_request_duration_seconds_count', { type: 'discard' })).toBeUndefined();
    expect(of('pqblk_bytes_total', { direction: 'write' })).toBeGreaterThanOrEqual(3 * MiB);
    expect(of('pqblk_requests_in_flight')).toBe(0);
    expect(of('pqblk_sectors_sealed_total')).toBeGreaterThanOrEqual(786);
    expect(of('pqblk_integrity_failures_total')).toBe(0);
    expect(of('pqblk_log_used_bytes')).toBeLessThanOrEqual(Number(of('pqblk_log_capacity_bytes')));
    for (const cache of ['l2', 'entry'])
      expect(of('pqblk_cache_hits_total', { cache })).toBeDefined();
    expect(of('pqblk_limit_iops')).toBe(0);
    expect(JSON.parse((await get('/stats')).body)).toMatchObject({
      disks: [
        {
          name: 'stats.sealed',
          format: 'sealed',
          queues: [{ errors: 0 }, { errors: 0 }],
          servers: [{ protocol: 'nbd', errors: 0, writes: asked }],
        },
      ],
    });
    expect((await get('/stats?of=all')).status).toBe(200);
    expect((await get('/else')).status).toBe(404);
    expect(await server.end()).toBe(0);
    expect(existsSync(at('stats.sock'))).toBe(false);
    const over = await pqblk('serve', disk, '--nbd', at('s.sock'), '--stats', source, ...store);
    expect(over.code).toBe(exitCode('exists'));
    expect(statSync(source).size).toBe(16 * MiB);
  });

  it('is not kept from who asks by connections that say nothing', async () => {
    const disk = at('silent.raw');
    await pqblkJson('create', disk, '1M', '--format', 'raw');
    const server = await serve(disk, '--nbd', at('n.sock'), '--stats', at('silent.sock'));
    const silent = Array.from({ length: 16 }, () =>
      connect(at('silent.sock'))
        .resume()
        .on('error', () => {}),
    );
    await Promise.all(silent.map((socket) => once(socket, 'connect')));
    // Far from half a minute, which is how often the runtime looks by itself.
    await vi.waitFor(() => httpGet(at('silent.sock'), '/metrics'), {
      timeout: 20_000,
      interval: 100,
    });
    for (const socket of silent) socket.destroy();
    expect(await server.end()).toBe(0);
  });
});

describe('serve over TCP', () => {
  it('wants TLS or a clear word', async () => {
    const disk = await sealedDisk('tcp.sealed');
    const refused = await pqblk('serve', disk, '--nbd-tcp', '127.0.0.1:0', ...store);
    expect(refused.code).toBe(exitCode('invalid_argument'));
    expect(refused.stderr).toContain('hint: say --tls-psk FILE');
    const server = await serve(disk, '--nbd-tcp', '127.0.0.1:0', '--insecure', ...store);
    expect(server.uris[0]).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+\/$/);
    expect(peer('nbdinfo', '--size', String(server.uris[0])).trim()).toBe(String(16 * MiB));
    expect(await server.end()).toBe(0);
  });

  it('speaks TLS with a pre-shared key, and with nothing else', async () => {
    const disk = await sealedDisk('psk.sealed');
    for (const [name, key] of [
      ['good', randomBytes(32)],
      ['bad', randomBytes(32)],
    ] as const) {
      mkdirSync(at(name));
      const line = `alice:${key.toString('hex')}\n`;
      writeFileSync(join(at(name), 'keys.psk'), line, { mode: 0o600 });
    }
    const psk = (name: string) => join(at(name), 'keys.psk');
    const ways = ['--nbd-tcp', '127.0.0.1:0', '--nbd', at('psk.sock')];
    const server = await serve(disk, ...ways, '--tls-psk', psk('good'), ...store);
    const port = new URL(String(server.uris[1])).port;
    expect(server.uris[1]).toMatch(/^nbds:/);
    const uri = (key: string) => `nbds://alice@127.0.0.1:${port}/?tls-psk-file=${psk(key)}`;
    peer('nbdcopy', source, uri('good'));
    const object = [
      '--object',
      `tls-creds-psk,id=t,dir=${at('good')},endpoint=client,username=alice`,
    ];
    peer(
      ...(['qemu-img', 'compare', '-q', ...object, '--image-opts'] as const),
      `driver=raw,file.driver=file,file.filename=${source}`,
      `driver=nbd,host=127.0.0.1,port=${port},tls-creds=t`,
    );
    expect(() => peer('nbdinfo', uri('bad'))).toThrow();
    expect(() => peer('nbdinfo', `nbd://127.0.0.1:${port}/`)).toThrow(/TLS/);
    expect(() => peer('nbdinfo', `nbd+unix:///?socket=${at('psk.sock')}`)).toThrow(/TLS/);
    const line = 'a TLS handshake failed';
    await vi.waitFor(() => expect(server.stderr()).toContain(line), PATIENCE);
    expect(await server.end()).toBe(0);
    writeFileSync(psk('bad'), 'alice:00\n');
    const refused = async () =>
      await pqblk('serve', disk, ...ways, '--tls-psk', psk('bad'), ...store);
    expect((await refused()).code).toBe(exitCode('invalid_argument'));
    chmodSync(psk('bad'), 0o640);
    expect(await refused()).toMatchObject({ code: exitCode('permission') });
    rmSync(psk('bad'));
    peer('mkfifo', '-m', '600', psk('bad')); // nobody writes
    const fifo = await refused();
    expect(fifo.code).toBe(exitCode('invalid_argument'));
    expect(fifo.stderr).toContain('not a file of pre-shared keys');
  });

  it('speaks TLS with certificates, and asks clients for theirs', async () => {
    const pki = at('pki');
    mkdirSync(pki);
    const openssl = (...argv: string[]) => peer('env', '-C', pki, 'openssl', ...argv);
    const ec = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes'];
    openssl(
      'req',
      '-x509',
      ...ec,
      ...['-keyout', 'ca-key.pem', '-out', 'ca-cert.pem'],
      ...['-days', '2', '-subj', '/CN=ca'],
    );
    writeFileSync(join(pki, 'names'), 'subjectAltName=DNS:localhost');
    for (const who of ['server', 'client']) {
      openssl(
        'req',
        ...ec,
        '-keyout',
        `${who}-key.pem`,
        '-out',
        `${who}.csr`,
        '-subj',
        `/CN=${who}`,
      );
      const signer = ['-CA', 'ca-cert.pem', '-CAkey', 'ca-key.pem', '-CAcreateserial'];
      openssl(
        'x509',
        '-req',
        '-in',
        `${who}.csr`,
        ...signer,
        ...['-out', `${who}-cert.pem`],
        ...['-days', '2', '-extfile', 'names'],
      );
    }
    const disk = await sealedDisk('x509.sealed');
    // Without an authority it would let in whoever reaches it: that has to be said.
    const authority = join(pki, 'ca-cert.pem');
    const tls = ['--nbd-tcp', 'localhost:0', '--tls-cert', pki, ...store];
    renameSync(authority, `${authority}.away`);
    const open = await pqblk('serve', disk, ...tls);
    expect(open).toMatchObject({ code: exitCode('invalid_argument') });
    expect(open.stderr).toContain('--insecure');
    symlinkSync('nowhere.pem', authority);
    expect(await pqblk('serve', disk, ...tls, '--insecure')).toMatchObject({
      code: exitCode('not_found'),
    });
    renameSync(`${authority}.away`, authority);
    const key = join(pki, 'server-key.pem');
    chmodSync(key, 0o640);
    const readable = await pqblk('serve', disk, ...tls);
    expect(readable.code).toBe(exitCode('permission'));
    expect(readable.stderr).toContain('server-key.pem: others may read it');
    chmodSync(key, 0o600);
    renameSync(key, `${key}.plain`);
    openssl('pkey', '-in', `${key}.plain`, '-aes256', '-passout', 'pass:x', '-out', key);
    const locked = await pqblk('serve', disk, ...tls);
    expect(locked.code).toBe(exitCode('invalid_argument'));
    expect(locked.stderr).toContain('without a passphrase');
    renameSync(`${key}.plain`, key);
    const server = await serve(disk, '--nbd-tcp', 'localhost:0', '--tls-cert', pki, ...store);
    const { port } = new URL(String(server.uris[0]));
    expect(peer('nbdinfo', `nbds://localhost:${port}/?tls-certificates=${pki}`)).toContain(
      'with TLS',
    );
    const stranger = at('stranger');
    mkdirSync(stranger);
    writeFileSync(join(stranger, 'ca-cert.pem'), readFileSync(join(pki, 'ca-cert.pem')));
    expect(() =>
      peer('nbdinfo', `nbds://localhost:${port}/?tls-certificates=${stranger}`),
    ).toThrow();
    expect(await server.end()).toBe(0);
  });
});

describe('serve refuses', () => {
  it('to run without a way in, on a taken socket, over a file', async () => {
    const disk = await sealedDisk('refused.sealed');
    expect((await pqblk('serve', disk, ...store)).code).toBe(exitCode('usage'));
    expect((await pqblk('serve', disk, '--nbd-tcp', 'nowhere', ...store)).code).toBe(2);
    const file = await pqblk('serve', disk, '--nbd', source, ...store);
    expect(file.code).toBe(exitCode('exists'));
    expect(statSync(source).size).toBe(16 * MiB);
    const vhost = await pqblk('serve', disk, '--vhost-user', source, ...store);
    expect(vhost.code).toBe(exitCode('exists'));
    const taken = createServer();
    await new Promise<void>((go) => taken.listen(at('taken.sock'), go));
    const second = await pqblk('serve', disk, '--nbd', at('taken.sock'), ...store);
    expect(second.code).toBe(exitCode('exists'));
    const third = await pqblk('serve', disk, '--vhost-user', at('taken.sock'), ...store);
    expect(third.code).toBe(exitCode('exists'));
    await new Promise((go) => taken.close(go));
  });
});

describe('Disk.serveNbd', () => {
  it('serves, counts, and ends with its disk', async () => {
    const path = await sealedDisk('api.sealed');
    using identity = await new KeyStore(at('keys')).unlock('alice');
    const disk = await openDisk(path, { format: 'sealed', identity, queues: 2 });
    const server = await disk.serveNbd({ path: at('api.sock') });
    const uri = `nbd+unix:///?socket=${at('api.sock')}`;
    const copy = spawn('nbdcopy', [source, uri], { stdio: 'inherit' });
    const [code] = await once(copy, 'close');
    expect(code).toBe(0);
    expect(server.stats()).toMatchObject({ errors: 0, refusedRequests: 0, refusedClients: 0 });
    expect(server.stats().writes).toBeGreaterThan(0);
    await disk.resize(32 * MiB);
    const grown = spawn('nbdinfo', ['--size', uri]);
    let size = '';
    grown.stdout.on('data', (text) => {
      size += text;
    });
    await once(grown, 'close');
    expect(Number(size)).toBe(32 * MiB);
    await disk.close(); // ends the server too
    expect(existsSync(at('api.sock'))).toBe(false);
    await server.close();
    await expect(disk.serveNbd({ path: at('api.sock') })).rejects.toMatchObject({ kind: 'closed' });
  });
});

/** Host offset of a byte of the last cluster that belongs to guest data: noise, high entropy. */
function lastDataSector(image: Buffer): number {
  for (let at = image.length - 4096; at > 0; at -= 4096) {
    const page = image.subarray(at, at + 4096);
    if (new Set(page).size > 200) return at + 100;
  }
  throw new Error('no data in the image');
}
