// Set crypto: what one core seals and opens, by library and suite; and the key mechanisms of a disk.
import { hkdfSync, randomBytes } from 'node:crypto';
import { hkdf } from '@noble/hashes/hkdf.js';
import { sha3_256 } from '@noble/hashes/sha3.js';
import { ml_kem768_x25519 } from '@noble/post-quantum/hybrid.js';
import { ml_kem768, ml_kem1024 } from '@noble/post-quantum/ml-kem.js';
import { Bench as Tinybench } from 'tinybench';
import { Kem, liboqs } from '../../dist/index.js';
import { hkdfExpand, hkdfExtract } from '../../dist/keys/kdf.js';

const BARE = 'bare';
const BARE_NAME = 'ipsec-mb, bare loop';

async function sectors(bench) {
  const program = await bench.build('bench_crypto');
  const all = JSON.parse(await bench.run(program, ['list']));
  const ms = Math.max(30, Math.round(bench.seconds * 500));
  for (const suite of new Set(all.map((each) => each.suite))) {
    for (const operation of ['seal', 'open']) {
      const rows = all.filter((each) => each.suite === suite);
      const nameOf = ({ name, inUse }) =>
        name === BARE ? BARE_NAME : `pqblk by ${name}${inUse ? ' (in use)' : ''}`;
      const rate = async ({ name }) =>
        JSON.parse(await bench.run(program, [suite, name, operation, `ms=${ms}`])).gbps;
      await bench.compare({
        group: `${suite}, ${operation} 4 KiB, one core`,
        about: 'Sectors with 36 bytes of associated data; the best 3 ms of each sample.',
        ...{ unit: 'GB/s', base: BARE_NAME },
        contenders: rows.map((row) => ({
          name: nameOf(row),
          ...(!row.available && { missing: 'this processor or build has it not' }),
          run: () => rate(row),
        })),
        targets: rows
          .filter(({ inUse }) => inUse)
          .map((row) => ({ name: nameOf(row), to: BARE_NAME, atLeast: 0.95 })),
      });
    }
  }
}

/** Calls a second of one function, and how long a call takes. */
async function calls(bench, call) {
  const time = bench.seconds * 250;
  const options = { time, iterations: 8, warmupTime: time / 5, warmupIterations: 4 };
  const task = new Tinybench({ ...options, throws: true, signal: bench.signal });
  task.add('one', call);
  await task.run();
  const { latency } = task.tasks[0].result;
  const us = (ms) => ms * 1000;
  return { value: 1000 / latency.mean, p50: us(latency.p50), p99: us(latency.p99) };
}

/** `name`: of the mechanism, for the report. */
const theirs = (name, kem) => ({
  calls: {
    generate: `${name}.keygen()`,
    encapsulate: `${name}.encapsulate(publicKey)`,
    decapsulate: `${name}.decapsulate(cipherText, secretKey)`,
  },
  pair: async () => kem.keygen(),
  generate: async () => kem.keygen().secretKey.fill(0),
  encapsulate: async ({ publicKey }) => kem.encapsulate(publicKey),
  decapsulate: async ({ secretKey }, { cipherText }) => kem.decapsulate(cipherText, secretKey),
});

const ours = (name, kem) => ({
  calls: {
    generate: `liboqs.generate(${name})`,
    encapsulate: `liboqs.encapsulate(${name}, encapsulationKey)`,
    decapsulate: `liboqs.decapsulate(privateKey, ciphertext)  // of ${name}`,
  },
  pair: () => liboqs.generate(kem),
  generate: async () => (await liboqs.generate(kem)).privateKey.decapsulationKey.wipe(),
  encapsulate: (pair) => liboqs.encapsulate(kem, pair.encapsulationKey),
  decapsulate: (pair, { ciphertext }) => liboqs.decapsulate(pair.privateKey, ciphertext),
});

/** A key mechanism by the library of the product, and by the one that the tests check it with. */
async function mechanism(bench, name, libraries) {
  const all = await Promise.all(
    Object.entries(libraries).map(async ([library, kem]) => {
      const pair = await kem.pair();
      const sent = await kem.encapsulate(pair);
      return { library, ...{ kem, pair, sent } };
    }),
  );
  const base = 'noble';
  const steps = { 'key generation': 'generate', encapsulation: 'encapsulate' };
  for (const [what, step] of Object.entries({ ...steps, decapsulation: 'decapsulate' })) {
    await bench.compare({
      ...{ group: `${name}, ${what}`, unit: 'ops/s', base },
      contenders: all.map(({ library, kem, pair, sent }) => ({
        ...{ name: library, call: kem.calls[step] },
        run: () => calls(bench, async () => void (await kem[step](pair, sent))),
      })),
    });
  }
}

async function derivation(bench) {
  const [salt, info, material] = [32, 64, 32].map((size) => new Uint8Array(randomBytes(size)));
  const derive = () => {
    const key = hkdfExtract(salt, material);
    hkdfExpand(key, info).wipe();
    key.wipe();
  };
  await bench.compare({
    group: 'HKDF-SHA3-256, 32 bytes to 32 bytes',
    about: 'pqblk wipes what it derived from; node:crypto does not.',
    ...{ unit: 'ops/s', base: 'node:crypto' },
    contenders: [
      {
        name: 'node:crypto',
        call: "hkdfSync('sha3-256', material, salt, info, 32)",
        run: () => calls(bench, () => hkdfSync('sha3-256', material, salt, info, 32)),
      },
      {
        name: 'noble',
        call: 'hkdf(sha3_256, material, salt, info, 32)',
        run: () => calls(bench, () => hkdf(sha3_256, material, salt, info, 32)),
      },
      {
        name: 'pqblk',
        call: 'hkdfExpand(hkdfExtract(salt, material), info)  // dist/keys/kdf.js',
        run: () => calls(bench, derive),
      },
    ],
  });
}

export default {
  name: 'crypto',
  about: 'seal and open by library and suite; ML-KEM, X-Wing, HKDF',
  async run(bench) {
    await sectors(bench);
    await mechanism(bench, 'ML-KEM-768', {
      noble: theirs('ml_kem768', ml_kem768),
      pqblk: ours('Kem.mlKem768', Kem.mlKem768),
    });
    if (!bench.quick) {
      await mechanism(bench, 'ML-KEM-1024', {
        noble: theirs('ml_kem1024', ml_kem1024),
        pqblk: ours('Kem.mlKem1024', Kem.mlKem1024),
      });
      await mechanism(bench, 'X-Wing', {
        noble: theirs('ml_kem768_x25519', ml_kem768_x25519),
        pqblk: ours('Kem.xWing', Kem.xWing),
      });
    }
    await derivation(bench);
  },
};
