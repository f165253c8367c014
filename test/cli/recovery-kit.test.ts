// The recovery kit as somebody uses it: printed, put away, typed in or scanned on a bad day.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, it } from 'vitest';
import type { ChangedKeyArea } from '../../src/index.js';
import { exitCode, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const own = ['--key', 'alice', '--store', at('keys')];
const stranger = ['--store', at('nobody')];
const disk = at('disk <1> & "co" a$\'b$&.sealed');

beforeAll(async () => {
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', '--store', at('keys'));
  await pqblkJson('create', disk, '16M', '--log-size', '8M', ...own);
});

/** The code as it stands on the page. */
function printed(file: string): string {
  const html = readFileSync(file, 'utf8');
  const rows = [...html.matchAll(/<tr><th>\d\.<\/th>(.*?)<\/tr>/g)].map(([, row = '']) =>
    [...row.matchAll(/<td>(\w{4})<\/td>/g)].map(([, group]) => group).join(' '),
  );
  expect(rows).toHaveLength(4);
  return rows.join('\n');
}

/** The QR code of the page as a picture, eight dots for each module. */
function picture(file: string): Buffer {
  const html = readFileSync(file, 'utf8');
  const size = Number(/viewBox="-4 -4 (\d+) /.exec(html)?.[1]);
  const scale = 8;
  const pixels = Buffer.alloc((size * scale) ** 2, 255);
  for (const [, x, y] of html.matchAll(/M(\d+) (\d+)h1v1h-1z/g)) {
    for (let row = 0; row < scale; row += 1) {
      const line = ((Number(y) + 4) * scale + row) * size * scale;
      pixels.fill(0, line + (Number(x) + 4) * scale, line + (Number(x) + 5) * scale);
    }
  }
  return Buffer.concat([Buffer.from(`P5\n${size * scale} ${size * scale}\n255\n`), pixels]);
}

it('opens the disk for whoever types it, and says what it is', async () => {
  const kit = at('kit.html');
  const changed = await pqblkJson<ChangedKeyArea>(
    'slot',
    'add',
    disk,
    '--recovery-kit',
    kit,
    '--label',
    '$` %QR% %FACTS%',
    ...own,
  );
  expect(changed.after.slots[1]).toMatchObject({ role: 'recovery', kem: 'X-Wing' });
  expect(statSync(kit).mode & 0o777).toBe(0o600);
  const html = readFileSync(kit, 'utf8');
  expect(html).toContain("<dd>disk &lt;1&gt; &amp; &quot;co&quot; a$'b$&amp;.sealed</dd>");
  expect(html).toContain(
    "<title>Recovery kit: disk &lt;1&gt; &amp; &quot;co&quot; a$'b$&amp;.sealed</title>",
  );
  expect(html).toContain('<dd>$` %QR% %FACTS%</dd>');
  expect(html).toContain(changed.volumeUuid);
  expect(html).not.toMatch(/<script|src=|href=/);
  // The store knows the public half, or nobody could rotate without --trust.
  expect((await pqblk('rotate-master-key', disk, ...own)).code).toBe(0);
  writeFileSync(at('typed'), printed(kit).toLowerCase());
  const test = ['slot', 'test', disk, '--recovery-code', at('typed'), ...stranger];
  expect((await pqblk(...test)).code).toBe(0);
  const checked = await pqblk('check', disk, '--recovery-code', at('typed'), ...stranger);
  expect(checked.code).toBe(0);
  writeFileSync(at('typed'), '\n');
  const empty = await pqblk(...test);
  expect(empty.stderr).toMatch(/recovery code from .* is empty/);
  const misread = printed(kit).replace(/\w(?=\n)/, (last) => (last === '7' ? '8' : '7'));
  writeFileSync(at('typed'), misread);
  const wrong = await pqblk(...test);
  expect([wrong.code, wrong.stderr]).toEqual([
    exitCode('bad_key'),
    expect.stringContaining('line 1'),
  ]);
});

it('is scanned from its QR code', async (context) => {
  const kit = at('scanned.html');
  await pqblkJson('slot', 'add', disk, '--recovery-kit', kit, '--label', 'scanned', ...own);
  writeFileSync(at('code.pgm'), picture(kit));
  const scan = spawnSync('zbarimg', ['-q', '--raw', at('code.pgm')], { encoding: 'utf8' });
  if (scan.error) {
    console.warn('SKIP: no zbarimg (package zbar-tools); the QR code was not scanned');
    context.skip();
  }
  expect(scan.stdout).toBe(`PQBLK1:${printed(kit).replaceAll(/\s/g, '')}\n`);
  writeFileSync(at('scanned'), scan.stdout);
  const test = ['slot', 'test', disk, '--recovery-code', at('scanned'), ...stranger];
  expect((await pqblk(...test)).stdout).toContain('scanned');
});

it('approves what another key asks for', async () => {
  const kit = at('second.html');
  await pqblkJson('slot', 'add', disk, '--recovery-kit', kit, '--label', 'second', ...own);
  writeFileSync(at('second'), printed(kit));
  writeFileSync(at('two.json'), '{"version": 1, "twoPersons": ["rotate-master-key"]}');
  const rotate = ['rotate-master-key', disk, '--policy', at('two.json'), ...own];
  expect((await pqblk(...rotate)).code).toBe(exitCode('policy'));
  await pqblkJson(...rotate, '--approve-recovery-code', at('second'));
  const code = ['--recovery-code', at('second'), '--approve-recovery-code', at('second')];
  const alone = [...rotate.slice(0, 4), '--store', at('keys'), ...code];
  const { code: refused, stderr } = await pqblk(...alone);
  expect([refused, stderr]).toEqual([exitCode('policy'), expect.stringContaining('second person')]);
});

it('leaves no page where it leaves no slot, and overwrites none', async () => {
  const refused = await pqblk('slot', 'add', disk, '--recovery-kit', at('kit.html'), ...own);
  expect(refused.code).toBe(exitCode('exists'));
  const kit = at('none.html');
  writeFileSync(at('p.json'), '{"version": 1, "kems": ["ML-KEM-768"]}');
  const rules = ['--policy', at('p.json')];
  const add = ['slot', 'add', disk, '--recovery-kit', kit, ...own];
  expect((await pqblk(...add, ...rules)).code).toBe(exitCode('policy'));
  expect((await pqblk(...add, '--dry-run')).code).toBe(0);
  expect(existsSync(kit)).toBe(false);
  expect((await pqblk(...add, ...rules, '--kem', 'ml-kem-768')).code).toBe(0);
  expect((await pqblk('slot', 'add', disk, ...own)).code).toBe(exitCode('usage'));
  expect((await pqblk(...add, 'bob')).code).toBe(exitCode('usage'));
});
