// Lays bytecode beside the files of the command line, for this Node: V8's, of all that the commands
// below have called. src/cli/launcher.cts reads it; without it `pqblk` starts a little later.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const KEEP = fileURLToPath(new URL('keep-bytecode.cjs', import.meta.url));

/** What is run often, for many disks in a row, and is short. */
const COMMANDS = [
  ['key', 'gen', 'a', '--no-passphrase'],
  ['key', 'gen', 'b', '--no-passphrase'],
  ['create', 'disk', '16M', '--key', 'a'],
  ['info', 'disk'],
  ['slot', 'list', 'disk'],
  ['slot', 'add', 'disk', 'b', '--key', 'a'],
  ['slot', 'test', 'disk', '--key', 'b'],
  ['rewrap', 'disk', '--key', 'a'],
  ['rotate-master-key', 'disk', '--key', 'a'],
];

/** What the build's own environment says is not for these runs: rules, a store, flags of Node. */
const environment = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !/^(PQBLK|NODE)_/.test(name)),
);

/** `directory`: dist/cli. False: a command failed, and has said why. */
export function makeBytecode(directory) {
  const main = join(directory, 'main.cjs');
  if (!existsSync(main)) return true; // a checkout whose TypeScript is still to be built
  const folder = mkdtempSync(join(tmpdir(), 'pqblk-build-'));
  try {
    return COMMANDS.every((command) => {
      const { status, stderr, error } = spawnSync(process.execPath, [KEEP, main, ...command], {
        cwd: folder,
        env: { ...environment, PQBLK_KEYS: join(folder, 'keys') },
        encoding: 'utf8',
      });
      if (error) throw error;
      if (status !== 0) console.error(`pqblk ${command.join(' ')}: exit code ${status}\n${stderr}`);
      return status === 0;
    });
  } finally {
    rmSync(folder, { recursive: true });
  }
}
