// The benchmarks' arithmetic and their order, against figures worked out by hand.
import { fileURLToPath } from 'node:url';
import { describe, expect, it, vi } from 'vitest';

// The benchmarks are plain JavaScript; nothing declares their types.
const lib = (name: string) =>
  import(fileURLToPath(new URL(`../../bench/lib/${name}.mjs`, import.meta.url)));
const { median, medianInterval, pairedRatios, summarise, summary } = await lib('stats');
const { groupOf, measure, orderOf } = await lib('compare');
const { printGroup } = await lib('terminal');
const { benchCommand } = await lib('commands');
const { deviceName, mountOf } = await lib('machine');
const { qemuImg } = await lib('qemu');
const { coreTime, undisturbed } = await lib('host');
const { found, goal, number, remarks, verdict } = await lib('units');

interface Step {
  row: { name: string };
  round: number;
  x?: number;
}

/** Runs a plan whose samples are given; answers the group and the order of the samples. */
async function play(plan: object, rounds: number, most = rounds) {
  const order: string[] = [];
  const group = groupOf({ group: 'g', unit: 'IOPS', ...plan }, 's');
  const step = async ({ row, x }: Step, once: () => Promise<unknown>) => {
    order.push(x === undefined ? row.name : `${row.name}${x}`);
    try {
      return { result: await once() };
    } catch (error) {
      return { error };
    }
  };
  await measure({ group: 'g', unit: 'IOPS', ...plan }, group, { rounds, most, step });
  return { group, order };
}

const given = (name: string, samples: readonly unknown[]) => {
  const left = [...samples];
  return { name, run: async () => left.shift() };
};

describe('medians and ratios', () => {
  it('takes the middle, or half way between the two in the middle', () => {
    expect(median([5, 1, 9])).toBe(5);
    expect(median([4, 1, 2, 100])).toBe(3);
    expect(median([])).toBeUndefined();
    expect(summary([3, undefined, 1])).toEqual({ median: 2, min: 1, max: 3 });
  });

  it('pairs by round, and leaves rounds out that one side missed', () => {
    expect(pairedRatios([10, 20, undefined, 5], [5, 5, 5, undefined])).toEqual([2, 4]);
  });

  it('is not misled by a machine that slows down for whole rounds', async () => {
    // Always twice as fast as the base, in rounds of very different speed. The quotient of the medians
    // would not be 2.
    const base = given('base', [100, 10, 1000]);
    const fast = given('fast', [200, 20, 2001]);
    const { group } = await play({ base: 'base', contenders: [base, fast] }, 3);
    expect(group.rows[1].points[0].ratio).toEqual({ median: 2, min: 2, max: 2.001 });
    expect(group.rows[0].points[0].ratio).toBeUndefined();
  });
});

describe('rounds', () => {
  it('takes turns, forward and backward', async () => {
    const contenders = ['A', 'B', 'C'].map((name) => given(name, [1, 2, 3]));
    const { order, group } = await play({ contenders }, 3);
    expect(order.join('')).toBe('ABCCBABCA');
    expect(group.rows[1].points[0].samples).toEqual([1, 2, 3]);
  });

  it.each([2, 3, 4, 5, 6])('lets each of %i follow each other one equally often', (count) => {
    const followed = new Map<string, number>();
    for (let round = 0; round < 2 * count; round++) {
      const order: number[] = orderOf(count, round);
      expect(order.toSorted((a, b) => a - b)).toEqual(Array.from({ length: count }, (_, i) => i));
      if (round % 2) expect(order).toEqual(orderOf(count, round - 1).toReversed());
      for (const [i, each] of order.slice(1).entries()) {
        const pair = `${order[i]} ${each}`;
        followed.set(pair, (followed.get(pair) ?? 0) + 1);
      }
    }
    expect(followed.size).toBe(count * (count - 1));
    expect([...new Set(followed.values())]).toEqual([2]);
  });

  it('goes through a series in each round', async () => {
    const contenders = [{ name: 'A', run: async (x: number) => x * 10 }, given('B', [1, 1, 1, 1])];
    const x = { name: 'depth', values: [1, 32] };
    const { order, group } = await play({ x, contenders }, 2);
    expect(order).toEqual(['A1', 'B1', 'A32', 'B32', 'B1', 'A1', 'B32', 'A32']);
    expect(group.rows[0].points.map((point: { median: number }) => point.median)).toEqual([
      10, 320,
    ]);
  });

  it('makes a failure and an absence rows, and goes on', async () => {
    const fails = { name: 'fails', run: () => Promise.reject(new Error('out of luck')) };
    const absent = { name: 'absent', missing: 'not installed', run: () => expect.fail('was run') };
    const targets = [{ name: 'fails', to: 'works', atLeast: 1 }];
    const contenders = [fails, absent, given('works', [7, 7])];
    const { order, group } = await play({ contenders, targets }, 2);
    expect(order).toEqual(['fails', 'works', 'works']);
    expect(group.rows[0]).toMatchObject({ missing: 'failed: out of luck', failed: true });
    expect(group.rows[2].points[0].median).toBe(7);
    expect(verdict(group.targets[0])).toBe('missing');
    expect(group.targets[0].missing).toContain('out of luck');
  });

  it('shows why a contender failed after its first sample, and meets no target by it', async () => {
    const run = () => Promise.reject(new Error('out of luck'));
    const once = given('fails', [9]);
    let runs = 0;
    const fails = { name: 'fails', run: () => (runs++ === 0 ? once.run() : run()) };
    const targets = [
      { name: 'fails', to: 'works', atLeast: 1 },
      { name: 'works', to: 'fails', atMost: 1 },
      { name: 'works', atLeast: 1 },
    ];
    const { group } = await play({ contenders: [fails, given('works', [7, 7])], targets }, 2);
    expect(group.rows[0].points[0]).toMatchObject({ samples: [9], median: 9 });
    expect(group.targets.map(verdict)).toEqual(['missing', 'missing', 'met']);
    expect(group.targets[1].missing).toBe('fails: failed: out of luck');
    const shown: string[] = [];
    const log = vi.spyOn(console, 'log').mockImplementation((text) => void shown.push(text));
    printGroup(group);
    log.mockRestore();
    expect(shown.join('\n')).toMatch(/fails +9\.00 .*\n +failed: out of luck\n/);
  });

  it('keeps the points of a series that were measured before a failure', async () => {
    const run = (x: number) => (x < 3 ? Promise.resolve(x) : Promise.reject(new Error('too deep')));
    const x = { name: 'depth', values: [1, 2, 3, 4] };
    const { group } = await play({ x, contenders: [{ name: 'A', run }] }, 2);
    const shown: string[] = [];
    const log = vi.spyOn(console, 'log').mockImplementation((text) => void shown.push(text));
    printGroup(group);
    log.mockRestore();
    expect(shown.join('\n')).toMatch(/A +1\.00 +2\.00 +– +–\n +failed: too deep/);
  });

  it('keeps what there is when it is interrupted', async () => {
    const group = groupOf({ group: 'g', unit: 'IOPS', contenders: [given('A', [])] }, 's');
    let rounds = 0;
    const step = async () => {
      rounds += 1;
      if (rounds === 3) throw new Error('interrupted');
      return { result: { value: rounds, p50: rounds * 10 } };
    };
    const plan = { contenders: [given('A', [])] };
    await expect(measure(plan, group, { rounds: 5, step })).rejects.toThrow('interrupted');
    expect(group.rows[0].points[0]).toMatchObject({ median: 1.5, detail: { p50: 15 } });
  });
});

describe('targets', () => {
  // Ratios of 0.9, 0.96 and 0.8; the quotient of the medians would be 0.96.
  const contenders = () => [given('base', [10, 100, 1000]), given('ours', [9, 96, 800])];

  it.each([
    [{ name: 'ours', to: 'base', atLeast: 0.9 }, 'met'],
    [{ name: 'ours', to: 'base', atLeast: 0.91 }, 'MISSED'],
    [{ name: 'ours', to: 'base', atMost: 0.9 }, 'met'],
    [{ name: 'ours', atMost: 95 }, 'MISSED'],
    [{ name: 'ours', atMost: 96 }, 'met'],
  ])('%j: %s', async (target, expected) => {
    const { group } = await play({ contenders: contenders(), targets: [target] }, 3);
    expect(verdict(group.targets[0])).toBe(expected);
  });

  it('is of one place in a series', async () => {
    const run = (x: number) => Promise.resolve(x);
    const x = { name: 'TiB', values: [1, 16] };
    const targets = [{ name: 'ours', atMost: 10, x: 16 }];
    const { group } = await play({ x, contenders: [{ name: 'ours', run }], targets }, 1);
    expect(group.targets[0].found.median).toBe(16);
    expect(verdict(group.targets[0])).toBe('MISSED');
  });

  it('refuses to compare with a row that is none', () => {
    const plan = { contenders: contenders(), targets: [{ name: 'ours', to: 'peer', atLeast: 1 }] };
    expect(() => summarise(groupOf(plan, 's'))).toThrow("'peer', which no contender is");
  });
});

describe('a target that the rounds leave open', () => {
  const base = () => given('base', Array(15).fill(100));
  const targets = [{ name: 'ours', to: 'base', atLeast: 1 }];
  const taken = async (ours: readonly number[]) =>
    (await play({ contenders: [base(), given('ours', ours)], targets }, 5, 15)).group;

  it('is what the sign test cannot tell', () => {
    // Of 15 throws of a coin at most 3 show heads with a chance of 1.8 %, of 9 at most 1 with 2 %.
    expect(medianInterval([3, 1, 2, 5, 4])).toEqual({ least: 1, most: 5 });
    expect(medianInterval([9, 8, 7, 6, 5, 4, 3, 2, 1])).toEqual({ least: 2, most: 8 });
    expect(medianInterval(Array.from({ length: 15 }, (_, i) => i))).toEqual({ least: 3, most: 11 });
  });

  it.each([
    ['all of them meet it', [101, 103, 110, 105, 100], 5, 'met'],
    ['all of them miss it', [90, 80, 99, 70, 90], 5, 'MISSED'],
    ['one of nine misses it', [101, 101, 90, ...Array(12).fill(101)], 9, 'met'],
    ['one of nine meets it', [99, 99, 110, ...Array(12).fill(99)], 9, 'MISSED'],
  ])('is measured until it is not: %s', async (_, ours, rounds, word) => {
    const group = await taken(ours);
    expect(group.rounds).toEqual({ asked: 5, taken: rounds });
    expect(verdict(group.targets[0])).toBe(word);
    expect(remarks(group)).toHaveLength(rounds === 5 ? 0 : 1);
  });

  it('is given up at last, and that is said', async () => {
    const group = await taken([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1].map((n) => 99 + 2 * n));
    expect(group.rounds.taken).toBe(15);
    expect(remarks(group)).toEqual([
      '15 rounds: 5 left open whether a target is met, as do all of them',
    ]);
  });

  it('does not keep a contender that fails', async () => {
    const fails = { name: 'ours', run: () => Promise.reject(new Error('out of luck')) };
    const { group } = await play({ contenders: [base(), fails], targets }, 5, 15);
    expect(group.rounds.taken).toBe(5);
  });
});

describe('the machine', () => {
  it('is told by the mount on top where one lies over another', () => {
    const two = '0:25 tmpfs tmpfs\n0:300 shm tmpfs';
    expect(mountOf(two, '0:300')).toEqual({ source: 'shm', fileSystem: 'tmpfs' });
    expect(mountOf(`${two}\n254:0 /dev/vda ext4`, '0:25').source).toBe('tmpfs');
    expect(mountOf('0:41 /dev/sda[/@] btrfs', '0:99').fileSystem).toBe('btrfs');
    expect(mountOf('', '8:1')).toEqual({ source: undefined, fileSystem: undefined });
  });

  it('names devices as the kernel does, beyond 255 as well', () => {
    expect(deviceName(0x801)).toBe('8:1');
    expect(deviceName(0x10012c)).toBe('1:300');
  });
});

describe('what repeats a sample', () => {
  const facts = { path: '/a b.sealed', format: 'sealed', queues: 2 };
  const spec = { rw: 'randrw', blockSize: 4096, iodepth: 32, runtimeMs: 1500, seed: 7 };

  it('is a command line where `pqblk bench` can open the disk so', () => {
    expect(benchCommand(facts, { cache: 'writeback', queues: 2 }, spec, 'alice')).toBe(
      "pqblk bench '/a b.sealed' --format sealed --key alice --rw randrw --bs 4096 --iodepth 32 " +
        '--queues 2 --cache writeback --runtime 1.5 --rwmixread 50 --seed 7',
    );
    const raw = { path: '/r', format: 'raw', queues: 1 };
    const more = { rw: 'randwrite', iodepth: 1, stride: 8192, size: 65536, flushEvery: 1 };
    expect(benchCommand(raw, { cache: 'none' }, { ...more, rampMs: 300 })).toBe(
      'pqblk bench /r --format raw --rw randwrite --bs 4096 --iodepth 1 --queues 1 ' +
        '--stride 8192 --size 65536 --ramp 0.3 --fdatasync 1',
    );
  });

  it('is calls where it can not, such as a device declared non-volatile', () => {
    const options = { cache: 'none', assumeNonVolatile: true };
    expect(benchCommand(facts, options, { rw: 'randwrite', iodepth: 32 }, 'alice')).toBe(
      "await (await openDisk('/a b.sealed', { format: 'sealed', identity, cache: 'none', " +
        "assumeNonVolatile: true })).bench({ rw: 'randwrite', iodepth: 32 })",
    );
  });

  it('stands in the row before it was measured where it is a call', () => {
    const contenders = [{ name: 'a', call: 'f()' }, { name: 'b', call: ['x', 'y'] }, { name: 'c' }];
    const { rows } = groupOf({ group: 'g', unit: 'ms', contenders }, 's');
    expect(rows.map(({ commands }: { commands: string[] }) => commands)).toEqual([
      ['f()'],
      ['x', 'y'],
      [],
    ]);
  });
});

describe('qemu-img', () => {
  const failing = (message: string, times: number) => {
    let left = times;
    const run = vi.fn(async () => {
      left -= 1;
      if (left >= 0) throw new Error(message);
      return 'done';
    });
    return { run };
  };

  it('is asked again when its clock was too coarse, a few times', async () => {
    const clock = 'qemu-img: exit 1\nUnable to get accurate CPU usage';
    expect(await qemuImg(failing(clock, 7), ['create'])).toBe('done');
    await expect(qemuImg(failing(clock, 8), ['create'])).rejects.toThrow('accurate CPU usage');
    const other = failing('No space left', 1);
    await expect(qemuImg(other, ['create'])).rejects.toThrow('No space left');
    expect(other.run).toHaveBeenCalledTimes(1);
  });
});

describe('figures as text', () => {
  it.each([
    [2_310_000, 'IOPS', '2.31M'],
    [123_456, 'IOPS', '123k'],
    [9_400, 'ops/s', '9.4k'],
    [123_456, 'MB/s', '123456'],
    [12.345, 'µs', '12.3'],
    [0.5, 'ms', '0.50'],
    [0.0123, 's', '0.012'],
    [0, '%', '0'],
    [undefined, 'IOPS', '–'],
  ])('%d %s is %s', (value, unit, text) => expect(number(value, unit)).toBe(text));

  it('says what was wanted and what was found', () => {
    expect(goal({ to: 'x', atLeast: 0.97 }, 'IOPS')).toBe('≥ 0.97');
    expect(goal({ atMost: 160 }, 'MiB')).toBe('≤ 160 MiB');
    const spread = { median: 0.981, min: 0.9, max: 12.34 };
    expect(found({ to: 'x', found: spread }, 'IOPS')).toBe('0.98 (0.90–12.3)');
    // Never rounded over to the other side of the target.
    const nearly = { to: 'x', atLeast: 1, met: false, found: { median: 0.998, min: 0.9, max: 1 } };
    expect(found(nearly, 'IOPS')).toBe('0.998 (0.90–1.00)');
  });
});

describe('a host that takes the cores away', () => {
  const stat = 'cpu  100 5 50 800 10 3 2 30 7 7\ncpu0 50 2 25 400 5 1 1 15 3 3\n';

  /** Samples 1, 2, 3, … during which the host takes these shares of 100 ticks. */
  function sampler(shares: readonly number[]) {
    const sum = { all: 0, stolen: 0 };
    let calls = 0;
    const once = async () => {
      sum.all += 100;
      sum.stolen += shares[calls] ?? 0;
      calls += 1;
      return calls;
    };
    return { once, now: () => ({ ...sum }) };
  }

  it('is seen in the time that the kernel counts as stolen', () => {
    expect(coreTime(stat)).toEqual({ all: 1000, stolen: 30 });
    expect(coreTime('')).toEqual({ all: 0, stolen: 0 });
  });

  it('has a sample measured again, however it came out, until it leaves one alone', async () => {
    const { once, now } = sampler([40, 6, 5, 0]);
    const found = await undisturbed(once, { tries: 6, now, clock: () => 0 });
    expect(found).toEqual({ result: 3, repeated: 2, disturbed: false });
  });

  it('is put up with at last, and then it is told', async () => {
    const { once, now } = sampler([40, 40, 40, 40]);
    const found = await undisturbed(once, { tries: 3, now, clock: () => 0 });
    expect(found).toEqual({ result: 3, repeated: 2, disturbed: true });
    expect(remarks({ host: { repeated: 2, disturbed: 1 } })).toEqual([
      'the host took the cores away: 2 samples measured again; 1 counted all the same',
    ]);
    expect(remarks({ host: { repeated: 0, disturbed: 0 } })).toEqual([]);
    expect(remarks({})).toEqual([]);
  });

  it('does not have a long sample repeated', async () => {
    const { once, now } = sampler([40, 0]);
    let at = 0;
    const clock = () => {
      at += 6000;
      return at;
    };
    const found = await undisturbed(once, { tries: 6, now, clock });
    expect(found).toEqual({ result: 1, repeated: 0, disturbed: true });
  });
});
