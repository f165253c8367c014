// What becomes of a command whose stdout loses its reader, or is a file that has no room left.
import { spawnSync } from 'node:child_process';
import { closeSync, constants, mkdirSync, openSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { exitCode, MAIN, pqblk, pqblkJson, scratch } from './helpers.js';

const directory = scratch();
const at = (name: string) => join(directory, name);
const store = ['--store', at('keys')];
const READER_GONE = 141;

/** The write end of a pipe whose reader has gone, or a file without room. */
const BAD = {
  'a reader that has gone': () => {
    const fifo = at(`pipe-${made}`);
    spawnSync('mkfifo', [fifo]);
    const reader = openSync(fifo, constants.O_RDWR);
    const writer = openSync(fifo, 'w');
    closeSync(reader);
    return writer;
  },
  'no room': () => openSync('/dev/full', 'w'),
};

let made = 0;

function unread(bad: keyof typeof BAD, ...argv: string[]): { code: number; stderr: string } {
  made += 1;
  const stdout = BAD[bad]();
  const { status, stderr } = spawnSync(process.execPath, [MAIN, ...argv], {
    encoding: 'utf8',
    stdio: ['ignore', stdout, 'pipe'],
    env: { ...process.env, XDG_STATE_HOME: at('state') },
  });
  closeSync(stdout);
  return { code: status ?? -1, stderr };
}

beforeAll(async () => {
  for (const key of ['ops', 'old', 'new']) {
    await pqblkJson('key', 'gen', key, '--no-passphrase', ...store);
  }
}, 60_000);

const DISKS = 4;

async function fleet(): Promise<string> {
  made += 1;
  const top = at(`fleet-${made}`);
  mkdirSync(top);
  for (let index = 0; index < DISKS; index += 1) {
    const small = ['--cluster-size', '4k', '--log-size', '256k'];
    const keys = ['--key', 'ops', '--key', 'old'];
    await pqblkJson('create', join(top, `${index}.sealed`), '1M', ...keys, ...small, ...store);
  }
  return top;
}

/** How many of the disks still open to the key that was to go. */
async function openTo(key: string, top: string): Promise<number> {
  let count = 0;
  for (let index = 0; index < DISKS; index += 1) {
    const disk = join(top, `${index}.sealed`);
    if ((await pqblk('slot', 'test', disk, '--key', key, ...store)).code === 0) count += 1;
  }
  return count;
}

const rewrap = (top: string) => {
  const what = ['fleet', 'rewrap', 'old', '--to', 'new', '--key', 'ops', '--jobs', '1'];
  return [...what, ...store, top];
};

describe('a command that changes disks goes on to its end', () => {
  it('where the reader of its events has gone', async () => {
    const top = await fleet();
    const { code, stderr } = unread('a reader that has gone', ...rewrap(top));
    expect([code, stderr, await openTo('old', top)]).toEqual([0, '', 0]);
  });

  it('where its events have no room, and says so', async () => {
    const top = await fleet();
    const { code, stderr } = unread('no room', ...rewrap(top));
    expect(await openTo('old', top)).toBe(0);
    expect(code).toBe(exitCode('output'));
    expect(stderr).toMatch(
      /^pqblk: write: stdout: ENOSPC[^\n]*\nhint: what was to be done is done/,
    );
    expect(stderr).not.toMatch(/^ +at /m);
  });

  it('with the exit code of what it met', async () => {
    const top = await fleet();
    for (const bad of ['a reader that has gone', 'no room'] as const) {
      const { code } = unread(bad, ...rewrap(top), at('gone.sealed'));
      expect([bad, code]).toEqual([bad, exitCode('not_found')]);
    }
  });
});

it('a judgement is the exit code, whoever reads the reasons', async () => {
  const top = await fleet();
  const argv = ['report', top, join(top, 'none.sealed')];
  expect(unread('a reader that has gone', ...argv).code).toBe(exitCode('io_error'));
  expect(unread('no room', ...argv).code).toBe(exitCode('io_error'));
  expect(unread('a reader that has gone', 'report', top).code).toBe(0);
});

it('a command that only tells ends as the reader of others does, without a word', () => {
  const argv = ['key', 'list', ...store];
  expect(unread('a reader that has gone', ...argv)).toEqual({ code: READER_GONE, stderr: '' });
  const full = unread('no room', ...argv, '--json');
  expect(full.code).toBe(exitCode('output'));
  expect(JSON.parse(full.stderr)).toMatchObject({ error: { code: 'PQBLK_OUTPUT' } });
  const written = ['key', 'export', 'ops', '--public', '-o', at('ops.pub'), ...store];
  expect(unread('a reader that has gone', ...written).code).toBe(0); // its output is a file
});
