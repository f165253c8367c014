// examples/nbdkit-plugin.c under a real nbdkit, with libnbd's tools as clients and `pqblk export` as the
// oracle for what is on the disk.
import { spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeAll, describe, expect, it } from 'vitest';
import { exampleEnvironment, examplesOf, runExample } from '../cli/examples.js';
import { peer, pqblkJson, scratch } from '../cli/helpers.js';
import {
  commandDirectory,
  exported,
  install,
  installed,
  killAll,
  root,
  shell,
  startAgent,
} from './lab.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const prefix = at('prefix');
const env = { ...installed(prefix), PATH: `${commandDirectory(dir)}:${process.env.PATH}` };
const plugin = at('examples/nbdkit-pqblk-plugin.so');
const store = ['--store', at('keys')];
const source = at('source.raw');
const MiB = 2 ** 20;

beforeAll(async () => {
  install(prefix);
  shell(
    `cmake -S examples -B '${at('examples')}'
     cmake --build '${at('examples')}' --target nbdkit-pqblk-plugin`,
    env,
  );
  for (const name of ['alice', 'bob']) {
    await pqblkJson('key', 'gen', name, '--no-passphrase', ...store);
  }
  const content = Buffer.alloc(16 * MiB);
  randomBytes(3 * MiB).copy(content, MiB);
  content.fill(9, 9 * MiB, 9 * MiB + 70_000);
  writeFileSync(source, content);
}, 600_000);

afterEach(killAll);

/** Runs a client script while nbdkit serves on a Unix socket, as $uri. */
function withNbdkit(parameters: string, script: string): string {
  return shell(`nbdkit -U - '${plugin}' ${parameters} --run '${script}'`, env, dir);
}

/** What nbdkit says when it must not start; in the foreground, where it does not return otherwise. */
function refusal(parameters: string): string {
  rmSync(at('refused.sock'), { force: true }); // a failing nbdkit leaves it behind
  const argv = ['-f', '-U', at('refused.sock'), plugin, ...parameters.split(' ')];
  const { status, stderr } = spawnSync('nbdkit', argv, {
    encoding: 'utf8',
    env: { ...process.env, ...env },
    timeout: 120_000,
  });
  expect(status).toBe(1);
  return stderr;
}

describe.each(['raw', 'qcow2', 'sealed'] as const)('a %s disk in nbdkit', (format) => {
  const disk = at(`vm.${format}`);
  const how = `disk=${disk} format=${format} queues=2`;
  const keys = async () => {
    if (format !== 'sealed') return '';
    const socket = at('vm.keys');
    await startAgent(disk, socket, '--timeout', '60', '--key', 'alice', ...store);
    return `keys-agent=${socket}`;
  };

  beforeAll(async () => {
    const key = format === 'sealed' ? ['--key', 'alice'] : [];
    await pqblkJson('create', disk, '16M', '--format', format, ...key, ...store);
  });

  it('is filled by nbdcopy over several connections', async () => {
    const clients = `nbdcopy --connections=4 ${source} "$uri"`;
    withNbdkit(`${how} ${await keys()}`, clients);
    const out = exported(disk, at(`${format}.out.raw`), '--format', format, ...store);
    peer('cmp', source, out);
    const check = await pqblkJson<{ clean: boolean }>(
      ...['check', disk, '--format', format, ...store],
    );
    expect(check.clean).toBe(true);
  });

  it('tells its clients what it can, and what is allocated', async () => {
    const clients = 'nbdinfo --json "$uri"; nbdinfo --map --json "$uri" > map; nbdcopy "$uri" read';
    const said = withNbdkit(`${how} ${await keys()}`, clients);
    const info = JSON.parse(said) as { exports: Record<string, unknown>[] };
    expect(info.exports[0]).toMatchObject({
      'export-size': 16 * MiB,
      can_multi_conn: true,
      can_fua: true,
      can_flush: true,
      can_trim: true,
      can_zero: true,
      is_read_only: false,
      block_size_preferred: 4096,
    });
    peer('cmp', source, at('read'));
    const map = JSON.parse(readFileSync(at('map'), 'utf8')) as {
      offset: number;
      length: number;
      type: number;
    }[];
    const content = readFileSync(source);
    expect(map.reduce((end, { offset, length }) => (offset === end ? end + length : -1), 0)).toBe(
      16 * MiB,
    );
    const zeros = map.filter(({ type }) => (type & 2) !== 0);
    for (const { offset, length } of zeros) {
      expect(content.subarray(offset, offset + length).every((byte) => byte === 0)).toBe(true);
    }
    if (format !== 'raw') {
      expect(zeros.reduce((sum, { length }) => sum + length, 0)).toBeGreaterThan(12 * MiB);
    }
  });

  it('takes zeroes, trims, FUA and writes of any alignment as qemu-io sends them', async () => {
    const commands = [
      'write -q -P 65 12345 54321',
      'write -q -f -P 66 100000 512',
      'write -q -z 1M 64k',
      'write -q -z -u 2M 1M',
      'discard -q 10M 1M',
      'flush',
      'read -q -P 65 12345 54321',
      'read -q -P 66 100000 512',
      'read -q -P 0 1M 64k',
      'read -q -P 0 2M 1M',
    ];
    const run = commands.map((command) => `-c "${command}"`).join(' ');
    withNbdkit(`${how} ${await keys()}`, `qemu-io -f raw ${run} "$uri"`);
    const model = readFileSync(source);
    model.fill(65, 12345, 12345 + 54321);
    model.fill(66, 100000, 100512);
    model.fill(0, MiB, MiB + 65536);
    model.fill(0, 2 * MiB, 3 * MiB);
    const out = exported(disk, at(`${format}.out.raw`), '--format', format, ...store);
    expect(readFileSync(out).equals(model)).toBe(true);
  });
});

describe('the plugin', () => {
  it('reads keys from a descriptor, and can be kept from writing', async () => {
    const disk = at('fd.sealed');
    await pqblkJson('import', source, disk, '--key', 'alice', ...store);
    const script = 'nbdinfo --json "$uri"; nbdcopy "$uri" fd.raw; nbdcopy fd.raw "$uri" || echo no';
    const said = shell(
      `nbdkit -U - '${plugin}' disk='${disk}' read-only=true keys-fd=3 --run '${script}' \
       3< <(pqblk unlock '${disk}' --key alice --fd 1 ${store.join(' ')})`,
      env,
      dir,
    );
    expect(said).toContain('"is_read_only": true');
    expect(said).toMatch(/no\n$/);
    peer('cmp', source, at('fd.raw'));
  });

  it.each([
    ['no disk', 'format=raw', /say disk=PATH/],
    ['no keys', `disk=${at('x.sealed')}`, /keys-agent=, keys-fd= and keys-file=/],
    ['a format it does not know', 'disk=x format=vmdk', /'vmdk' is none of its values/],
    ['a disk that is not there', `disk=${at('none.raw')} format=raw`, /not_found: .*none\.raw/],
    ['an agent that is not there', `disk=${source} keys-agent=${at('none')}`, /nbdkit: error: /],
  ])('refuses to start with %s', (_name, parameters, complaint) => {
    expect(refusal(parameters)).toMatch(complaint);
  });

  it('is refused the keys of another disk, which stay to be had', async () => {
    const [one, other] = [at('one.sealed'), at('other.sealed')];
    for (const disk of [one, other]) {
      await pqblkJson('create', disk, '4M', '--key', 'bob', ...store);
    }
    const agent = await startAgent(one, at('one.keys'), '--key', 'bob', ...store);
    const ask = (disk: string) => `disk=${disk} keys-agent=${at('one.keys')}`;
    expect(refusal(ask(other))).toMatch(/wrong_key: .*keys of another disk/);
    expect(withNbdkit(ask(one), 'nbdinfo --size "$uri"')).toBe(`${4 * MiB}\n`);
    expect(await agent.ended).toBe(0);
    expect(refusal(ask(one))).toMatch(/not_found: /);
  });
});

describe('docs/c-library.md', () => {
  it('builds the plugin as its first lines say, and runs it', () => {
    const source = readFileSync(join(root, 'examples/nbdkit-plugin.c'), 'utf8');
    const build =
      /^ \* {3}(cc [^\n]*) \\\n \* {6}([^\n]*)$/m.exec(source)?.slice(1).join(' ') ?? '';
    const page = at('page');
    shell(`mkdir '${page}' && cd examples && ${build.replace('-o ', `-o ${page}/`)}`, env);
    const examples = examplesOf('docs/c-library.md');
    expect(examples.length).toBe(1);
    const seen = { ...exampleEnvironment(page), ...installed(prefix), PQBLK_KEYS: at('keys') };
    for (const example of examples) runExample(page, seen, example);
  });

  it('shows C that compiles', () => {
    const page = readFileSync(join(root, 'docs/c-library.md'), 'utf8');
    const body = /^```c\n([\s\S]*?)^```$/m.exec(page)?.[1];
    writeFileSync(
      at('page.c'),
      `#include <pqblk.h>\n#include <stdio.h>\nint main(void) {\nchar data[99] = "";\n${body}}\n`,
    );
    const flags = '-std=c11 -Wall -Wextra -pedantic -Werror -fsyntax-only';
    shell(`cc ${flags} '${at('page.c')}' $(pkg-config --cflags pqblk)`, env);
  });
});

it('is loaded by an nbdkit that dumps what it is', () => {
  const said = shell(`nbdkit --dump-plugin '${plugin}'`, env);
  expect(said).toContain('name=pqblk');
  expect(said).toContain('thread_model=parallel');
});
