// Gives the Node API to the soak's native clients: a small NBD server in JavaScript, so that promises
// and batched queues are driven by the same clients and held against the same model as all else.
//
// Fixed newstyle with GO, simple replies. Numbers are those of the NBD protocol's text.
import { rmSync } from 'node:fs';
import { createServer } from 'node:net';

const OPTION_MAGIC = Buffer.from('IHAVEOPT');
const GREETING = Buffer.concat([Buffer.from('NBDMAGIC'), OPTION_MAGIC, Buffer.from([0, 3])]);
const OPTION_REPLY = 0x0003e889045565a9n;
const GO = 7;
const ACK = 1;
const INFO = 3;
const UNSUPPORTED = 0x80000001;
// flags, flush, FUA, trim, write zeroes, several connections
const FLAGS = 1 | 4 | 8 | 32 | 64 | 256;
const READ = 0;
const WRITE = 1;
const DISCONNECT = 2;
const FLUSH = 3;
const TRIM = 4;
const ZEROES = 6;
const FUA = 1;
const NO_HOLE = 2;
const REQUEST_BYTES_MAX = 2 ** 20;

const errnoOf = (error) => (error.kind === 'no_space' ? 28 : 5);

/** Serves `disk` on the Unix socket `path`, through `perform(request)`. */
export async function serveBridge(path, disk, perform) {
  const server = createServer((socket) => {
    socket.on('error', () => {}); // a client that was killed
    void converse(socket, disk, perform).catch(() => socket.destroy());
  });
  rmSync(path, { force: true }); // of a host that was killed
  await new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(path, resolve);
  });
}

/** `take(n)`: the next n bytes; undefined at the end of the stream. */
function taker(socket) {
  const chunks = socket[Symbol.asyncIterator]();
  let rest = Buffer.alloc(0);
  return async (count) => {
    const parts = [rest];
    let have = rest.length;
    while (have < count) {
      const { value, done } = await chunks.next();
      if (done) return undefined;
      parts.push(value);
      have += value.length;
    }
    const all = parts.length > 1 ? Buffer.concat(parts) : rest;
    rest = all.subarray(count);
    return all.subarray(0, count);
  };
}

async function converse(socket, disk, perform) {
  const take = taker(socket);
  socket.write(GREETING);
  await take(4);
  if (!(await negotiate(socket, take, disk))) return;
  for (;;) {
    const head = await take(28);
    const command = head?.readUInt16BE(6);
    if (!head || command === DISCONNECT) return void socket.end();
    const request = {
      command,
      flags: head.readUInt16BE(4),
      cookie: Buffer.from(head.subarray(8, 16)),
      offset: Number(head.readBigUInt64BE(16)),
      length: head.readUInt32BE(24),
    };
    if (command === WRITE) request.data = await take(request.length);
    if (command === WRITE && !request.data) return;
    perform(request).then(
      (data) => reply(socket, request, 0, data),
      (error) => reply(socket, request, errnoOf(error)),
    );
  }
}

async function negotiate(socket, take, disk) {
  for (;;) {
    const head = await take(16);
    if (!head) return false;
    const option = head.readUInt32BE(8);
    await take(head.readUInt32BE(12));
    const answer = (type, data = Buffer.alloc(0)) => {
      const message = Buffer.alloc(20);
      message.writeBigUInt64BE(OPTION_REPLY, 0);
      message.writeUInt32BE(option, 8);
      message.writeUInt32BE(type, 12);
      message.writeUInt32BE(data.length, 16);
      socket.write(Buffer.concat([message, data]));
    };
    if (option !== GO) {
      answer(UNSUPPORTED);
      continue;
    }
    const info = Buffer.alloc(12);
    info.writeBigUInt64BE(BigInt(disk.size), 2);
    info.writeUInt16BE(FLAGS, 10);
    answer(INFO, info);
    answer(ACK);
    return true;
  }
}

function reply(socket, { cookie }, errno, data = Buffer.alloc(0)) {
  if (!socket.writable) return;
  const head = Buffer.alloc(8);
  head.writeUInt32BE(0x67446698, 0);
  head.writeUInt32BE(errno, 4);
  socket.write(Buffer.concat([head, cookie, errno === 0 ? data : Buffer.alloc(0)]));
}

/** Requests as promises of a Disk. */
export const byPromises = (disk) => async (request) => {
  const { command, flags, offset, length, data } = request;
  const how = { fua: (flags & FUA) !== 0 };
  if (command === READ) {
    const buffer = Buffer.alloc(length);
    await disk.read(buffer, offset);
    return buffer;
  }
  if (command === WRITE) await disk.write(data, offset, how);
  else if (command === FLUSH) await disk.flush();
  else if (command === TRIM) await disk.discard(offset, length);
  else if (command === ZEROES) {
    await disk.writeZeroes(offset, length, { ...how, unmap: (flags & NO_HOLE) === 0 });
  } else throw new Error(`no command: ${command}`);
  return undefined;
};

/** Requests in batches of a DiskQueue; the cookie is a place in its arena. */
export function byQueue(disk, places) {
  const queue = disk.queue(places, { arenaBytes: places * REQUEST_BYTES_MAX });
  const waiting = new Map();
  const otherwise = byPromises(disk);
  let due = false;
  const submit = () => {
    due = false;
    queue.submit();
  };
  queue.onCompletions = () => {
    queue.reap((place, error) => {
      const { resolve, reject, read } = waiting.get(place);
      waiting.delete(place);
      if (error) reject(error);
      else resolve(read ? Buffer.from(read) : undefined);
    });
  };
  return (request) => {
    const { command, flags, cookie, offset, length, data } = request;
    const place = Number(cookie.readBigUInt64BE(0));
    if (command === ZEROES && flags & FUA) return otherwise(request); // batches know no such thing
    const at = place * REQUEST_BYTES_MAX;
    return new Promise((resolve, reject) => {
      const read = command === READ ? queue.arena.subarray(at, at + length) : undefined;
      waiting.set(place, { resolve, reject, read });
      if (command === READ) queue.read(offset, length, at, place);
      if (command === WRITE) {
        data.copy(queue.arena, at);
        queue.write(offset, length, at, place, (flags & FUA) !== 0);
      }
      if (command === FLUSH) queue.flush(place);
      if (command === TRIM) queue.discard(offset, length, place);
      if (command === ZEROES) queue.writeZeroes(offset, length, place, (flags & NO_HOLE) === 0);
      if (!due) setImmediate(submit);
      due = true;
    });
  };
}
