// The architecture check itself: each rule must be able to fail. The oracle is a small tree written
// here, in which every violation is planted by hand.
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, expect, it } from 'vitest';

const script = fileURLToPath(new URL('../../scripts/check-layers.mjs', import.meta.url));
const trees: string[] = [];

afterEach(() => {
  for (const tree of trees.splice(0)) rmSync(tree, { recursive: true });
});

function violations(files: Record<string, string>): string[] {
  const root = mkdtempSync(join(tmpdir(), 'pqblk-layers-'));
  trees.push(root);
  for (const [path, text] of Object.entries(files)) {
    mkdirSync(dirname(join(root, path)), { recursive: true });
    writeFileSync(join(root, path), text);
  }
  const { status, stderr } = spawnSync(process.execPath, [script, root], { encoding: 'utf8' });
  const lines = stderr.split('\n').filter((line) => line !== '');
  expect(status).toBe(lines.length > 0 ? 1 : 0);
  return lines;
}

it('accepts includes and imports that point downward', () => {
  const found = violations({
    'native/image/a.cc': '#include "image/a.h"\n#include "sealed/b.h"\n#include <vector>\n',
    'native/cabi/c.cc': '#include "pqblk.h"\n#include "image/a.h"\n',
    'native/crypto/d.h': '#include "base/error.h"\n',
    'src/cli/main.ts': "import { open } from '../index.js';\nimport fs from 'node:fs';\n",
    'src/keys/slot.ts': "import { KeyError } from '../errors.js';\nimport './kem.js';\n",
  });
  expect(found).toEqual([]);
});

it.each([
  ['native/base/a.h', '#include "io/queue.h"', 'room base may not include room io'],
  ['native/crypto/a.h', '#include "storage/file.h"', 'room crypto may not include room storage'],
  ['native/format/qcow2/a.h', '#include "crypto/aead.h"', 'may not include room crypto'],
  ['native/format/a.h', '\n#  include "sealed/b.h"', 'native/format/a.h:2: '],
  ['native/image/a.h', '#include "node/a.h"', 'may not include room node'],
  ['native/image/a.h', '#include "pqblk.h"', 'may not include room include'],
  ['native/io/a.cc', '#include "queue.h"', 'does not begin with a room'],
  ['native/misc/a.h', '', "'misc' is not a room"],
  ['src/errors.ts', "import './native.js';", 'room errors may not import room native'],
  ['src/qmp/a.ts', "import '../native.js';", 'room qmp may not import room native'],
  ['src/keys/a.ts', "export * from '../disk/b.js';", 'room keys may not import room disk'],
  ['src/disk/a.ts', "const x = await import('../cli/b.js');", 'may not import room cli'],
  ['src/disk/a.ts', "import type { A } from '../index.js';", 'may not import room index'],
  ['src/misc.ts', '', "'misc' is not a room"],
  ['src/keys/long.ts', '//\n'.repeat(651), '651 lines'],
])('refuses %s with %j', (path, text, message) => {
  const found = violations({ [path]: text });
  expect(found).toHaveLength(1);
  expect(found[0]).toContain(message);
});
