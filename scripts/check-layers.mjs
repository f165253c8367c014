// The architecture check: includes and imports point only downward, and files stay readable.
//
//   node scripts/check-layers.mjs [ROOT]     prints violations; the exit code is 1 when there are any
//
// docs/architecture.md explains the rooms; the two tables below are what is enforced.
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, posix, relative, sep } from 'node:path';
import { fileURLToPath } from 'node:url';

const MAX_LINES = 650;

// What a room of native/ may include besides itself.
const upTo = (...rooms) => new Set(rooms);
const below = ['base', 'io', 'storage', 'crypto', 'format', 'sealed', 'image', 'export'];
export const nativeRooms = new Map([
  ['base', upTo()],
  ['io', upTo('base')],
  ['storage', upTo('base', 'io')],
  ['crypto', upTo('base')],
  ['format', upTo('base', 'io', 'storage')],
  ['sealed', upTo('base', 'io', 'storage', 'crypto', 'format')],
  ['image', upTo('base', 'io', 'storage', 'crypto', 'format', 'sealed')],
  ['export', upTo('base', 'io', 'storage', 'crypto', 'format', 'sealed', 'image')],
  ['cabi', upTo(...below, 'include')],
  ['node', upTo(...below)],
  ['pkcs11', upTo('base')],
  ['include', upTo()],
]);

// Rooms of src/, bottom up; a file directly in src/ is a room of its own name.
export const sourceRooms = [
  'errors',
  'package-root',
  'qmp',
  'native',
  'keys',
  'disk',
  'index',
  'cli',
];

function* filesBelow(dir, pattern) {
  let entries;
  try {
    entries = readdirSync(dir, { withFileTypes: true });
  } catch (error) {
    if (error.code === 'ENOENT') return;
    throw error;
  }
  for (const entry of entries) {
    const path = join(dir, entry.name);
    if (entry.isDirectory()) yield* filesBelow(path, pattern);
    else if (pattern.test(entry.name)) yield path;
  }
}

function matches(text, pattern) {
  return [...text.matchAll(pattern)].map((match) => ({
    target: match[1],
    line: text.slice(0, match.index).split('\n').length,
  }));
}

export function checkIncludes(root) {
  const violations = [];
  for (const file of filesBelow(join(root, 'native'), /\.(cc|h)$/)) {
    const path = relative(join(root, 'native'), file).split(sep).join('/');
    const room = path.split('/')[0];
    const allowed = nativeRooms.get(room);
    if (!allowed) {
      violations.push(`native/${path}: '${room}' is not a room`);
      continue;
    }
    for (const { target, line } of matches(
      readFileSync(file, 'utf8'),
      /^[ \t]*#[ \t]*include[ \t]*"([^"]+)"/gm,
    )) {
      const first = posix.normalize(target).split('/')[0];
      const other = target === 'pqblk.h' ? 'include' : first;
      if (other === room || allowed.has(other)) continue;
      const why = nativeRooms.has(other)
        ? `room ${room} may not include room ${other}`
        : `"${target}" does not begin with a room (write it from native/)`;
      violations.push(`native/${path}:${line}: ${why}`);
    }
  }
  return violations;
}

export function checkImports(root) {
  const violations = [];
  const roomOf = (path) => path.split('/')[0].replace(/\.[jt]s$/, '');
  for (const file of filesBelow(join(root, 'src'), /\.c?ts$/)) {
    const path = relative(join(root, 'src'), file).split(sep).join('/');
    const room = roomOf(path);
    const rank = sourceRooms.indexOf(room);
    if (rank < 0) {
      violations.push(`src/${path}: '${room}' is not a room`);
      continue;
    }
    for (const { target, line } of matches(
      readFileSync(file, 'utf8'),
      /\b(?:from|import)\s*\(?\s*['"](\.[^'"]*)['"]/g,
    )) {
      const resolved = posix.normalize(posix.join(posix.dirname(path), target));
      const other = roomOf(resolved);
      if (resolved === '../package.json') continue;
      const otherRank = sourceRooms.indexOf(other);
      if (otherRank < 0) violations.push(`src/${path}:${line}: '${other}' is not a room of src/`);
      else if (otherRank > rank)
        violations.push(`src/${path}:${line}: room ${room} may not import room ${other}`);
    }
  }
  return violations;
}

export function checkLengths(root) {
  const violations = [];
  for (const dir of ['native', 'src', 'test', 'bench', 'scripts', 'cmake']) {
    for (const file of filesBelow(join(root, dir), /\.(cc|h|c?ts|[cm]js|cmake)$/)) {
      const lines = readFileSync(file, 'utf8').split('\n').length - 1;
      if (lines > MAX_LINES)
        violations.push(`${relative(root, file)}: ${lines} lines; split it (at most ${MAX_LINES})`);
    }
  }
  return violations;
}

export const layerChecks = {
  'C++ includes': checkIncludes,
  'TypeScript imports': checkImports,
  'file lengths': checkLengths,
};

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const root = process.argv[2] ?? join(dirname(fileURLToPath(import.meta.url)), '..');
  const violations = Object.values(layerChecks).flatMap((check) => check(root));
  for (const violation of violations) console.error(violation);
  process.exit(violations.length > 0 ? 1 : 0);
}
