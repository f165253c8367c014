// The sets there are, in the order in which they run: a file each in bench/sets/.
import { readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const ORDER = ['crypto', 'engine', 'flush', 'export', 'node', 'lifecycle', 'scale'];
const directory = fileURLToPath(new URL('../sets/', import.meta.url));

export const setNames = readdirSync(directory)
  .map((file) => file.replace(/\.mjs$/, ''))
  .sort((a, b) => ORDER.indexOf(a) - ORDER.indexOf(b));

export const loadSet = async (name) => (await import(`../sets/${name}.mjs`)).default;
