// Room cli/: the file of `pqblk serve --config`: several disks in YAML, each key named as the option of
// the command line that it stands for.
//
// Strict: what is not understood is refused, with file, line, column and what was expected. Paths are
// relative to the file. Nothing is opened here.
import { dirname, resolve } from 'node:path';
import type { Document, LineCounter, Node, Pair, Scalar, YAMLMap } from 'yaml';
import { PqblkError } from '../errors.js';
import { readInputText } from '../keys/index.js';
import { CACHES, ENGINES, FORMATS } from './opening.js';
import {
  type DiskPlan,
  inheritedSocket,
  isInherited,
  nameOf,
  type ServePlan,
  type TcpAddress,
} from './serving.js';
import { parseSize } from './sizes.js';

const CONFIG_BYTES_MAX = 2 ** 20;
const QUEUES_MAX = 64;
const COUNT_MAX = 2 ** 31 - 1;

/** The value of a key; undefined: not what was expected. */
interface Reader<T> {
  readonly expected: string;
  read(node: unknown, config: Config): T | undefined;
}

const text: Reader<string> = {
  expected: 'text',
  read: (node) => (typeof node === 'string' && node !== '' ? node : undefined),
};
const path: Reader<string> = {
  expected: 'a path',
  read: (node, config) => (typeof node === 'string' && node !== '' ? config.path(node) : undefined),
};
const newSocket: Reader<string> = {
  expected: 'the path of a socket to make (an inherited one, fd:N, is for vhost-user)',
  read: (node, config) => (isInherited(node) ? undefined : path.read(node, config)),
};
const socket: Reader<string> = {
  expected: 'the path of a socket, or fd:N with N from 3',
  read: (node, config) => {
    if (!isInherited(node)) return path.read(node, config);
    return inheritedSocket(node) === undefined ? undefined : node;
  },
};
const flag: Reader<boolean> = {
  expected: 'true or false',
  read: (node) => (typeof node === 'boolean' ? node : undefined),
};
const count = (from: number, to: number): Reader<number> => ({
  expected: `a whole number from ${from} to ${to}`,
  read: (node) =>
    Number.isInteger(node) && Number(node) >= from && Number(node) <= to ? Number(node) : undefined,
});
const size: Reader<number> = {
  expected: 'a size such as 4096, 512K or 200M',
  read: (node) => {
    try {
      const bytes = typeof node === 'number' || typeof node === 'string' ? parseSize(`${node}`) : 0;
      return bytes > 0 ? bytes : undefined;
    } catch {
      return undefined;
    }
  },
};
const choice = <T extends string>(names: readonly T[]): Reader<T> => ({
  expected: `one of ${names.join(', ')}`,
  read: (node) => names.find((name) => name === node),
});
const address: Reader<TcpAddress> = {
  expected: 'HOST:PORT',
  read: (node) => (typeof node === 'string' ? parseAddress(node) : undefined),
};
const files: Reader<string[]> = {
  expected: "a list of files, or 'any'",
  read: (node, config) => {
    if (node === 'any') return ['any'];
    if (!Array.isArray(node)) return undefined;
    return node.every((one) => typeof one === 'string')
      ? node.map((one) => config.path(one))
      : undefined;
  },
};

type Fields<T> = { readonly [K in keyof T]?: Reader<NonNullable<T[K]>> };

const DISK = {
  path,
  name: text,
  format: choice(FORMATS),
  key: text,
  store: path,
  passphraseFile: path,
  passphraseEnv: text,
  pinFile: path,
  recoveryCode: path,
  allowRollback: flag,
  confirmVmk: text,
  policy: path,
  allowBacking: files,
  allowUnauthenticatedBacking: flag,
  cache: choice(CACHES),
  engine: choice(ENGINES),
  queues: count(1, QUEUES_MAX),
  l2CacheSize: size,
  entryCacheSize: size,
  pendingDataSize: size,
  assumeNonVolatile: flag,
  readOnly: flag,
  vhostUser: socket,
  nbd: newSocket,
  nbdTcp: address,
  tlsPsk: path,
  tlsCert: path,
  insecure: flag,
  exportName: text,
  maxClients: count(1, 1024),
  idleTimeout: count(1, COUNT_MAX),
  iopsMax: count(1, COUNT_MAX),
  iopsBurst: count(1, COUNT_MAX),
  bpsMax: size,
  bpsBurst: size,
} as const satisfies Fields<DiskPlan>;

const WAYS_IN = ['vhostUser', 'nbd', 'nbdTcp'] as const;
const BURSTS = [
  ['iopsBurst', 'iopsMax'],
  ['bpsBurst', 'bpsMax'],
] as const;

interface Own {
  readonly key: keyof DiskPlan;
  of(disk: DiskPlan): string | undefined;
}

const asWritten = (key: 'path' | 'vhostUser' | 'nbd'): Own => ({ key, of: (disk) => disk[key] });
const fixedPort = ({ nbdTcp: tcp }: DiskPlan) =>
  tcp && tcp.port !== 0 ? `${tcp.host}:${tcp.port}` : undefined;
const SOCKETS: readonly Own[] = [asWritten('vhostUser'), asWritten('nbd')];
// No two disks may share these; a socket is one way in to one disk, and metrics and messages tell
// disks apart by their names.
const OWN: readonly (readonly Own[])[] = [
  [asWritten('path')],
  [{ key: 'name', of: nameOf }],
  SOCKETS,
  [{ key: 'nbdTcp', of: fixedPort }],
];

/** `HOST:PORT`, `[V6]:PORT`; undefined when it is neither. */
export function parseAddress(given: string): TcpAddress | undefined {
  const found = /^(?:\[([^\]]+)\]|([^:]+)):(\d{1,5})$/.exec(given);
  const port = Number(found?.[3]);
  if (!found || port > 65535) return undefined;
  return { host: found[1] ?? found[2] ?? '', port };
}

/** `vhost-user` of `vhostUser`. */
const keyOf = (name: string) => name.replace(/[A-Z]/g, (c) => `-${c.toLowerCase()}`);

/** Kinds `invalid_argument` with `file:line:column`, `not_found`, `permission`. */
export async function readServeConfig(file: string): Promise<ServePlan> {
  const limits = { operation: 'read configuration', bytesMax: CONFIG_BYTES_MAX };
  const content = await readInputText(file, limits);
  const yaml = await import('yaml');
  return new Config(file, content, yaml).plan();
}

class Config {
  readonly #file: string;
  readonly #yaml: typeof import('yaml');
  readonly #lines: LineCounter;
  readonly #document: Document.Parsed;

  constructor(file: string, content: string, yaml: typeof import('yaml')) {
    this.#file = file;
    this.#yaml = yaml;
    this.#lines = new yaml.LineCounter();
    const parsed = yaml.parseDocument(content, {
      lineCounter: this.#lines,
      prettyErrors: false,
      uniqueKeys: true,
      version: '1.2',
    });
    const [problem] = [...parsed.errors, ...parsed.warnings];
    if (problem) throw this.#error(problem.pos[0], problem.message);
    this.#document = parsed;
  }

  /** A path of the file, as it is seen from here. */
  path(given: string): string {
    return resolve(dirname(this.#file), given);
  }

  plan(): ServePlan {
    const root = this.#map(this.#document.contents, 'a mapping with `disks`');
    this.#refuseOthers(root, ['disks', 'stats']);
    const stats = this.#field(root, 'stats', newSocket);
    const list = root.get('disks', true);
    if (!this.#yaml.isSeq(list) || list.items.length === 0) {
      throw this.#wrong(list ?? root, 'disks', 'a list of at least one disk');
    }
    const disks = list.items.map((item) => this.#disk(item as Node));
    this.#refuseDoubles(list.items as Node[], disks, stats);
    return { disks, stats };
  }

  #disk(node: Node): DiskPlan {
    const map = this.#map(node, 'a disk: a mapping with `path`');
    this.#refuseOthers(map, Object.keys(DISK).map(keyOf));
    const plan: Record<string, unknown> = {};
    for (const [name, reader] of Object.entries(DISK)) {
      const value = this.#field(map, keyOf(name), reader as Reader<unknown>);
      if (value !== undefined) plan[name] = value;
    }
    if (plan.path === undefined)
      throw this.#error(offsetOf(map), 'path: expected a path, not nothing');
    if (!WAYS_IN.some((way) => plan[way] !== undefined)) {
      const ways = WAYS_IN.map(keyOf).join(', ');
      throw this.#error(offsetOf(map), `expected a way in to this disk: one of ${ways}`);
    }
    for (const [burst, limit] of BURSTS) {
      if (plan[burst] === undefined || plan[limit] !== undefined) continue;
      const problem = `${keyOf(burst)}: expected ${keyOf(limit)} besides it`;
      throw this.#error(offsetOf(map.get(keyOf(burst), true)), problem);
    }
    return plan as unknown as DiskPlan;
  }

  #map(node: unknown, expected: string): YAMLMap {
    if (this.#yaml.isMap(node)) return node;
    throw this.#wrong(node, undefined, expected);
  }

  #refuseOthers(map: YAMLMap, known: readonly string[]): void {
    for (const { key } of map.items as Pair<Scalar>[]) {
      if (known.includes(String(key.value))) continue;
      throw this.#error(offsetOf(key), `unknown key '${key}': expected one of ${known.join(', ')}`);
    }
  }

  #field<T>(map: YAMLMap, key: string, reader: Reader<T>): T | undefined {
    const node = map.get(key, true);
    if (node === undefined) return undefined;
    const value = reader.read(this.#plain(node), this);
    if (value === undefined) throw this.#wrong(node, key, reader.expected);
    return value;
  }

  #refuseDoubles(nodes: readonly Node[], disks: readonly DiskPlan[], stats?: string): void {
    for (const own of OWN) {
      const seen = new Set<string>(stats === undefined || own !== SOCKETS ? [] : [stats]);
      const all = disks.flatMap((disk, index) =>
        own.map(({ key, of }) => ({ key, of, disk, index })),
      );
      for (const { key, of, disk, index } of all) {
        const value = of(disk);
        if (value !== undefined && seen.has(value)) {
          const map = nodes[index] as YAMLMap;
          const problem = `${keyOf(key)}: expected one of its own, '${value}' is named already`;
          throw this.#error(offsetOf(map.get(keyOf(key), true) ?? map), problem);
        }
        if (value !== undefined) seen.add(value);
      }
    }
  }

  /** Undefined for what has no plain value: an alias may name what it is part of. */
  #plain(node: unknown): unknown {
    if (!this.#yaml.isNode(node)) return node;
    try {
      const value: unknown = node.toJS(this.#document);
      JSON.stringify(value);
      return value;
    } catch {
      return undefined;
    }
  }

  #wrong(node: unknown, key: string | undefined, expected: string): PqblkError {
    const plain = JSON.stringify(this.#plain(node)) ?? 'what contains itself';
    const found = this.#yaml.isNode(node) ? plain : 'nothing';
    const short = found.length > 60 ? `${found.slice(0, 60)}…` : found;
    const prefix = key === undefined ? '' : `${key}: `;
    return this.#error(offsetOf(node), `${prefix}expected ${expected}, not ${short}`);
  }

  #error(offset: number, problem: string): PqblkError {
    const { line, col } = this.#lines.linePos(offset);
    const place = `${this.#file}:${Math.max(line, 1)}:${Math.max(col, 1)}`;
    return new PqblkError('invalid_argument', `${place}: ${problem}`);
  }
}

const offsetOf = (node: unknown): number => (node as Node | null)?.range?.[0] ?? 0;
