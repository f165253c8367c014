// Room keys/: whether somebody is waited for. A file of its own: whoever handles signals asks it, before
// anything else of this room is loaded.
let waiting = 0;

/** True while nothing is being done but waiting for what comes out of a pipe or terminal. */
export const isWaitingForInput = (): boolean => waiting > 0;

/** Marks the time until `input` is there as waiting. */
export async function waitingFor<T>(input: Promise<T>): Promise<T> {
  waiting += 1;
  try {
    return await input;
  } finally {
    waiting -= 1;
  }
}
