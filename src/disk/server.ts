// Room disk/: what every running server of a disk has in common: its owner, its reports, its end.
//
// The native side is native/node/server_handle.h.
import { calling, type NativeServer } from '../native.js';

/** Called with each line for people: what a client did wrong, why a request failed. */
export type OnReport = (text: string) => void;

/** A running server. It keeps the process alive until it, or its disk, is closed. */
export class DiskServer<Native extends NativeServer> implements AsyncDisposable {
  protected readonly native: Native;
  readonly #onReport: OnReport | undefined;
  /** Keeps the disk from being collected, which would close it. */
  readonly owner: object;
  #closing: Promise<void> | undefined;

  constructor(handle: Native, owner: object, onReport: OnReport | undefined) {
    this.native = handle;
    this.owner = owner;
    this.#onReport = onReport;
    handle.onReports = () => this.#passReports();
    this.#passReports(); // what came before
  }

  /** Takes no more clients and requests, answers what is in flight, ends. May be called again. */
  close(): Promise<void> {
    this.#closing ??= calling(() => this.native.close()).finally(() => this.#passReports());
    return this.#closing;
  }

  #passReports(): void {
    for (const text of this.native.takeReports()) this.#onReport?.(text);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** Without the options that were not given: the native side takes no undefined. */
export function given(options: Record<string, unknown>): object {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
}
