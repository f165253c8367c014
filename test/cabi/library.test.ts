// libpqblk as an integrator meets it: installed, found by pkg-config and CMake, linked, loaded into
// strange hosts. What its functions do is test/native/cabi's business.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeAll, describe, expect, it } from 'vitest';
import { exitCode, peer, pqblk, pqblkJson, scratch } from '../cli/helpers.js';
import {
  BUILD,
  commandDirectory,
  exported,
  install,
  installed,
  killAll,
  LOCKED,
  root,
  shell,
  startAgent,
} from './lab.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const prefix = at('prefix');
const env = installed(prefix);
const store = ['--store', at('keys')];
const MiB = 2 ** 20;
const BUILD_MS = 600_000; // where nothing is compiled yet
const header = join(prefix, 'include', 'pqblk.h');
const library = join(prefix, 'lib', 'libpqblk.so');

beforeAll(async () => {
  install(prefix);
  shell(
    `cmake -S examples -B '${at('examples')}' && cmake --build '${at('examples')}' --parallel 2`,
    env,
  );
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', ...store);
}, BUILD_MS);

afterEach(killAll);

describe('the installed files', () => {
  it('are a header that plain C11 and C++ take', () => {
    const warnings = ['-Wall', '-Wextra', '-pedantic', '-Werror', '-fsyntax-only'];
    peer('cc', '-std=c11', ...warnings, '-x', 'c', header);
    peer('c++', '-std=c++17', ...warnings, '-x', 'c++', header);
  });

  it('export exactly the names of the checked-in list, which the header declares', () => {
    const list = readFileSync(join(root, 'test/cabi/symbols.txt'), 'utf8').trim().split('\n');
    const names = peer('nm', '-D', '--defined-only', '--format=posix', library)
      .split('\n')
      .filter(Boolean)
      .map((line) => line.split(' ')[0]);
    expect(names.filter((name) => !name?.startsWith('PQBLK_')).sort()).toEqual(list);
    const declared = [...readFileSync(header, 'utf8').matchAll(/^PQBLK_API [^;(]*?(\w+)\(/gm)];
    expect(declared.map((found) => `${found[1]}@@PQBLK_1`).sort()).toEqual(list);
  });

  it('carry the version of the ABI and of the package', () => {
    const abi = /#define PQBLK_ABI_VERSION (\d+)/.exec(readFileSync(header, 'utf8'))?.[1];
    expect(peer('readelf', '-d', library)).toContain(`soname: [libpqblk.so.${abi}]`);
    const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
    expect(shell('pkg-config --modversion pqblk', env).trim()).toBe(version);
    expect(readdirSync(join(prefix, 'lib')).sort()).toEqual([
      'cmake',
      'libpqblk.a',
      'libpqblk.so',
      `libpqblk.so.${abi}`,
      `libpqblk.so.${abi}.${version}`,
      'pkgconfig',
    ]);
  });
});

/** What examples/queued-io.c leaves on a disk. */
function pattern(size: number): Buffer {
  const content = Buffer.alloc(size);
  const block = 65536;
  for (let i = 0; i * block < size; i++) {
    content.fill((i * 37) % 251, i * block, (i + 1) * block);
  }
  return content;
}

describe('examples/queued-io.c', () => {
  const formats = { raw: '1', qcow2: '2', sealed: '3' } as const;

  it.each(['raw', 'qcow2', 'sealed'] as const)('fills a %s disk', async (format) => {
    const disk = at(`queued.${format}`);
    const key = format === 'sealed' ? ['--key', 'alice'] : [];
    await pqblkJson('create', disk, '8M', '--format', format, ...key, ...store);
    const argv = [formats[format], disk];
    if (format === 'sealed') {
      await startAgent(disk, at('queued.sock'), '--timeout', '60', ...store);
      argv.push(at('queued.sock'));
    }
    const said = shell(`'${at('examples/queued-io')}' ${argv.join(' ')}`, env);
    expect(said).toBe('128 blocks written, read and compared\n');
    exported(disk, at('queued.out.raw'), '--format', format, ...store);
    expect(readFileSync(at('queued.out.raw')).equals(pattern(8 * MiB))).toBe(true);
  });

  it('runs with the library inside: by CMake, and linked fully static by pkg-config', async () => {
    const disk = at('static.raw');
    await pqblkJson('create', disk, '1M', '--format', 'raw', ...store);
    expect(peer('ldd', at('examples/queued-io-static'))).not.toContain('libpqblk');
    peer(at('examples/queued-io-static'), '1', disk);
    shell(
      `cc -static -o '${at('all-static')}' examples/queued-io.c \
        $(pkg-config --static --cflags --libs pqblk) 2>/dev/null`,
      env,
    );
    expect(peer(at('all-static'), '1', disk)).toContain('16 blocks');
  });

  it('is short', () => {
    const lines = readFileSync(join(root, 'examples/queued-io.c'), 'utf8').trimEnd().split('\n');
    expect(lines.length).toBeLessThanOrEqual(60);
  });

  it('says what is wrong', async () => {
    const { status, stderr } = spawnSync(at('examples/queued-io'), ['2', at('nothing.qcow2')], {
      encoding: 'utf8',
      env: { ...process.env, ...env },
    });
    expect({ status, stderr }).toEqual({
      status: 1,
      stderr: expect.stringMatching(/^queued-io: not_found: .*nothing\.qcow2/),
    });
  });
});

describe('keys that were handed over while a rotation of the data key was under way', () => {
  it('write nothing under a key that was given up', async () => {
    const disk = at('rotating.sealed');
    await pqblkJson('create', disk, '8M', '--key', 'alice', ...store);
    const rotate = join(root, 'test/node/child/rotate.mjs');
    const argv = [rotate, join(root, 'dist/index.js'), disk, at('keys'), 'begun'];
    expect(spawnSync(process.execPath, argv).signal).toBe('SIGKILL');
    const socket = at('rotating.sock');
    await startAgent(disk, socket, '--count', '2', '--timeout', '60', ...store);
    const fill = () =>
      spawnSync(at('examples/queued-io'), ['3', disk, socket], {
        encoding: 'utf8',
        env: { ...process.env, ...env },
      });
    expect(fill()).toMatchObject({ status: 0, stderr: '' });
    await pqblkJson('rotate-data-key', disk, '--abort', '--key', 'alice', ...store);
    const refused = fill();
    exported(disk, at('rotating.raw'), ...store); // nothing else tells a loss from a refusal
    expect(readFileSync(at('rotating.raw')).equals(pattern(8 * MiB))).toBe(true);
    expect(refused).toMatchObject({ status: 1, stderr: expect.stringContaining(': locked: ') });
  });
});

/** Names that libpqblk's objects want from OpenSSL, zlib and zstd. */
function borrowedNames(): string[] {
  const names = (text: string) =>
    text.split('\n').map((line) => line.split(' ')[0]?.replace(/@.*/, '') ?? '');
  const inside = join(prefix, 'lib', 'libpqblk.a');
  const wanted = new Set(names(peer('nm', '-u', '--format=posix', inside)));
  const offered = ['libcrypto', 'libz', 'libzstd'].flatMap((name) => {
    const place = shell(`cc -print-file-name=${name}.so`, {}).trim();
    return names(peer('nm', '-D', '--defined-only', '--format=posix', place));
  });
  return [...new Set(offered)].filter((name) => name !== '' && wanted.has(name));
}

describe('a host that aborts in every function of OpenSSL, zlib and zstd', () => {
  const host = at('host');

  beforeAll(() => {
    const names = borrowedNames();
    expect(names).toEqual(expect.arrayContaining(['EVP_CIPHER_CTX_new', 'inflate']));
    const traps = names.map((name) => `void ${name}(void) { abort(); }`).join('\n');
    writeFileSync(at('traps.c'), `#include <stdlib.h>\n${traps}\n`);
    const flags = `-rdynamic -fno-builtin -I'${prefix}/include'`;
    shell(`cc ${flags} -o '${host}' test/cabi/host.c '${at('traps.c')}'`, {});
  });

  it('opens a sealed disk all the same', async () => {
    const disk = at('host.sealed');
    await pqblkJson('create', disk, '8M', '--key', 'alice', ...store);
    shell(`pqblk unlock '${disk}' --fd 1 ${store.join(' ')} | '${host}' '${library}' '${disk}'`, {
      PATH: `${commandDirectory(dir)}:${process.env.PATH}`,
    });
    const first = readFileSync(exported(disk, at('host.raw'), ...store)).subarray(0, 512);
    expect(first.equals(Buffer.alloc(512, 0x5a))).toBe(true);
  });

  it('has its disk for itself, and others learn its pid', async () => {
    const disk = at('locked.raw');
    await pqblkJson('create', disk, '1M', '--format', 'raw', ...store);
    const child = spawn(host, ['--hold', library, disk], { stdio: ['ignore', 'pipe', 'inherit'] });
    try {
      await once(child.stdout, 'data');
      const { code, stderr } = await pqblk('export', disk, at('x.qcow2'), ...store);
      expect(code).toBe(exitCode('locked'));
      expect(stderr).toContain(`${child.pid}`);
    } finally {
      child.kill('SIGKILL');
    }
  });
});

describe('README', () => {
  it('builds, installs and uses the library as the section on C says', async () => {
    const readme = readFileSync(join(root, 'README.md'), 'utf8');
    const section = /^## A sealed disk from C\n([\s\S]*?)^## /m.exec(readme)?.[1] ?? '';
    const commands = [...section.matchAll(/^```sh\n([\s\S]*?)^```$/gm)].map((found) => found[1]);
    expect(commands.length).toBeGreaterThan(0);
    const home = at('home');
    shell(`mkdir -p '${home}'`, {});
    const keys = { HOME: home, PQBLK_KEYS: at('keys') };
    await pqblkJson('create', join(home, 'vm.sealed'), '4M', '--key', 'alice', ...store);
    // In the build directory that is there, for the time it saves.
    const script = [LOCKED, ...commands].join('\n').replaceAll('build/library', BUILD);
    const said = shell(script, {
      ...keys,
      PATH: `${commandDirectory(dir)}:${process.env.PATH}`,
    });
    expect(said).toContain('64 blocks written, read and compared');
    exported(join(home, 'vm.sealed'), at('readme.raw'), ...store);
    expect(readFileSync(at('readme.raw')).equals(pattern(4 * MiB))).toBe(true);
  });
});
