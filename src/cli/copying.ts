// Room cli/: what `import` and `export` share: a bar while they copy, and a line when they have.
import type { CopyResult, LongWork } from '../index.js';
import { formatSize } from './sizes.js';
import type { Terminal } from './terminal.js';

export interface TimedCopy extends CopyResult {
  readonly seconds: number;
}

export async function copying(
  terminal: Terminal,
  label: string,
  copy: (work: LongWork) => Promise<CopyResult>,
): Promise<TimedCopy> {
  const started = performance.now();
  const bar = terminal.progress(label);
  try {
    const result = await copy({ onProgress: bar.update, signal: terminal.signal });
    return { ...result, seconds: (performance.now() - started) / 1000 };
  } finally {
    bar.stop();
  }
}

export function showCopy(
  terminal: Terminal,
  source: string,
  target: string,
  result: TimedCopy,
  json?: boolean,
): void {
  if (json) {
    terminal.json({ source, target, ...result });
    return;
  }
  const { copiedBytes, zeroBytes, seconds } = result;
  const speed = formatSize(Math.round(copiedBytes / Math.max(seconds, 0.001)));
  terminal.line(
    `${source} → ${target}: ${formatSize(copiedBytes)} copied, ${formatSize(zeroBytes)} of zeros ` +
      `skipped, ${seconds.toFixed(1)} s (${speed}/s)`,
  );
}
