// `pqblk agent` and `pqblk unlock`: who gets the keys of a disk, how often, and what the bytes are. The
// other end is written here from docs/handing-keys.md; that the keys are the right ones is told by the
// key layer, which opens the same disk.
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  closeSync,
  constants,
  existsSync,
  fchownSync,
  openSync,
  readFileSync,
  readSync,
  statSync,
} from 'node:fs';
import { createConnection, createServer } from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeAll, describe, expect, it } from 'vitest';
import { KeyStore, openKeyArea, readKeyArea, serveKeys } from '../../src/index.js';
import { killAll, startAgent, startScript } from '../cabi/lab.js';
import { ImageFile } from '../reader/file.js';
import { parseHeader } from '../reader/header.js';
import { exitCode, MAIN, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const store = ['--store', at('keys')];
const disk = at('vm.sealed');

/** What the bundle must be, from the disk's key area and the private key. */
let expected: Buffer;
let uuid: Buffer;

beforeAll(async () => {
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', ...store);
  await pqblkJson('create', disk, '4M', '--key', 'alice', ...store);
  using identity = await new KeyStore(at('keys')).unlock('alice');
  using keys = await openKeyArea(await readKeyArea(disk), identity);
  uuid = Buffer.from(keys.volumeUuid);
  const head = Buffer.alloc(64);
  head.write('PQBLKBND', 0, 'latin1');
  head.writeUInt16LE(1, 8);
  head.writeUInt16LE(keys.dataKeys.size, 10);
  head.writeUInt32LE(keys.currentEpoch, 12);
  uuid.copy(head, 16);
  keys.integrityKey.use((bytes) => Buffer.from(bytes).copy(head, 32));
  const epochs = [...keys.dataKeys].map(([epoch, key]) => {
    const entry = Buffer.alloc(40);
    entry.writeUInt32LE(epoch, 0);
    key.use((bytes) => Buffer.from(bytes).copy(entry, 8));
    return entry;
  });
  expected = Buffer.concat([head, ...epochs]);
});

afterEach(killAll);

function request(volume: Buffer): Buffer {
  const bytes = Buffer.alloc(32);
  bytes.write('PQBLKASK', 0, 'latin1');
  bytes.writeUInt16LE(1, 8);
  volume.copy(bytes, 16);
  return bytes;
}

function refusal(reason: number): Buffer {
  const bytes = Buffer.alloc(16);
  bytes.write('PQBLKREF', 0, 'latin1');
  bytes.writeUInt16LE(1, 8);
  bytes.writeUInt16LE(reason, 10);
  return bytes;
}

/** Sends `bytes` and returns all that comes back. */
async function ask(socket: string, bytes: Buffer): Promise<Buffer> {
  const connection = createConnection(socket);
  connection.write(bytes);
  const chunks: Buffer[] = [];
  await new Promise<void>((resolve) => {
    connection.on('data', (data) => chunks.push(data));
    connection.on('error', () => resolve());
    connection.on('close', () => resolve());
  });
  return Buffer.concat(chunks);
}

describe('agent', () => {
  it('hands the keys over once, then it is gone with its socket', async () => {
    const socket = at('once.sock');
    const agent = await startAgent(disk, socket, ...store);
    expect(statSync(socket).mode & 0o777).toBe(0o600);
    expect(await ask(socket, request(uuid))).toEqual(expected);
    expect(await agent.ended).toBe(0);
    expect(existsSync(socket)).toBe(false);
    expect(await ask(socket, request(uuid))).toEqual(Buffer.alloc(0));
  });

  it('does not count who asks for something else, asks nonsense or asks nothing', async () => {
    const socket = at('noise.sock');
    const agent = await startAgent(disk, socket, '--count', '2', ...store);
    expect(await ask(socket, request(Buffer.alloc(16, 7)))).toEqual(refusal(1));
    expect(await ask(socket, Buffer.alloc(32, 7))).toEqual(refusal(2));
    const silent = createConnection(socket); // is sent away after two seconds
    const answers = [await ask(socket, request(uuid)), await ask(socket, request(uuid))];
    expect(answers).toEqual([expected, expected]);
    expect(await agent.ended).toBe(0);
    silent.destroy();
  });

  it('refuses another user, even one who may connect', async () => {
    if (process.getuid?.() !== 0) {
      console.log('SKIP: only root can be another user');
      return;
    }
    // Root connects to an agent that became nobody once everything it reads was loaded.
    const nobody = 65534;
    chmodSync(dir, 0o777);
    const script = `
      import { openSync } from 'node:fs';
      import { handKeys, KeyStore, serveKeys } from '${MAIN.replace('cli/main.cjs', 'index.js')}';
      const identity = await new KeyStore('${at('keys')}').unlock('alice');
      await handKeys('${disk}', { identity, fd: openSync('/dev/null', 'w') });
      process.setgid(${nobody});
      process.setuid(${nobody});
      await serveKeys('${disk}', { identity, socket: '${at('other.sock')}', timeoutMs: 30_000,
        onReady: () => console.log('ready: ') });`;
    chmodSync(disk, 0o644);
    const agent = await startScript('--input-type=module', '-e', script);
    expect(await ask(at('other.sock'), request(uuid))).toEqual(Buffer.alloc(0));
    agent.child.kill('SIGTERM');
    await agent.ended;
  });

  it('says the longest time limit there is', async () => {
    const refused = await pqblk(
      'agent',
      disk,
      '--socket',
      at('t.sock'),
      '--timeout',
      '5000000',
      ...store,
    );
    expect(refused.code).toBe(exitCode('invalid_argument'));
    expect(refused.stderr).toContain(
      'timeoutMs: expected an integer from 0 to 4294967295, not 5000000000',
    );
  });

  it('ends at its time limit and on SIGTERM, without its socket', async () => {
    const socket = at('late.sock');
    const late = await startAgent(disk, socket, '--timeout', '1', ...store);
    expect(await late.ended).toBe(exitCode('canceled'));
    expect(late.stderr()).toContain('nobody asked for the keys within 1000 ms');
    const stopped = await startAgent(disk, socket, ...store);
    stopped.child.kill('SIGTERM');
    expect(await stopped.ended).toBe(exitCode('canceled'));
    expect(existsSync(socket)).toBe(false);
  });

  it('leaves a socket alone that somebody listens on', async () => {
    const socket = at('taken.sock');
    const other = createServer().listen(socket);
    const { code } = await pqblk('agent', disk, '--socket', socket, ...store);
    expect(code).toBe(exitCode('exists'));
    expect(other.listening).toBe(true);
    other.close();
  });

  it('can be had from the API, and says what it was not given', async () => {
    using identity = await new KeyStore(at('keys')).unlock('alice');
    const socket = at('api.sock');
    let answer: Promise<Buffer> | undefined;
    await serveKeys(disk, {
      identity,
      socket,
      onReady: () => {
        answer = ask(socket, request(uuid));
      },
    });
    expect(await answer).toEqual(expected);
    await expect(serveKeys(disk, { identity, socket, count: 0 })).rejects.toMatchObject({
      code: 'PQBLK_INVALID_ARGUMENT',
    });
    await expect(serveKeys(disk, { socket })).rejects.toMatchObject({ code: 'PQBLK_NO_KEY' });
  });
});

describe('while a rotation of the data key is under way', () => {
  it('the bundle is bound to the key area', async () => {
    const rotating = at('rotating.sealed');
    await pqblkJson('create', rotating, '4M', '--key', 'alice', ...store);
    const rotate = fileURLToPath(new URL('../node/child/rotate.mjs', import.meta.url));
    const dist = MAIN.replace('cli/main.cjs', 'index.js');
    const child = spawnSync(process.execPath, [rotate, dist, rotating, at('keys'), 'begun']);
    expect(child.signal).toBe('SIGKILL');
    const argv = [MAIN, 'unlock', rotating, '--fd', '1', '--key', 'alice', ...store];
    const { status, stdout } = spawnSync(process.execPath, argv);
    expect(status).toBe(0);
    expect([stdout.readUInt16LE(8), stdout.readUInt16LE(10), stdout.readUInt32LE(12)]).toEqual([
      2, 2, 2,
    ]);
    const checksums = checksumsIn(rotating);
    expect(stdout.subarray(64 + 2 * 40)).toEqual(checksums);
  });

  /** Of copy A and B, where docs/format.md has them. */
  function checksumsIn(path: string): Buffer {
    const image = new ImageFile(path);
    try {
      const { keyAreas } = parseHeader(image.read(0, 65_536), image.bytes);
      return Buffer.concat(keyAreas.map(({ offset }) => image.read(offset + 32, 32)));
    } finally {
      image.close();
    }
  }
});

describe('unlock', () => {
  const unlock = (stdio: (number | 'pipe' | 'ignore')[], ...argv: string[]) =>
    spawnSync(process.execPath, [MAIN, 'unlock', disk, ...argv, ...store], { stdio });

  it('writes the bundle to a pipe', () => {
    const { status, stdout } = unlock(['ignore', 'pipe', 'pipe'], '--fd', '1');
    expect(status).toBe(0);
    expect(stdout).toEqual(expected);
    const third = unlock(['ignore', 'pipe', 'pipe', 'pipe'], '--fd', '3');
    expect(third.output[3]).toEqual(expected);
    expect(third.stdout).toEqual(Buffer.alloc(0));
  });

  it('writes it to a private file, and to no other', () => {
    const fd = openSync(at('bundle'), 'w', 0o600);
    expect(unlock(['ignore', 'pipe', 'pipe', fd], '--fd', '3').status).toBe(0);
    closeSync(fd);
    expect(readFileSync(at('bundle'))).toEqual(expected);
    const open = openSync(at('open'), 'w', 0o644);
    const refused = unlock(['ignore', 'pipe', 'pipe', open], '--fd', '3');
    closeSync(open);
    expect(refused.status).toBe(exitCode('permission'));
    expect(readFileSync(at('open')).length).toBe(0);
  });

  it('judges a named pipe as a file', () => {
    for (const [mode, code] of [
      ['666', exitCode('permission')],
      ['600', 0],
    ] as const) {
      const path = at(`fifo-${mode}`);
      spawnSync('mkfifo', ['-m', mode, path]);
      const fd = openSync(path, constants.O_RDWR | constants.O_NONBLOCK);
      const { status } = unlock(['ignore', 'pipe', 'pipe', fd], '--fd', '3');
      expect(status).toBe(code);
      const got = Buffer.alloc(expected.length + 1);
      if (code === 0) expect(got.subarray(0, readSync(fd, got))).toEqual(expected);
      else expect(() => readSync(fd, got)).toThrow('EAGAIN');
      closeSync(fd);
    }
  });

  it('writes nothing to what another user owns', () => {
    if (process.getuid?.() !== 0) {
      console.log('SKIP: only root can hand out what another user owns');
      return;
    }
    const fd = openSync(at('theirs'), 'w', 0o600);
    fchownSync(fd, 65534, 65534);
    const refused = unlock(['ignore', 'pipe', 'pipe', fd], '--fd', '3');
    closeSync(fd);
    expect(refused.status).toBe(exitCode('permission'));
    expect(refused.stderr.toString()).toContain('belongs to another user');
    expect(statSync(at('theirs')).size).toBe(0);
  });

  it('never writes to a terminal', () => {
    const command = [process.execPath, MAIN, 'unlock', disk, '--fd', '1', ...store].join(' ');
    const { status, stdout } = spawnSync('script', ['-qec', command, '/dev/null']);
    expect(status).toBe(exitCode('permission'));
    expect(stdout.toString()).toContain('never written to a terminal');
    expect(stdout.toString('latin1')).not.toContain('PQBLKBND');
  });

  it('refuses a pipe that nobody else reads, and what Node has open for itself', () => {
    const both = '$^F = 10; pipe(R, W); exec @ARGV, fileno(W)';
    const words = [process.execPath, MAIN, 'unlock', disk, ...store, '--fd'];
    const refused = spawnSync('perl', ['-e', both, ...words], { encoding: 'utf8' });
    expect(refused.status).toBe(exitCode('permission'));
    expect(refused.stderr).toContain('both ends of this pipe are in this process');
    for (const fd of ['5', '7', '12', '16']) {
      const { status, signal } = unlock(['ignore', 'pipe', 'pipe'], '--fd', fd);
      expect([signal, status === 0]).toEqual([null, false]);
    }
  });

  it('names what it lacks', async () => {
    expect((await pqblk('unlock', disk, ...store)).code).toBe(exitCode('usage'));
    expect((await pqblk('unlock', at('none'), '--fd', '1', ...store)).code).toBe(
      exitCode('not_found'),
    );
    expect(unlock(['ignore', 'pipe', 'pipe'], '--fd', '77').status).not.toBe(0);
  });
});
