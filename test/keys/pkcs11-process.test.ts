// The token process itself: what it is given, what it may do, how it ends, and what nonsense on its
// socket does to it.
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import type { Socket } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { beforeAll, expect, test } from 'vitest';
import { openTokenKey, type TokenKey, TokenModule } from '../../src/keys/index.js';
import { tokenProgram } from '../../src/keys/pkcs11/process.js';
import { MessageWriter, Operation } from '../../src/keys/pkcs11/wire.js';
import { PIN, TestToken } from './pkcs11-support.js';
import { errorOf, secretOf } from './support.js';

const DIST = new URL('../../dist/index.js', import.meta.url).href;
const KEYS = new URL('../../dist/keys/index.js', import.meta.url).href;
const token = new TestToken();
let key: TokenKey;
beforeAll(async () => {
  await token.init();
  key = await token.generate(1, 'key');
});

const status = (pid: number | undefined, file: string) =>
  readFileSync(`/proc/${pid}/${file}`, 'utf8');

test('it is confined: no new privileges, no core dump, no arguments', async () => {
  using module = await TokenModule.load(token.place());
  expect(status(module.pid, 'status')).toMatch(/^NoNewPrivs:\s*1$/m);
  expect(status(module.pid, 'limits')).toMatch(/^Max core file size\s+0\s+0/m);
  expect(status(module.pid, 'cmdline').split('\0').filter(Boolean)).toEqual([tokenProgram()]);
});

test('its environment is what the profile names and little else', async () => {
  token.misbehave('tells-its-environment');
  process.env.PQBLK_TEST_SECRET = 'hunter2';
  process.env.PQBLK_TEST_WANTED = 'yes';
  const place = token.place('quac100', { environment: ['PQBLK_TEST_WANTED'] });
  (await TokenModule.load(place)).end();
  token.misbehave('');
  const told = readFileSync(join(token.directory, 'environment'), 'utf8');
  const names = told
    .split('\n')
    .filter(Boolean)
    .map((line) => line.split('=')[0]);
  const allowed = ['PATH', 'LANG', 'HOME', 'XDG_RUNTIME_DIR', 'PQBLK_TEST_WANTED'];
  expect(names.filter((name) => !allowed.includes(name ?? ''))).toEqual([]);
  expect(names).toContain('PQBLK_TEST_WANTED');
  expect(told).not.toContain('hunter2');
});

test('killed while idle: the next request says so, and only that one', async () => {
  const uri = { ...token.uri, id: key.id };
  const module = await TokenModule.load(token.place());
  await module.logIn(await module.find(uri), secretOf(PIN));
  const found = await module.key(uri);
  process.kill(module.pid ?? 0, 'SIGKILL');
  const ciphertext = new Uint8Array(1088);
  const first = await errorOf(() => module.decapsulate(found, ciphertext));
  expect(first).toMatchObject({ kind: 'token_crashed' });
  expect(first.message).toContain('SIGKILL');
  expect((await errorOf(() => module.decapsulate(found, ciphertext))).kind).toBe('token_crashed');
  module.end();
  await token.unlock(key);
});

test('requests of several callers do not mix', async () => {
  const uri = { ...token.uri, id: key.id };
  using identity = await openTokenKey(token.place(), uri, key.encapsulationKey, secretOf(PIN));
  const { provider, privateKey } = identity;
  const round = async () => {
    const { ciphertext, sharedSecret } = await provider.encapsulate(1, key.encapsulationKey);
    using shared = await provider.decapsulate(privateKey, ciphertext);
    return shared.equals(sharedSecret);
  };
  expect(await Promise.all(Array.from({ length: 8 }, round))).toEqual(Array(8).fill(true));
});

test('after its end a session is closed, twice as well as once', async () => {
  const module = await TokenModule.load(token.place());
  module.end();
  module.end();
  expect((await errorOf(() => module.tokens())).kind).toBe('closed');
});

async function gone(pid: number): Promise<boolean> {
  for (let tries = 0; tries < 5000; tries += 1) {
    // A zombie waits for its parent only: it runs no more.
    if (!existsSync(`/proc/${pid}`) || /^State:\s*Z/m.test(status(pid, 'status'))) return true;
    await sleep(20);
  }
  return false;
}

const script = (text: string) => [
  '--input-type=module',
  '-e',
  `const keys = await import(${JSON.stringify(KEYS)});
   const place = { module: ${JSON.stringify(token.module)},
     profile: await keys.loadProfile('quac100') };
   ${text}`,
];

test('it ends with its parent, even while the module hangs', async () => {
  token.misbehave('hang-at-start');
  const parent: ChildProcess = spawn(
    process.execPath,
    script(`const loading = keys.TokenModule.load(place);
            const { readFileSync } = await import('node:fs');
            const task = '/proc/self/task/' + process.pid + '/children';
            console.log(readFileSync(task, 'utf8').trim());
            await loading;`),
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  const line = await new Promise<string>((resolve) =>
    parent.stdout?.once('data', (data: Buffer) => resolve(data.toString())),
  );
  token.misbehave('');
  const pid = Number(line.trim().split(' ')[0]);
  expect(pid).toBeGreaterThan(1);
  expect(existsSync(`/proc/${pid}`)).toBe(true);
  parent.kill('SIGKILL');
  expect(await gone(pid)).toBe(true);
});

test('a session that nobody ended does not keep a program alive', () => {
  expect(existsSync(fileURLToPath(DIST))).toBe(true);
  const { status: code, stdout } = spawnSync(
    process.execPath,
    script(`const module = await keys.TokenModule.load(place);
            console.log((await module.tokens())[0].label);`),
    { encoding: 'utf8', timeout: 120_000 },
  );
  expect({ code, stdout }).toEqual({ code: 0, stdout: 'Test token\n' });
});

// ---- nonsense on the socket ------------------------------------------------------------------------

/** The program with nobody but us at the other end of its socket. */
class Raw {
  readonly child = spawn(tokenProgram(), [], { stdio: ['ignore', 'ignore', 'ignore', 'pipe'] });
  readonly socket = this.child.stdio[3] as Socket;
  readonly ended = new Promise<{ code: number | null; signal: string | null }>((resolve) =>
    this.child.once('exit', (code, signal) => resolve({ code, signal })),
  );
  #received = Buffer.alloc(0);

  constructor() {
    this.socket.on('error', () => {});
    this.socket.on('data', (chunk: Buffer) => {
      this.#received = Buffer.concat([this.#received, chunk]);
    });
  }

  async ask(body: Uint8Array): Promise<Buffer> {
    const head = Buffer.alloc(4);
    head.writeUInt32LE(body.length);
    this.socket.write(Buffer.concat([head, body]));
    for (let tries = 0; tries < 100_000; tries += 1) {
      const have = this.#received.length;
      if (have >= 4 && have >= 4 + this.#received.readUInt32LE()) {
        const reply = this.#received.subarray(4);
        this.#received = Buffer.alloc(0);
        return reply;
      }
      await sleep(1);
    }
    throw new Error('no reply');
  }
}

test('a message longer than any ends the process; so does half a message', async () => {
  const long = new Raw();
  long.socket.write(Buffer.from([0xff, 0xff, 0xff, 0x7f, 1]));
  expect(await long.ended).toEqual({ code: 71, signal: null });
  const half = new Raw();
  half.socket.end(Buffer.from([9, 0, 0, 0, 1]));
  expect(await half.ended).toEqual({ code: 71, signal: null });
  const silent = new Raw();
  silent.socket.end();
  expect(await silent.ended).toEqual({ code: 0, signal: null });
});

test('random messages get an answer that is no success, and never a crash', async () => {
  const raw = new Raw();
  let state = 12345;
  const random = () => {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    return state >>> 16;
  };
  for (let round = 0; round < 300; round += 1) {
    const body = Uint8Array.from({ length: 1 + (random() % 200) }, () => random() & 0xff);
    body[0] = random() % 13; // all operations but Close
    const reply = await raw.ask(body);
    expect(reply[0]).toBe(2);
  }
  // It still does its work.
  const load = new MessageWriter(Operation.load).text(token.module).u32(0).u8(1).u8(0).text('');
  const reply = await raw.ask(load.u8(1).finish().subarray(4));
  expect(reply[0]).toBe(0);
  const again = await raw.ask(load.finish().subarray(4));
  expect([again[0], again[1]]).toEqual([2, 1]);
  raw.socket.end();
  expect(await raw.ended).toEqual({ code: 0, signal: null });
});

test('a process that was not started by pqblk has no socket, and ends', () => {
  const { status: code } = spawnSync(tokenProgram(), [], { stdio: 'ignore', timeout: 120_000 });
  expect(code).toBe(0);
});

test('a crash is told at once though the module forked, and what it forked ends with it', async () => {
  token.misbehave('forks-and-crashes');
  const error = await errorOf(() => TokenModule.load(token.place()));
  token.misbehave('');
  expect(error.kind).toBe('token_crashed'); // who waits for the socket to close hears of a timeout
  const pid = Number(readFileSync(join(token.directory, 'forked'), 'utf8'));
  expect(pid).toBeGreaterThan(1);
  expect(await gone(pid)).toBe(true);
});
