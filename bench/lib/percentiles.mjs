// Percentiles of many times without keeping them: counts in buckets that are 3 % wide.

const PER_DOUBLING = 24;
const DOUBLINGS = 40; // from 1/256 µs to hours
const LEAST = 2 ** -8;

export class Percentiles {
  #counts = new Uint32Array(PER_DOUBLING * DOUBLINGS);
  #total = 0;
  #sum = 0;
  #most = 0;

  add(value) {
    const place = Math.floor(Math.log2(Math.max(value, LEAST) / LEAST) * PER_DOUBLING);
    this.#counts[Math.min(place, this.#counts.length - 1)] += 1;
    this.#total += 1;
    this.#sum += value;
    if (value > this.#most) this.#most = value;
  }

  /** What `share` (0 to 1) of the values did not exceed, at most 3 % too much; 0 when there are none. */
  at(share) {
    const wanted = Math.max(1, Math.ceil(share * this.#total));
    for (let place = 0, seen = 0; place < this.#counts.length; place++) {
      seen += this.#counts[place];
      if (seen >= wanted) return Math.min(this.#most, LEAST * 2 ** ((place + 1) / PER_DOUBLING));
    }
    return 0;
  }

  /** In the unit of the values. */
  summary() {
    return {
      mean: this.#total ? this.#sum / this.#total : 0,
      p50: this.at(0.5),
      p90: this.at(0.9),
      p99: this.at(0.99),
      p99_9: this.at(0.999),
      max: this.#most,
    };
  }
}
