// Room disk/: the options and answers of the public API.
import type { Identity, PinOptions, Pins, SlotDescription } from '../keys/index.js';
import type { DiskFormat } from '../native.js';

export type { DiskFormat };

/** As QEMU means them: none = O_DIRECT; unsafe = flushes are not passed on. */
export type CacheMode = 'none' | 'writeback' | 'writethrough' | 'unsafe';
export type EngineName = 'auto' | 'io_uring' | 'aio' | 'threads';

/** Who opens a sealed disk, and what this host remembers of it. */
export interface KeyOptions extends PinOptions {
  /** The private key. Needed for sealed disks; stays the caller's to dispose of. */
  identity?: Identity | undefined;
  /** Refuses older or foreign key areas; usually `keyStore.pins`. Left out: nothing is compared. */
  pins?: Pins | undefined;
  /** Called with the slot that opens the disk, before its keys are used; what it throws is thrown. */
  onSlot?: ((slot: SlotDescription) => void) | undefined;
}

export interface OpenDiskOptions extends KeyOptions {
  /** Said by the opener and never probed: a guest could make its raw disk look like a qcow2 image. */
  format: DiskFormat;
  readOnly?: boolean;
  /**
   * Sealed: also a disk with data beyond its size, as its header was put back that is of before it was grown. It
   * takes no write before `resize`.
   */
  toResize?: boolean;
  /** Default `none`. */
  cache?: CacheMode;
  /** With cache `none`: refuse a file system without O_DIRECT instead of going buffered. */
  directRequired?: boolean;
  /** 1 to 64, each a thread with its ring. Default 1. */
  queues?: number;
  engine?: EngineName;
  /** Operations in one ring at once. Default 256. */
  ringDepth?: number;
  /** io_uring: a kernel thread submits. */
  sqpoll?: boolean;
  /** Polls so long before an idle queue sleeps. Default 0. */
  spinMicroseconds?: number;
  /** Bounds of caches, at most 64 GiB each. Default 32 MiB, 64 MiB and 28 MiB. */
  l2CacheBytes?: number;
  entryCacheBytes?: number;
  pendingDataBytes?: number;
  /** The operator's word on the device's write cache. */
  assumeNonVolatile?: boolean;
  /** Files the image may name as its backing; true: whatever it names. Default: none. */
  allowBacking?: boolean | string[];
  /** When the image's header does not say. */
  backingFormat?: 'raw' | 'qcow2';
  /** Sealed: consent to a backing image that nothing authenticates. */
  allowUnauthenticatedBacking?: boolean;
}

export interface DiskFacts {
  readonly path: string;
  readonly format: DiskFormat;
  /** What runs: `io_uring`, `aio`, `threads`. */
  readonly engine: string;
  /** Why it is not io_uring, when it was asked for or automatic. */
  readonly engineFallbackCause?: string;
  readonly durabilityClass: string;
  /** The serial number that guests see. */
  readonly id: string;
  readonly size: number;
  /** 0 for raw. */
  readonly clusterSize: number;
  readonly queues: number;
  readonly readOnly: boolean;
  /** O_DIRECT is in use. */
  readonly direct: boolean;
  /** Sealed: cipher suite, the implementation that runs it, and this opener's session. */
  readonly suite?: string;
  readonly aead?: string;
  readonly sessionId?: number;
}

export interface QueueStats {
  readonly reads: number;
  readonly writes: number;
  readonly flushes: number;
  readonly discards: number;
  readonly zeroes: number;
  readonly errors: number;
  readonly readBytes: number;
  readonly writtenBytes: number;
  /** Now; what the limits hold back is included. */
  readonly inFlight: number;
  /** Had to wait for the limits. */
  readonly throttled: number;
  /** From when the queue saw a request to its completion; failed ones are included. */
  readonly latency: Readonly<Record<RequestKind, LatencyStats>>;
}

export type RequestKind = 'reads' | 'writes' | 'flushes' | 'discards' | 'zeroes';

export interface LatencyStats {
  /** Requests by their time; the upper bound of bucket i is latencyBucketSeconds(i). */
  readonly buckets: readonly number[];
  readonly sumNs: number;
}

/** The most that a request in this bucket took; the last bucket has no bound. */
export function latencyBucketSeconds(bucket: number, buckets: number): number {
  return bucket + 1 === buckets ? Number.POSITIVE_INFINITY : 2 ** (10 + bucket) / 1e9;
}

/** Of a disk: for all its queues and servers together. 0 or left out: no limit. */
export interface RateLimits {
  /** Reads, writes, discards and zeroes a second. Flushes are never held back. */
  iopsMax?: number | undefined;
  /** Requests that may go at once after a rest. Default: a tenth of a second's. */
  iopsBurst?: number | undefined;
  /** Bytes of reads and writes a second. */
  bpsMax?: number | undefined;
  /** Bytes that may go at once after a rest. Default: a tenth of a second's. */
  bpsBurst?: number | undefined;
}

export interface BackendStats {
  readonly metadataReads: number;
  readonly metadataWrites: number;
  /** Tables of cluster addresses: qcow2 and sealed. */
  readonly l2Hits: number;
  readonly l2Misses: number;
  /** Entries of sectors: sealed. */
  readonly entryHits: number;
  readonly entryMisses: number;
  readonly logBytes: number;
  readonly logCapacity: number;
  readonly logUsed: number;
  readonly checkpoints: number;
  readonly integrityFailures: number;
  readonly sectorsSealed: number;
  readonly sectorsOpened: number;
}

export interface DiskStats {
  readonly queues: readonly QueueStats[];
  readonly backend: BackendStats;
}

/** `hole`: nothing is allocated, reads zeros (or the backing image). `zero`: known to read zeros. */
export type ExtentKind = 'data' | 'zero' | 'hole';

export interface DiskExtent {
  readonly offset: number;
  readonly length: number;
  readonly kind: ExtentKind;
}

export type BenchPattern = 'read' | 'write' | 'randread' | 'randwrite' | 'randrw';

export interface BenchSpec {
  rw: BenchPattern;
  /** Bytes. Default 4096. */
  blockSize?: number;
  /** Bytes from one place to the next. Default blockSize; more spreads a small working set. */
  stride?: number;
  /** Requests in flight on each queue. Default 32. */
  iodepth?: number;
  /** Bytes from the disk's start that are used. Default: the whole disk. */
  size?: number;
  /** 0 or left out: until `size` bytes were moved. */
  runtimeMs?: number;
  /** Runs before the counting starts. */
  rampMs?: number;
  seed?: number;
  /** randrw: how many in a hundred are reads. Default 50. */
  readPercent?: number;
  /** A flush after so many writes of a queue. Default: none. */
  flushEvery?: number;
}

export interface BenchDirection {
  readonly ops: number;
  readonly bytes: number;
  readonly iops: number;
  readonly bytesPerSecond: number;
  readonly latencyMicroseconds: Readonly<
    Record<'min' | 'mean' | 'max' | 'p50' | 'p90' | 'p95' | 'p99' | 'p99_9' | 'p99_99', number>
  >;
}

export interface BenchResult {
  readonly read: BenchDirection;
  readonly write: BenchDirection;
  /** Its bytes are 0. */
  readonly flush: BenchDirection;
  readonly seconds: number;
  readonly queues: number;
}
