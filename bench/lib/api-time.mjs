// How long a call of the API takes: tinybench calls it again and again for the length of a sample.
import { Bench } from 'tinybench';

const US_PER_MS = 1000;

/** Milliseconds (the median of the calls) and percentiles in microseconds. */
export async function timeCalls(call, seconds) {
  const bench = new Bench({
    ...{ time: seconds * 1000, iterations: 3, throws: true, retainSamples: true },
    ...{ warmup: true, warmupTime: 0, warmupIterations: 1 },
  });
  bench.add('call', call);
  const [{ result }] = await bench.run();
  const { p50, p99, mean } = result.latency;
  return { value: p50, mean: mean * US_PER_MS, p50: p50 * US_PER_MS, p99: p99 * US_PER_MS };
}

/** Milliseconds that one call takes. */
export async function timeOnce(call) {
  const began = performance.now();
  await call();
  return performance.now() - began;
}
