// Room disk/: how a process that serves a disk is talked to: frames on a Unix socket.
//
// A frame is two u32 (little-endian), the length of a JSON text and of a binary part, then both. A
// request is {id, op, ...}; answers to it are {id, progress: [done, total]} and, once, {id, result}
// or {id, error}. Who is at the other end is known (control-place.ts). Frames may carry a data key, so
// buffers are wiped once they were taken apart.
import type { Socket } from 'node:net';
import { ERROR_TABLE, type ErrorKind, fromSystem, PqblkError } from '../errors.js';

export const JSON_BYTES_MAX = 65_536;
/** A key area, and room for a few more words. */
export const BINARY_BYTES_MAX = 131_072;
const HEAD_BYTES = 8;

export interface Frame {
  readonly message: Readonly<Record<string, unknown>>;
  /** The receiver's to wipe. */
  readonly binary: Uint8Array;
}

/** Sends a frame; the bytes that were sent are wiped once the system has them. */
export function send(socket: Socket, message: object, binary?: Uint8Array): void {
  const json = Buffer.from(JSON.stringify(message));
  const length = HEAD_BYTES + json.length + (binary?.length ?? 0);
  const frame = Buffer.from(new ArrayBuffer(length)); // of its own: no pool keeps a key
  frame.writeUInt32LE(json.length, 0);
  frame.writeUInt32LE(binary?.length ?? 0, 4);
  frame.set(json, HEAD_BYTES);
  if (binary) frame.set(binary, HEAD_BYTES + json.length);
  socket.write(frame, () => frame.fill(0));
}

/** Calls `onFrame` for each frame; a peer that breaks the protocol is cut off with `onEnd`. */
export function receive(
  socket: Socket,
  onFrame: (frame: Frame) => void,
  onEnd: (error?: Error) => void,
): void {
  let pending = new Uint8Array(0);
  socket.on('data', (chunk: Buffer) => {
    const joined = new Uint8Array(new ArrayBuffer(pending.length + chunk.length));
    joined.set(pending);
    joined.set(chunk, pending.length);
    pending.fill(0);
    chunk.fill(0);
    pending = joined;
    try {
      for (let frame = takeFrame(pending); frame; frame = takeFrame(pending)) {
        pending = frame.rest;
        onFrame(frame);
      }
    } catch (error) {
      pending.fill(0);
      socket.destroy(error as Error);
    }
  });
  socket.once('error', () => {}); // told by close
  socket.once('close', () => {
    pending.fill(0);
    onEnd(socket.errored ?? undefined);
  });
}

function takeFrame(bytes: Uint8Array): (Frame & { rest: Uint8Array<ArrayBuffer> }) | undefined {
  if (bytes.length < HEAD_BYTES) return undefined;
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const jsonBytes = view.getUint32(0, true);
  const binaryBytes = view.getUint32(4, true);
  if (jsonBytes > JSON_BYTES_MAX || binaryBytes > BINARY_BYTES_MAX) {
    throw new PqblkError('invalid_argument', 'a control frame is too long');
  }
  const end = HEAD_BYTES + jsonBytes + binaryBytes;
  if (bytes.length < end) return undefined;
  const text = Buffer.from(bytes.buffer, bytes.byteOffset + HEAD_BYTES, jsonBytes).toString();
  const message: unknown = JSON.parse(text);
  if (typeof message !== 'object' || message === null || Array.isArray(message)) {
    throw new PqblkError('invalid_argument', 'a control frame is no JSON object');
  }
  const binary = copyOf(bytes.subarray(HEAD_BYTES + jsonBytes, end));
  const rest = copyOf(bytes.subarray(end));
  bytes.fill(0);
  return { message: message as Record<string, unknown>, binary, rest };
}

function copyOf(bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  const copy = new Uint8Array(new ArrayBuffer(bytes.length));
  copy.set(bytes);
  return copy;
}

/** An error as it crosses the socket. */
export function errorToMessage(error: unknown): object {
  const { kind, message, path, operation, hint } = fromSystem(error);
  return { kind, message, path, operation, hint };
}

export function errorFromMessage(value: unknown): PqblkError {
  const { kind, message, ...rest } = (value ?? {}) as Record<string, string | undefined>;
  const known: ErrorKind =
    kind !== undefined && Object.hasOwn(ERROR_TABLE, kind) ? (kind as ErrorKind) : 'general';
  const { path, operation, hint } = rest;
  return new PqblkError(known, message ?? 'unknown error', { path, operation, hint });
}
