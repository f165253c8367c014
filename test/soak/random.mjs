// Reproducible choices: the same seed gives the same shapes, events and requests.
export class Random {
  #state;
  constructor(seed) {
    this.#state = seed >>> 0;
  }
  /** mulberry32 */
  next() {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }
  below(n) {
    return Math.floor(this.next() * n);
  }
  between(low, high) {
    return low + this.next() * (high - low);
  }
  chance(probability) {
    return this.next() < probability;
  }
  /** One of them; what is there twice comes twice as often. */
  of(...choices) {
    return choices[this.below(choices.length)];
  }
}
