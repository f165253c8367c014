// The second reader: docs/format.md section 6, "Reading an image that was not closed cleanly".
//
// Folds the records of the live blocks into an index: for a slot its last MAP, for a sector its
// candidates. It changes nothing and reads nothing; which candidate is valid is for image.ts to try.
import {
  type Geometry,
  NEVER,
  type SectorEntry,
  sectorsOfEntrySlot,
  type TableEntry,
  ZERO,
} from './entries.js';
import type { LogBlock, LogRecord } from './log.js';

export interface Candidate {
  /** Position among all records: the larger, the newer. */
  readonly order: number;
  readonly sequence: number;
  readonly entry: SectorEntry;
  /** WD: where in the file the ciphertext is. Undefined: at the sector's home place. */
  readonly inlineAt: number | undefined;
}

export interface Mapping {
  readonly to: TableEntry;
  readonly from: TableEntry;
  readonly sequence: number;
}

interface Range extends Candidate {
  readonly first: number;
  readonly end: number;
}

// Ranges are found through buckets of sectors, so that a log full of zero records stays fast.
const BUCKET = 512;
const WIDE_BUCKETS = 1024;

export class LogFold {
  /** C of the document. */
  readonly covered: number;
  readonly mappings = new Map<number, Mapping>();
  readonly #writes = new Map<number, Candidate[]>();
  readonly #narrow = new Map<number, Range[]>();
  readonly #wide: Range[] = [];
  readonly #geometry: Geometry;

  constructor(blocks: readonly LogBlock[], geometry: Geometry) {
    this.#geometry = geometry;
    this.covered = blocks.reduce((most, block) => Math.max(most, block.covered), 0);
    let order = 0;
    for (const { sequence, records } of blocks) {
      for (const record of records) {
        this.#add(record, order, sequence);
        order += 1;
      }
    }
  }

  /** Newest first; those after C, then the newest one up to C. Empty: the home entry alone counts. */
  candidates(sector: number): Candidate[] {
    const ranges = [...(this.#narrow.get(Math.floor(sector / BUCKET)) ?? []), ...this.#wide];
    const all = [
      ...(this.#writes.get(sector) ?? []),
      ...ranges.filter(({ first, end }) => sector >= first && sector < end),
    ];
    all.sort((a, b) => b.order - a.order);
    const newestCovered = all.findIndex((candidate) => candidate.sequence <= this.covered);
    return newestCovered < 0 ? all : all.slice(0, newestCovered + 1);
  }

  #add(record: LogRecord, order: number, sequence: number): void {
    if (record.type === 'MAP') {
      this.mappings.set(record.slot, { to: record.to, from: record.from, sequence });
      if (record.kind === 'entry') this.#addEntryMap(record, order, sequence);
    } else if (record.type === 'Z') {
      this.#addRange(record.first, record.count, { order, sequence, entry: ZERO });
    } else {
      const inlineAt = record.type === 'WD' ? record.at : undefined;
      const list = this.#writes.get(record.sector) ?? [];
      list.push({ order, sequence, entry: record.entry, inlineAt });
      this.#writes.set(record.sector, list);
    }
  }

  /** To the zero flag or to nothing, a MAP says something of every sector; to a cluster, nothing new. */
  #addEntryMap(record: Extract<LogRecord, { type: 'MAP' }>, order: number, sequence: number): void {
    const { zero, host } = record.to;
    if (!zero && host !== 0) return;
    const { first, count } = sectorsOfEntrySlot(this.#geometry, record.slot);
    this.#addRange(first, count, { order, sequence, entry: zero ? ZERO : NEVER });
  }

  #addRange(first: number, count: number, what: Omit<Candidate, 'inlineAt'>): void {
    if (count === 0) return;
    const range: Range = { ...what, inlineAt: undefined, first, end: first + count };
    const [from, to] = [Math.floor(first / BUCKET), Math.floor((range.end - 1) / BUCKET)];
    if (to - from >= WIDE_BUCKETS) {
      this.#wide.push(range);
      return;
    }
    for (let bucket = from; bucket <= to; bucket += 1) {
      const list = this.#narrow.get(bucket) ?? [];
      list.push(range);
      this.#narrow.set(bucket, list);
    }
  }
}
