// Runs the built command line as anyone would, and as a second terminal would read it.
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

export const MAIN = fileURLToPath(new URL('../../dist/cli/main.cjs', import.meta.url));

/** A command line with the key store of the demo. */
export function commandLine(env) {
  const run = (args) =>
    spawnSync(process.execPath, [MAIN, ...args], {
      encoding: 'utf8',
      env: { ...process.env, ...env },
      maxBuffer: 64 * 2 ** 20,
    });
  return {
    /** Exit code and output, whatever they are. */
    try: (args) => {
      const { status, stdout, stderr } = run(args);
      return { code: status, stdout: stdout.trim(), stderr: stderr.trim() };
    },
    /** The output of a command that has to succeed. */
    text: (args) => {
      const { status, stdout, stderr } = run(args);
      if (status !== 0) throw new Error(`pqblk ${args.join(' ')}: exit ${status}\n${stderr}`);
      return stdout.trim();
    },
    json: (args) => {
      const { status, stdout, stderr } = run([...args, '--json']);
      if (status !== 0) throw new Error(`pqblk ${args.join(' ')}: exit ${status}\n${stderr}`);
      return JSON.parse(stdout);
    },
  };
}
