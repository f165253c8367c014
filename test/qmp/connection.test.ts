// The monitor's client with a peer that is not QEMU: what the peer sends is written here by hand.
// hotplug.test.ts has the real one.
import { createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, expect, it } from 'vitest';
import { plugDisk, QMP_LINE_BYTES_MAX, QmpConnection, unplugDisk } from '../../src/index.js';
import { pqblk, scratch } from '../cli/helpers.js';

const dir = scratch();
const GREETING =
  '{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7}},"capabilities":[]}}\n';
const servers = new Set<Server>();
const sockets = new Set<Socket>();
let count = 0;

afterEach(async () => {
  for (const socket of sockets) socket.destroy();
  await Promise.all([...servers].map((server) => new Promise((done) => server.close(done))));
  servers.clear();
  sockets.clear();
});

interface Request {
  execute: string;
  id: number;
  arguments: Record<string, string>;
}

/** Greets, accepts capabilities, and leaves every other request to `answer`. */
async function peer(
  answer: (request: Request, socket: Socket) => string | undefined,
  greeting: string | Buffer | null = GREETING,
): Promise<string> {
  const path = join(dir, `peer-${++count}`);
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on('error', () => {});
    if (greeting !== null) socket.write(greeting);
    createInterface({ input: socket }).on('line', (line) => {
      const request = JSON.parse(line) as Request;
      const text =
        request.execute === 'qmp_capabilities'
          ? JSON.stringify({ return: {}, id: request.id })
          : answer(request, socket);
      if (text !== undefined) socket.write(`${text}\n`);
    });
  });
  servers.add(server);
  await new Promise<void>((done) => server.listen(path, done));
  return path;
}

const silent = () => undefined;
const failureOf = async (work: Promise<unknown>) =>
  (await work.then(
    () => undefined,
    (error) => error,
  )) as { kind: string; message: string; hint?: string } | undefined;

it.each([
  ['another protocol', 'SSH-2.0-OpenSSH_9.2\r\n', /found “SSH-2.0-OpenSSH_9.2”/],
  ['other JSON', '{"QMP":{"version":{"qemu":{"major":"x"}}}}\n', /for a greeting/],
  ['no object', '[1,2]\n', /found “\[1,2\]”/],
  ['bytes that are no text', Buffer.from('ff00fe1b5b324a0a', 'hex'), /machine protocol/],
  ['a line without end', 'x'.repeat(QMP_LINE_BYTES_MAX + 1), /a line without end/],
])('breaks off when the greeting is %s', async (_what, greeting, message) => {
  const failure = await failureOf(QmpConnection.connect(await peer(silent, greeting)));
  expect(failure).toMatchObject({ kind: 'hypervisor' });
  expect(failure?.message).toMatch(message);
  expect(failure?.message).not.toMatch(/\p{Cc}/u); // a terminal will see it
});

it('takes a greeting and answers in any pieces, and waits for no more than it was told', async () => {
  const path = await peer(({ id }, socket) => {
    const text = `{"event":"RTC_CHANGE","data":{}}\n{"return":"größer","id":${id}}\n`;
    for (const byte of Buffer.from(text)) socket.write(Buffer.of(byte));
    return undefined;
  });
  using monitor = await QmpConnection.connect(path);
  expect(await monitor.execute('x')).toBe('größer');
  const late = await failureOf(monitor.listen(() => false).event(50));
  expect(late?.kind).toBe('timed_out');
  const mute = await failureOf(QmpConnection.connect(await peer(silent, null), { timeoutMs: 50 }));
  expect(mute).toMatchObject({ kind: 'timed_out', message: expect.stringMatching(/greeting/) });
});

it.each([
  ['a broken line', '{"return": 1', /found “{"return": 1”/],
  ['neither answer nor event', '{"hello":1}', /found “{"hello":1}”/],
  ['an error about nothing', '{"error":{"class":"GenericError","desc":"JSON"}}', /JSON/],
  ['an error without words', '{"error":{},"id":2}', /QEMU says nothing: nothing/],
  [
    'an error that paints the terminal',
    '{"error":{"class":"GenericError","desc":"\\u001b[2Jno\\u0007\\n"},"id":2}',
    /QEMU says GenericError: \[2Jno$/,
  ],
])('fails what waits when the answer is %s', async (_what, line, message) => {
  using monitor = await QmpConnection.connect(await peer(() => line));
  const failure = await failureOf(monitor.execute('x'));
  expect(failure).toMatchObject({ kind: 'hypervisor' });
  expect(failure?.message).toMatch(message);
});

it('ignores the late answer to a command that was given up', async () => {
  const path = await peer(({ execute, id }, socket) => {
    if (execute === 'slow') setTimeout(() => socket.write(`{"return":1,"id":${id}}\n`), 60);
    return execute === 'slow' ? undefined : `{"return":2,"id":${id}}`;
  });
  using monitor = await QmpConnection.connect(path);
  expect((await failureOf(monitor.execute('slow', {}, 20)))?.kind).toBe('timed_out');
  await sleep(80);
  expect(await monitor.execute('fast')).toBe(2);
});

it('says that the guest refuses, and what QEMU answered that makes no sense', async () => {
  const path = await peer(({ execute, id, arguments: { path: object } }, socket) => {
    if (execute === 'device_del') {
      socket.write('{"event":"DEVICE_UNPLUG_GUEST_ERROR","data":{"device":"d","path":"/x"}}\n');
    }
    const children = [{ name: 'd', type: 'child<vhost-user-blk-pci>' }];
    const list = object === '/machine/peripheral' ? children : [];
    return JSON.stringify({ return: execute === 'qom-list' ? list : 'c', id });
  });
  using monitor = await QmpConnection.connect(path);
  const refused = await failureOf(unplugDisk(monitor, 'd', { timeoutMs: 2000 }));
  expect(refused).toMatchObject({
    kind: 'hypervisor',
    message: 'the guest refuses to give up “d”',
  });
  const odd = await failureOf(plugDisk(monitor, { id: 'e', socket: '/s', queues: 1 }));
  expect(odd).toMatchObject({ kind: 'hypervisor', message: 'expected another answer, found c' });
  const line = await pqblk('detach', 'd', '--qmp', path, '--json');
  expect(JSON.parse(line.stderr)).toMatchObject({ error: { code: 'PQBLK_HYPERVISOR' } });
});

it('puts back what it added when a step fails or QEMU falls silent', async () => {
  for (const mode of ['refuses', 'falls silent'] as const) {
    const asked: string[] = [];
    const path = await peer(({ execute, id, arguments: { id: what } }) => {
      asked.push(what === undefined ? execute : `${execute} ${what}`);
      const error = { class: 'GenericError', desc: 'no slot/function available for d' };
      if (execute === 'device_add') {
        return mode === 'refuses' ? JSON.stringify({ error, id }) : undefined;
      }
      const answers: Record<string, unknown> = {
        'qom-list': [],
        'query-memdev': [],
        'query-memory-devices': [],
        'query-chardev': asked.includes('chardev-add d-vhost')
          ? [{ label: 'd-vhost', filename: 'unix:/s' }]
          : [],
      };
      return JSON.stringify({ return: answers[execute] ?? {}, id });
    });
    using monitor = await QmpConnection.connect(path);
    const plug = plugDisk(monitor, {
      ...{ id: 'd', socket: '/s', queues: 1 },
      deviceTimeoutMs: 100,
    });
    const failure = await failureOf(plug);
    if (mode === 'refuses') {
      expect(failure?.hint).toContain('pcie-root-port');
      expect(asked.slice(-2)).toEqual(['device_add d', 'chardev-remove d-vhost']);
    } else {
      expect(failure?.kind).toBe('timed_out');
      const undone = ['device_add d', 'device_del d', 'chardev-remove d-vhost'];
      expect(asked.slice(-3)).toEqual(undone);
    }
  }
});
