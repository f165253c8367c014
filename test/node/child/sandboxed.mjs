// A process that does to itself what `pqblk serve` does, and then tries what it gave up: in this thread,
// in one that was there before, and in one that comes after. argv: dist/index.js, a raw disk.
import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';

function codeOf(call) {
  try {
    return call()?.error?.code ?? 'allowed';
  } catch (error) {
    return error.code;
  }
}

function attempts() {
  return {
    execve: codeOf(() => spawnSync('/bin/true')),
    // Threads of Node share an identity that only the main one may change.
    setuid: isMainThread ? codeOf(() => process.setuid(process.getuid())) : 'EPERM',
  };
}

if (isMainThread) {
  const [dist, path] = process.argv.slice(2);
  const { noCoreDumps, openDisk, refuseSystemCalls } = await import(dist);
  const disk = await openDisk(path, { format: 'raw' });
  const early = new Worker(new URL(import.meta.url));
  await once(early, 'online');
  const before = attempts();
  const said = [noCoreDumps(), refuseSystemCalls()];
  const after = attempts();
  early.postMessage('try');
  const [inEarlyThread] = await once(early, 'message');
  const late = new Worker(new URL(import.meta.url));
  late.postMessage('try');
  const [inLateThread] = await once(late, 'message');
  const data = Buffer.alloc(4096, 7);
  await disk.write(data, 8192, { fua: true });
  await disk.read(data, 0);
  await disk.close();
  const cores = /^Max core file size +(\d+) +(\d+)/m.exec(
    readFileSync('/proc/self/limits', 'utf8'),
  );
  const results = { said, before, after, inEarlyThread, inLateThread, cores: cores.slice(1) };
  process.stdout.write(JSON.stringify(results));
  await Promise.all([early.terminate(), late.terminate()]);
} else {
  await once(parentPort, 'message');
  parentPort.postMessage(attempts());
  await once(parentPort, 'message');
}
