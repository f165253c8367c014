// A server that was stopped itself (SIGSTOP, a frozen container) and its clients, who had to wait for it.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { afterEach, expect, it } from 'vitest';
import { DIST, rawFile, scratch } from './support.js';

const SERVES = fileURLToPath(new URL('./child/serves.mjs', import.meta.url));
const MiB = 2 ** 20;
const READS = 48;
const directory = scratch();
const undo: (() => unknown)[] = [];

afterEach(() => {
  for (const each of undo.splice(0)) each();
});

async function startServer(path: string, socket: string, stallSeconds: number) {
  const child = spawn(process.execPath, [SERVES, DIST, path, socket, `${stallSeconds}`], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  undo.push(() => child.kill('SIGKILL'));
  await once(child.stdout, 'data');
  return child;
}

/** After the handshake (fixed newstyle, NBD_OPT_EXPORT_NAME without zeroes); counts what comes. */
async function attach(path: string): Promise<{ socket: Socket; received: () => number }> {
  const socket = connect(path);
  undo.push(() => socket.destroy());
  let bytes = 0;
  socket.on('data', (data) => {
    bytes += data.length;
  });
  const option = Buffer.alloc(4 + 16);
  option.writeUInt32BE(3, 0); // NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES
  option.write('IHAVEOPT', 4, 'latin1');
  option.writeUInt32BE(1, 12);
  socket.write(option);
  while (bytes < 18 + 10) await once(socket, 'data'); // the greeting; size and flags
  bytes = 0;
  return { socket, received: () => bytes };
}

function ask(socket: Socket, cookie: number) {
  const request = Buffer.alloc(28);
  request.writeUInt32BE(0x25609513, 0); // NBD_REQUEST_MAGIC, then NBD_CMD_READ
  request.writeBigUInt64BE(BigInt(cookie), 8);
  request.writeUInt32BE(MiB, 24);
  socket.write(request);
}

it('does not take its own absence for the silence of a client', { timeout: 60_000 }, async () => {
  const path = rawFile(directory, 8 * MiB);
  const child = await startServer(path, join(directory, 'socket'), 1);
  const { socket, received } = await attach(join(directory, 'socket'));
  const closed = once(socket, 'close');
  socket.pause(); // the server waits for this client, though not for long
  for (let i = 0; i < READS; i += 1) ask(socket, i);
  await sleep(300);
  child.kill('SIGSTOP');
  await sleep(3000);
  child.kill('SIGCONT');
  await sleep(100);
  socket.resume();
  const all = READS * (16 + MiB); // simple replies
  await Promise.race([
    closed,
    (async () => {
      while (received() < all) await once(socket, 'data');
    })(),
  ]);
  expect(received()).toBe(all);

  // And a client that is silent while the server is there is cut off.
  socket.pause();
  for (let i = 0; i < READS; i += 1) ask(socket, i);
  await sleep(2500);
  socket.resume();
  await closed;
  expect(received()).toBeLessThan(2 * all);
});
