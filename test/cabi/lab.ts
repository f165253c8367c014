// What the tests of the C library share: an installed copy of it, C programs built against that, and
// agents that hand over keys.
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { MAIN, peer } from '../cli/helpers.js';

export const root = fileURLToPath(new URL('../..', import.meta.url));

const running = new Set<ChildProcess>();

export function killAll(): void {
  for (const child of running) child.kill('SIGKILL');
  running.clear();
}

/** Runs a shell script that must succeed; returns what it wrote to stdout. */
export function shell(script: string, env: NodeJS.ProcessEnv, cwd = root): string {
  const { status, stdout, stderr } = spawnSync('bash', ['-eu', '-o', 'pipefail', '-c', script], {
    cwd,
    env: { ...process.env, ...env },
    encoding: 'utf8',
  });
  if (status !== 0) throw new Error(`${script}\nexit ${status}\n${stderr}${stdout}`);
  return stdout;
}

/** For shell scripts: one at a time in the build directory. */
export const LOCKED = 'mkdir -p build/stamps && exec 9> build/stamps/lock && flock 9';

/** Where the engine is compiled already, for the addon and the native tests. */
export const BUILD = 'build/release';

/** Builds the library and installs it below `prefix`. */
export function install(prefix: string): void {
  shell(
    `${LOCKED}
     cmake -S . -B ${BUILD} -DPQBLK_BUILD_LIBRARY=ON
     cmake --build ${BUILD} --target pqblk_library --parallel 2
     cmake --install ${BUILD} --prefix '${prefix}'`,
    {},
  );
}

/** Finds the library below `prefix` at build and at run time. */
export function installed(prefix: string): NodeJS.ProcessEnv {
  return {
    PKG_CONFIG_PATH: join(prefix, 'lib', 'pkgconfig'),
    LD_LIBRARY_PATH: join(prefix, 'lib'),
    CMAKE_PREFIX_PATH: prefix,
  };
}

/** A `pqblk` for the PATH of shell scripts. */
export function commandDirectory(dir: string): string {
  const bin = join(dir, 'bin');
  mkdirSync(bin, { recursive: true });
  const file = join(bin, 'pqblk');
  writeFileSync(file, `#!/bin/sh\nexec "${process.execPath}" "${MAIN}" "$@"\n`, { mode: 0o755 });
  return bin;
}

export interface Agent {
  readonly child: ChildProcess;
  readonly stderr: () => string;
  /** The exit code. */
  readonly ended: Promise<number>;
}

/** A `pqblk agent` that listens. */
export async function startAgent(disk: string, socket: string, ...argv: string[]): Promise<Agent> {
  return await startScript(MAIN, 'agent', disk, '--socket', socket, ...argv);
}

/** A Node program that says `ready: ` in a line of its own. */
export async function startScript(...argv: string[]): Promise<Agent> {
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'pipe'] });
  running.add(child);
  const written = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].on('data', (text) => {
      written[name] += text;
    });
  }
  const ended = once(child, 'close').then(([code]) => {
    running.delete(child);
    return Number(code ?? -1);
  });
  const ready = () => /^ready: .*\n/m.test(written.stdout);
  while (!ready()) {
    const code = await Promise.race([ended, sleep(20, undefined)]);
    if (code !== undefined && !ready())
      throw new Error(`agent ended with ${code}: ${written.stderr}`);
  }
  return { child, stderr: () => written.stderr, ended };
}

/** The plain content of a disk, by the one implementation the C library does not share a line with. */
export function exported(disk: string, file: string, ...argv: string[]): string {
  peer(process.execPath, MAIN, 'export', disk, file, '--force', ...argv);
  return file;
}
