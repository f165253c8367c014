// Room cli/: where the command line writes: results, remarks, colours, progress bars.
//
// Results go to stdout, everything else to stderr, so that stdout can be piped. Colours and bars
// appear on a terminal only; NO_COLOR is respected. Tests hand in their own streams.
import { createRequire } from 'node:module';
import { styleText } from 'node:util';
import { formatSize } from './sizes.js';

/** What is needed of process.stdout and process.stderr. */
export interface Stream {
  write(text: string): unknown;
  isTTY?: boolean | undefined;
}

export interface Streams {
  readonly stdout: Stream;
  readonly stderr: Stream;
  readonly env: NodeJS.ProcessEnv;
  /** Aborted by Ctrl-C or SIGTERM: long work stops, leaves things consistent, and says so. */
  readonly signal: AbortSignal;
  /** What to do, from now on, when nobody takes stdout. At first: stop. */
  whenUnread?(what: Unread): void;
}

/**
 * What becomes of a command whose stdout nobody takes. `stop`: its output is its work. `go-on`: its work is
 * done to its end, though a report that could not be written is an error. `forget`: a server, whose ready
 * line may have been nobody's business.
 */
export type Unread = 'stop' | 'go-on' | 'forget';

export type Style = Parameters<typeof styleText>[0];

/** A bar. Does nothing where stderr is no terminal. */
export interface Progress {
  update(done: number, total: number): void;
  stop(): void;
}

const require = createRequire(import.meta.url);

const BAR_UPDATES_PER_SECOND = 10;

export class Terminal {
  readonly signal: AbortSignal;
  readonly #streams: Streams;

  constructor(streams: Streams) {
    this.#streams = streams;
    this.signal = streams.signal;
  }

  /** For servers: whoever waited for the ready line may be gone, and nothing ends for that. */
  forgetUnread(): void {
    this.#streams.whenUnread?.('forget');
  }

  /** One line of result. */
  line(text = ''): void {
    this.#streams.stdout.write(`${text}\n`);
  }

  /** The result as JSON: one document, indented. */
  json(value: unknown): void {
    this.line(JSON.stringify(value, jsonValue, 2));
  }

  /** Text that is neither result nor error. */
  remark(text: string): void {
    this.#streams.stderr.write(`${text}\n`);
  }

  /** Colours for stdout, or the plain text where they do not belong. */
  style(style: Style, text: string): string {
    return this.#coloured(this.#streams.stdout) ? styled(style, text) : text;
  }

  styleError(style: Style, text: string): string {
    return this.#coloured(this.#streams.stderr) ? styled(style, text) : text;
  }

  #coloured(stream: Stream): boolean {
    return stream.isTTY === true && !this.#streams.env.NO_COLOR;
  }

  /** `name   value` lines with the values aligned. Undefined values are left out. */
  fields(rows: readonly (readonly [string, string | undefined])[]): void {
    const shown = rows.filter((row): row is [string, string] => row[1] !== undefined);
    const width = Math.max(...shown.map(([name]) => name.length));
    for (const [name, value] of shown) {
      this.line(`${this.style('dim', name.padEnd(width))}  ${value}`);
    }
  }

  /** Columns with a heading; every column is as wide as its widest cell. */
  table(heading: readonly string[], rows: readonly (readonly string[])[]): void {
    const widths = heading.map((name, column) =>
      Math.max(name.length, ...rows.map((row) => row[column]?.length ?? 0)),
    );
    const join = (cells: readonly string[]) =>
      cells
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join('  ')
        .trimEnd();
    // At once, so that `| grep -q` has all of it before it goes.
    this.line([this.style('dim', join(heading)), ...rows.map(join)].join('\n'));
  }

  /** A bar of bytes, or of steps that mean nothing to people. */
  progress(label: string, unit: 'bytes' | 'steps' = 'bytes'): Progress {
    if (this.#streams.stderr.isTTY !== true) return { update: () => {}, stop: () => {} };
    // Most runs show no bar: they shall not wait for it to be loaded.
    const { Presets, SingleBar } = require('cli-progress') as typeof import('cli-progress');
    const bar = new SingleBar(
      {
        format: `${label} {bar} {percentage}%${unit === 'bytes' ? '  {done} of {all}' : ''}  {eta_formatted} left`,
        fps: BAR_UPDATES_PER_SECOND,
        hideCursor: true,
        clearOnComplete: true,
        stream: this.#streams.stderr as NodeJS.WritableStream,
      },
      Presets.shades_classic,
    );
    let started = false;
    return {
      update(done, total) {
        const payload = { done: formatSize(done), all: formatSize(total) };
        if (!started) bar.start(total, done, payload);
        else if (total !== bar.getTotal()) bar.setTotal(total);
        started = true;
        bar.update(done, payload);
      },
      stop() {
        if (started) bar.stop();
      },
    };
  }
}

function styled(style: Style, text: string): string {
  return styleText(style, text, { validateStream: false });
}

function jsonValue(_key: string, value: unknown): unknown {
  return typeof value === 'bigint' ? value.toString() : value;
}
