// Loads of a Node program: so many reads in flight, each place drawn at random, for so long.
//
// Three ways to ask: a function that returns a promise, one that takes a callback, and the batched
// queue of a disk. All go through the same clock, offsets and count, so that they differ in nothing
// but the way.
import { Percentiles } from './percentiles.mjs';

/** Numbers below `count`, the same for the same seed (xorshift32). */
export function drawer(count, seed = 1) {
  let state = (seed * 0x9e3779b9) | 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % count;
  };
}

/** Counts what completes until the first that comes too late, and how long each took. */
class Meter {
  #percentiles = new Percentiles();
  #began = performance.now();
  #end;
  #count = 0;
  #stopped = 0;

  constructor(seconds) {
    this.#end = this.#began + seconds * 1000;
  }

  /** One that began at `began` is done; the time now, or 0 when it is time to stop. */
  done(began) {
    if (this.#stopped !== 0) return 0;
    const now = performance.now();
    this.#percentiles.add((now - began) * 1000);
    this.#count += 1;
    if (now < this.#end) return now;
    this.#stopped = now;
    return 0;
  }

  /** Requests a second, and microseconds. */
  result() {
    const seconds = (this.#stopped - this.#began) / 1000;
    return { ops: this.#count, iops: this.#count / seconds, ...this.#percentiles.summary() };
  }
}

/** `read(buffer, offset)` → promise. A loop for each of `buffers`. */
export async function promised(read, { buffers, bytes, size, seconds }) {
  const meter = new Meter(seconds);
  const draw = drawer(Math.floor(size / bytes));
  const loop = async (buffer) => {
    for (let began = performance.now(); began > 0; began = meter.done(began)) {
      await read(buffer, draw() * bytes);
    }
  };
  await Promise.all(buffers.map(loop));
  return meter.result();
}

/** `read(buffer, offset, callback(error))`. */
export async function calledBack(read, { buffers, bytes, size, seconds }) {
  const meter = new Meter(seconds);
  const draw = drawer(Math.floor(size / bytes));
  const loop = (buffer) =>
    new Promise((resolve, reject) => {
      let began = performance.now();
      const next = (error) => {
        if (error) return reject(error);
        began = meter.done(began);
        if (began === 0) return resolve();
        read(buffer, draw() * bytes, next);
      };
      read(buffer, draw() * bytes, next);
    });
  await Promise.all(buffers.map(loop));
  return meter.result();
}

/** A DiskQueue whose arena has `bytes` for each of its `depth` requests. */
export async function batched(queue, { bytes, size, seconds, draw = undefined }) {
  const meter = new Meter(seconds);
  const next = draw ?? drawer(Math.floor(size / bytes));
  const began = new Float64Array(queue.depth);
  const free = Array.from({ length: queue.depth }, (_, place) => place);
  let failed;
  let going = true;
  const completed = (place, error) => {
    failed ??= error;
    free.push(place);
    going = meter.done(began[place]) > 0 && failed === undefined && going;
  };
  do {
    while (going && free.length > 0) {
      const place = free.pop();
      began[place] = performance.now();
      queue.read(next() * bytes, bytes, place * bytes, place);
    }
    queue.submit();
    await queue.wait();
    queue.reap(completed);
  } while (queue.inFlight > 0 || going);
  if (failed) throw failed;
  return meter.result();
}
