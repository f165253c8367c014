// What the tests of `pqblk serve` share: the built program as a process, and its metrics.
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { get, type IncomingMessage } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach } from 'vitest';
import { MAIN } from './helpers.js';

/** What a test started; killed after it when it still runs. */
export const running = new Set<ChildProcess>();

afterEach(() => {
  for (const child of running) child.kill('SIGKILL');
  running.clear();
});

export interface Server {
  readonly child: ChildProcess;
  /** Of the ready lines; the line about the sandbox ends them. */
  readonly uris: string[];
  stdout(): string;
  stderr(): string;
  /** Sends SIGTERM and returns the exit code. */
  end(): Promise<number>;
}

export async function serve(...argv: string[]): Promise<Server> {
  return await serveWith({}, ...argv);
}

export async function serveWith(env: NodeJS.ProcessEnv, ...argv: string[]): Promise<Server> {
  const child = spawn(process.execPath, [MAIN, 'serve', ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...env },
  });
  running.add(child);
  const written = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].on('data', (text) => {
      written[name] += text;
    });
  }
  const ended = once(child, 'close').then(([code]) => {
    running.delete(child);
    return Number(code);
  });
  const ready = () => /^sandbox: .*\n/m.test(written.stdout);
  while (!ready()) {
    const code = await Promise.race([ended, sleep(20, undefined)]);
    if (code !== undefined && !ready())
      throw new Error(`serve ended with ${code}: ${written.stderr}`);
  }
  return {
    child,
    uris: [...written.stdout.matchAll(/^ready: (.*)$/gm)].map((found) => String(found[1])),
    stdout: () => written.stdout,
    stderr: () => written.stderr,
    end: async () => {
      child.kill('SIGTERM');
      return await ended;
    },
  };
}

/** GET over a Unix socket. */
export async function httpGet(
  socketPath: string,
  path: string,
): Promise<{ status: number | undefined; body: string }> {
  const response = await new Promise<IncomingMessage>((resolve, reject) => {
    get({ socketPath, path }, resolve).on('error', reject);
  });
  const chunks: Buffer[] = [];
  for await (const chunk of response) chunks.push(chunk as Buffer);
  return { status: response.statusCode, body: Buffer.concat(chunks).toString() };
}
