// What is written where: results on stdout, bars and colours on a terminal only.
import { describe, expect, it } from 'vitest';
import { Terminal } from '../../src/cli/terminal.js';

const ESC = String.fromCharCode(27);

function terminal(isTTY: boolean, env: NodeJS.ProcessEnv = {}) {
  const written = { stdout: '', stderr: '' };
  const stream = (name: 'stdout' | 'stderr') => ({
    isTTY,
    columns: 100,
    write: (text: string) => {
      written[name] += text;
    },
    on: () => {},
    removeListener: () => {},
    cursorTo: () => {},
    clearLine: () => {},
  });
  const streams = { stdout: stream('stdout'), stderr: stream('stderr'), env };
  const signal = new AbortController().signal;
  return { written, terminal: new Terminal({ ...streams, signal }) };
}

describe('progress', () => {
  it('draws a bar on a terminal, and removes it', () => {
    const { written, terminal: shown } = terminal(true);
    const bar = shown.progress('import');
    bar.update(256 * 2 ** 20, 512 * 2 ** 20);
    bar.update(512 * 2 ** 20, 512 * 2 ** 20);
    bar.stop();
    expect(written.stderr).toContain('import');
    expect(written.stderr).toContain('256 MiB of 512 MiB');
    expect(written.stdout).toBe('');
  });

  it('is silent when piped', () => {
    const { written, terminal: shown } = terminal(false);
    const bar = shown.progress('import');
    bar.update(1, 2);
    bar.stop();
    expect(written).toEqual({ stdout: '', stderr: '' });
  });
});

it('aligns tables and fields', () => {
  const { written, terminal: shown } = terminal(false);
  shown.table(
    ['A', 'LONG'],
    [
      ['wide cell', 'x'],
      ['y', 'z'],
    ],
  );
  shown.fields([
    ['name', 'x'],
    ['absent', undefined],
    ['key', 'y'],
  ]);
  expect(written.stdout).toBe('A          LONG\nwide cell  x\ny          z\nname  x\nkey   y\n');
});

it('colours on a terminal unless NO_COLOR is set', () => {
  expect(terminal(true).terminal.style('red', 'x')).toBe(`${ESC}[31mx${ESC}[39m`);
  expect(terminal(true, { NO_COLOR: '1' }).terminal.style('red', 'x')).toBe('x');
  expect(terminal(false).terminal.style('red', 'x')).toBe('x');
});

it('writes integers beyond 2^53 as text in JSON', () => {
  const { written, terminal: shown } = terminal(false);
  shown.json({ size: 2n ** 60n });
  expect(JSON.parse(written.stdout)).toEqual({ size: '1152921504606846976' });
});
