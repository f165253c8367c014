// What repeats a sample, as text for the report: a command line, or calls of the API.
import { inspect } from 'node:util';

export const quoted = (word) =>
  /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;

export const commandLine = (words) => words.map(quoted).join(' ');

const literal = (value) => inspect(value, { breakLength: Number.POSITIVE_INFINITY });

// Options of openDisk() that are options of `pqblk bench` as well, or its defaults.
const SPOKEN = new Set(['cache', 'queues', 'engine']);

function asCommand({ path, format, queues }, { cache = 'none', engine }, spec, key) {
  return commandLine([
    ...['pqblk', 'bench', path, '--format', format],
    ...(format === 'sealed' ? ['--key', key] : []),
    ...['--rw', spec.rw, '--bs', `${spec.blockSize ?? 4096}`, '--iodepth', `${spec.iodepth}`],
    ...['--queues', `${queues}`, ...(cache === 'none' ? [] : ['--cache', cache])],
    ...(engine ? ['--engine', engine] : []),
    ...(spec.stride ? ['--stride', `${spec.stride}`] : []),
    ...(spec.size ? ['--size', `${spec.size}`] : []),
    ...(spec.runtimeMs ? ['--runtime', `${spec.runtimeMs / 1000}`] : []),
    ...(spec.rampMs ? ['--ramp', `${spec.rampMs / 1000}`] : []),
    ...(spec.flushEvery ? ['--fdatasync', `${spec.flushEvery}`] : []),
    ...(spec.rw === 'randrw' ? ['--rwmixread', `${spec.readPercent ?? 50}`] : []),
    ...(spec.seed === undefined ? [] : ['--seed', `${spec.seed}`]),
  ]);
}

function asCalls({ path, format }, options, spec) {
  const identity = format === 'sealed' ? ', identity' : '';
  const rest = Object.entries(options).map(([name, value]) => `, ${name}: ${literal(value)}`);
  const opened = `openDisk(${literal(path)}, { format: '${format}'${identity}${rest.join('')} })`;
  return `await (await ${opened}).bench(${literal(spec)})`;
}

/**
 * A load of `spec` on a disk of these `facts` that was opened with `options`: `pqblk bench …`, or the
 * calls where that has no option to open it so.
 */
export const benchCommand = (facts, options, spec, key) =>
  Object.keys(options).every((name) => SPOKEN.has(name))
    ? asCommand(facts, options, spec, key)
    : asCalls(facts, options, spec);
