// Where passphrases come from. The prompt runs in a child on a terminal of its own (script(1)), as
// people meet it: what is typed must not appear.
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import {
  PASSPHRASE_BYTES_MAX,
  type PassphraseSource,
  readPassphrase,
  type Secret,
} from '../../src/keys/index.js';
import { errorOf, temporaryDirectory } from './support.js';

const textOf = (secret: Secret) => secret.use((bytes) => Buffer.from(bytes).toString('utf8'));

async function fileWith(content: string | Uint8Array): Promise<PassphraseSource> {
  const path = join(await temporaryDirectory(), 'passphrase');
  await writeFile(path, content);
  return { from: 'file', path };
}

test('from a file: one line end is dropped, nothing else', async () => {
  const cases: [string, string][] = [
    ['secret', 'secret'],
    ['secret\n', 'secret'],
    ['secret\r\n', 'secret'],
    ['secret\n\n', 'secret\n'],
    [' se cret \n', ' se cret '],
    ['two\nlines\n', 'two\nlines'],
    ['schlüssel🔑\n', 'schlüssel🔑'],
    ['x'.repeat(PASSPHRASE_BYTES_MAX), 'x'.repeat(PASSPHRASE_BYTES_MAX)],
    [`${'x'.repeat(PASSPHRASE_BYTES_MAX)}\r\n`, 'x'.repeat(PASSPHRASE_BYTES_MAX)],
  ];
  for (const [content, expected] of cases) {
    using secret = await readPassphrase(await fileWith(content));
    expect(textOf(secret)).toBe(expected);
  }
  const binary = Uint8Array.of(0, 255, 10, 128);
  using secret = await readPassphrase(await fileWith(binary));
  expect(secret.use((bytes) => [...bytes])).toEqual([...binary]);
});

test('empty, too long and missing are refused, each by its kind', async () => {
  const kindOf = async (source: PassphraseSource) =>
    (await errorOf(() => readPassphrase(source))).kind;
  expect(await kindOf(await fileWith(''))).toBe('passphrase_needed');
  expect(await kindOf(await fileWith('\n'))).toBe('passphrase_needed');
  expect(await kindOf(await fileWith('x'.repeat(PASSPHRASE_BYTES_MAX + 1)))).toBe(
    'invalid_argument',
  );
  expect(await kindOf(await fileWith('x'.repeat(1_000_000)))).toBe('invalid_argument');
  expect(await kindOf({ from: 'file', path: '/nonexistent/p' })).toBe('not_found');
  expect(await kindOf({ from: 'file', path: '/' })).toBe('invalid_argument');
  expect(await kindOf({ from: 'env', name: 'PQBLK_TEST_NOT_SET' })).toBe('passphrase_needed');
  expect(await kindOf({ from: 'fd', fd: 9999 })).toBe('invalid_argument');
});

test('from the environment', async () => {
  process.env.PQBLK_TEST_PASSPHRASE = 'from env';
  using secret = await readPassphrase({ from: 'env', name: 'PQBLK_TEST_PASSPHRASE' });
  expect(textOf(secret)).toBe('from env');
  process.env.PQBLK_TEST_PASSPHRASE = '';
  const source = { from: 'env', name: 'PQBLK_TEST_PASSPHRASE' } as const;
  expect((await errorOf(() => readPassphrase(source))).kind).toBe('passphrase_needed');
  delete process.env.PQBLK_TEST_PASSPHRASE;
});

test('from a descriptor: a file, and a pipe that delivers late and in pieces', async () => {
  const source = await fileWith('by number\n');
  if (source.from !== 'file') throw new Error('not a file');
  const fd = openSync(source.path, 'r');
  using byFile = await readPassphrase({ from: 'fd', fd });
  expect(textOf(byFile)).toBe('by number');
  closeSync(fd); // it stayed the caller's
  const fifo = join(await temporaryDirectory(), 'fifo');
  execFileSync('mkfifo', [fifo]);
  const writer = spawn('sh', ['-c', 'exec >"$0"; printf la; sleep 0.2; printf "te\\n"', fifo]);
  using byPipe = await readPassphrase({ from: 'file', path: fifo });
  expect(textOf(byPipe)).toBe('late');
  writer.kill();
});

describe('from a terminal', () => {
  let program: string;

  beforeAll(async () => {
    const root = fileURLToPath(new URL('../../', import.meta.url));
    const directory = await temporaryDirectory();
    const settings = {
      extends: join(root, 'tsconfig.build.json'),
      compilerOptions: {
        rootDir: join(root, 'src'),
        outDir: directory,
        declaration: false,
        declarationMap: false,
        sourceMap: false,
        typeRoots: [join(root, 'node_modules/@types')],
      },
      include: [],
      files: [join(root, 'src/keys/passphrase.ts')],
    };
    await mkdir(join(directory, 'keys'), { recursive: true });
    await writeFile(join(directory, 'package.json'), '{"type":"module"}');
    await writeFile(join(directory, 'tsconfig.json'), JSON.stringify(settings));
    execFileSync(join(root, 'node_modules/.bin/tsc'), ['-p', directory], { stdio: 'inherit' });
    program = join(directory, 'ask.js');
    await writeFile(
      program,
      `import { readdirSync } from 'node:fs';
import { readPassphrase } from './keys/passphrase.js';
import { setTimeout as sleep } from 'node:timers/promises';
const descriptors = async () => {
  await sleep(50); // a closed terminal gives its descriptor back on a later turn
  return readdirSync('/proc/self/fd').length;
};
const ask = async () => {
  try {
    const secret = await readPassphrase({
      from: 'prompt', prompt: 'Passphrase', confirm: process.argv[2] === 'confirm',
    });
    return secret.use((bytes) => Buffer.from(bytes).toString('hex'));
  } catch (error) { return error.code; }
};
console.log('RESULT ' + (await ask()));
if (process.argv[3] === 'again') {
  const before = await descriptors();
  console.log('RESULT ' + (await ask()));
  console.log((await descriptors()) === before ? 'NO LEAK' : 'LEFT BEHIND');
}
`,
    );
  });

  /** Types each answer when its prompt shows; returns everything the terminal showed. */
  async function session(mode: string, ...answers: string[]): Promise<string> {
    const command = `'${process.execPath}' '${program}' ${mode}`;
    const child: ChildProcess = spawn('script', ['-qec', command, '/dev/null']);
    let shown = '';
    let prompts = 0;
    child.stdout?.on('data', (chunk: Buffer) => {
      shown += chunk.toString();
      const asked = shown.match(/Passphrase( \(again\))?: /g)?.length ?? 0;
      while (prompts < asked) child.stdin?.write(answers[prompts++] ?? '\u0003');
    });
    await new Promise((resolve) => child.on('close', resolve));
    return shown;
  }

  const hexOf = (text: string) => Buffer.from(text).toString('hex');

  test('what is typed is read, not shown', async () => {
    const shown = await session('once', 'hunter2\r');
    expect(shown).toContain(`RESULT ${hexOf('hunter2')}`);
    expect(shown).not.toContain('hunter2');
  });

  test('editing keys: backspace over a character of several bytes, and Ctrl-U', async () => {
    expect(await session('once', 'abü\u007fc\r')).toContain(`RESULT ${hexOf('abc')}`);
    expect(await session('once', 'wrong\u0015right\r')).toContain(`RESULT ${hexOf('right')}`);
    expect(await session('once', '\u007f\u007fx\r')).toContain(`RESULT ${hexOf('x')}`);
  });

  test('Ctrl-C cancels and an empty answer is refused', async () => {
    expect(await session('once', 'half\u0003')).toContain('RESULT PQBLK_CANCELED');
    expect(await session('once', '\u0004')).toContain('RESULT PQBLK_CANCELED');
    expect(await session('once', '\r')).toContain('RESULT PQBLK_PASSPHRASE_NEEDED');
  });

  test('a new passphrase is asked for twice', async () => {
    expect(await session('confirm', 'same\r', 'same\r')).toContain(`RESULT ${hexOf('same')}`);
    const differing = await session('confirm', 'same\r', 'other\r');
    expect(differing).toContain('RESULT PQBLK_INVALID_ARGUMENT');
  });

  test('asking again works, and no descriptor is left behind', async () => {
    const shown = await session('once again', 'one\r', 'two\r');
    expect(shown).toContain(`RESULT ${hexOf('one')}`);
    expect(shown).toContain(`RESULT ${hexOf('two')}`);
    expect(shown).toContain('NO LEAK');
  });

  test('without a terminal the error says what to use', async () => {
    const child = spawn('setsid', ['-w', process.execPath, program, 'once'], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let shown = '';
    child.stdout.on('data', (chunk: Buffer) => {
      shown += chunk.toString();
    });
    await new Promise((resolve) => child.on('close', resolve));
    expect(shown).toContain('RESULT PQBLK_PASSPHRASE_NEEDED');
  });
});
