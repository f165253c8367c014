// Room keys/: loads liboqs (WebAssembly, shipped inside @oqs/liboqs-js) and calls its KEM
// functions.
//
// The package's own wrapper frees secrets without wiping them, so its module for the algorithm is
// loaded directly and every heap range that a call used is zeroed before it is freed. Nothing here
// knows keys, slots or files; `liboqs.ts` is the only user.
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { PqblkError } from '../errors.js';
import { Kem, type KemId, kemParameters, SHARED_SECRET_BYTES } from './ml-kem.js';
import { Secret } from './secret.js';

export const LIBOQS_VERSION = '0.15.1';

/** The part of the Emscripten module that is used. Pointers are byte offsets into HEAPU8. */
interface OqsModule {
  HEAPU8: Uint8Array; // replaced when the heap grows: read it anew after each call
  _malloc(bytes: number): number;
  _free(pointer: number): void;
  _OQS_init(): void;
  _OQS_KEM_new(name: number): number;
  _OQS_KEM_keypair(kem: number, ek: number, dk: number): number;
  _OQS_KEM_encaps(kem: number, ciphertext: number, secret: number, ek: number): number;
  _OQS_KEM_decaps(kem: number, secret: number, ciphertext: number, dk: number): number;
  stringToUTF8(text: string, pointer: number, capacity: number): number;
}

const MODULE_FILE: Partial<Record<KemId, string>> = {
  [Kem.mlKem768]: 'ml-kem-768.min.js',
  [Kem.mlKem1024]: 'ml-kem-1024.min.js',
};

/** The KEMs that liboqs has by itself. */
export const LIBOQS_KEMS = Object.keys(MODULE_FILE).map(Number) as KemId[];

// The package exports only its wrapper, which pulls in every algorithm; its files are found the way
// Node finds a package, without going through `exports`.
function locate(file: string): string {
  const folders = createRequire(import.meta.url).resolve.paths('@oqs/liboqs-js') ?? [];
  const candidates = folders.map((folder) => join(folder, '@oqs', 'liboqs-js', 'dist', file));
  const found = candidates.find((path) => existsSync(path));
  if (found) return found;
  throw new PqblkError('not_found', `@oqs/liboqs-js ${LIBOQS_VERSION} is not installed`, {
    operation: 'load liboqs',
    hint: 'run scripts/setup (or npm ci)',
  });
}

/** One KEM of liboqs. Synchronous: each call takes well under a millisecond once compiled. */
export class OqsKem {
  readonly #module: OqsModule;
  readonly #kem: number;
  readonly #id: KemId;

  private constructor(module: OqsModule, kem: number, id: KemId) {
    this.#module = module;
    this.#kem = kem;
    this.#id = id;
  }

  /** Loads and instantiates the module of one KEM. Kinds `unsupported`, `not_found`. */
  static async load(id: KemId): Promise<OqsKem> {
    const { name } = kemParameters(id);
    const file = MODULE_FILE[id];
    if (file === undefined) {
      throw new PqblkError('unsupported', `liboqs has no ${name} by itself`);
    }
    const factory = (await import(pathToFileURL(locate(file)).href)) as {
      default: () => Promise<OqsModule>;
    };
    const module = await factory.default();
    module._OQS_init();
    const namePointer = module._malloc(name.length + 1);
    module.stringToUTF8(name, namePointer, name.length + 1);
    const kem = module._OQS_KEM_new(namePointer);
    module._free(namePointer);
    if (kem === 0) throw new PqblkError('unsupported', `this build of liboqs lacks ${name}`);
    return new OqsKem(module, kem, id);
  }

  /** The whole heap, for the test that looks for residue of secrets. */
  get heap(): Uint8Array {
    return this.#module.HEAPU8;
  }

  /** FIPS 203 algorithm 19. */
  keypair(): { encapsulationKey: Uint8Array; decapsulationKey: Secret } {
    const size = kemParameters(this.#id);
    return this.#call(
      'generate',
      [size.encapsulationKeyBytes, size.decapsulationKeyBytes],
      (ek, dk) => this.#module._OQS_KEM_keypair(this.#kem, ek, dk),
      (ek, dk) => ({ encapsulationKey: ek.slice(), decapsulationKey: Secret.copyOf(dk) }),
    );
  }

  /** FIPS 203 algorithm 20; sizes were checked by the caller. */
  encapsulate(encapsulationKey: Uint8Array): { ciphertext: Uint8Array; sharedSecret: Secret } {
    return this.#call(
      'encapsulate',
      [kemParameters(this.#id).ciphertextBytes, SHARED_SECRET_BYTES, encapsulationKey],
      (ct, ss, ek) => this.#module._OQS_KEM_encaps(this.#kem, ct, ss, ek),
      (ct, ss) => ({ ciphertext: ct.slice(), sharedSecret: Secret.copyOf(ss) }),
    );
  }

  /** FIPS 203 algorithm 21; sizes were checked by the caller. */
  decapsulate(decapsulationKey: Secret, ciphertext: Uint8Array): Secret {
    return decapsulationKey.use((key) =>
      this.#call(
        'decapsulate',
        [SHARED_SECRET_BYTES, ciphertext, key],
        (ss, ct, dk) => this.#module._OQS_KEM_decaps(this.#kem, ss, ct, dk),
        (ss) => Secret.copyOf(ss),
      ),
    );
  }

  /**
   * Lays out the arguments on the heap (a number = room for output of so many bytes, bytes =
   * input), runs `call`, lets `take` copy results out, and in every case wipes all ranges before
   * freeing them.
   */
  #call<T>(
    operation: string,
    args: readonly (number | Uint8Array)[],
    call: (...pointers: [number, number, number]) => number,
    take: (...outputs: [Uint8Array, Uint8Array, Uint8Array]) => T,
  ): T {
    const ranges: { pointer: number; length: number }[] = [];
    const view = (range: { pointer: number; length: number } | undefined) =>
      range
        ? this.#module.HEAPU8.subarray(range.pointer, range.pointer + range.length)
        : new Uint8Array(0);
    try {
      for (const argument of args) {
        const length = typeof argument === 'number' ? argument : argument.length;
        const pointer = this.#module._malloc(length);
        if (pointer === 0) throw new PqblkError('no_memory', 'liboqs has no heap', { operation });
        ranges.push({ pointer, length });
        if (typeof argument !== 'number') this.#module.HEAPU8.set(argument, pointer);
      }
      const [a, b, c] = ranges;
      if (call(a?.pointer ?? 0, b?.pointer ?? 0, c?.pointer ?? 0) !== 0) {
        throw new PqblkError('bad_key', `liboqs refused to ${operation}`, { operation });
      }
      return take(view(a), view(b), view(c));
    } finally {
      for (const range of ranges) view(range).fill(0);
      for (const { pointer } of ranges) this.#module._free(pointer);
    }
  }
}
