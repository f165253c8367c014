// What a disk of the soak is, by chance: the same seed gives the same disk. Knows nothing of what will be
// done to it.
const KiB = 2 ** 10;
const MiB = 2 ** 20;
const GROWTH = 64 * MiB;

/**
 * Sizes of caches, often smaller than what they are to hold: the defaults have room for far larger
 * disks and would evict nothing. Whatever is asked for, they hold 256 pages of entries (128 MiB of a
 * disk) and 128 slices of L2 tables. More slices than that has only a disk of small clusters, 256 MiB
 * of them of 4 KiB; half of the small L2 caches get one. Smaller clusters would not do: a sector lies
 * in two of them then, and qcow2 may lose one of the two to a kill.
 */
function cachesOf(random, { format, size }, { steady, quick }) {
  if (format === 'raw') return {};
  const cacheBytes = {};
  if (steady || random.chance(0.6)) cacheBytes.l2CacheBytes = random.of(64 * KiB, 512 * KiB);
  const tables = cacheBytes.l2CacheBytes !== undefined && random.chance(0.5);
  if (format === 'sealed') {
    if (steady || random.chance(0.6)) cacheBytes.entryCacheBytes = random.of(64 * KiB, MiB);
    if (random.chance(0.6)) cacheBytes.pendingDataBytes = random.of(64 * KiB, MiB, 4 * MiB);
  }
  if (!tables) return { cacheBytes };
  const larger = quick ? size : Math.max(size, 288 * MiB);
  return { cacheBytes, cluster: '4K', size: larger, maxSize: larger + GROWTH };
}

/** What a disk is, by chance. */
export function shapeOf(random, how) {
  const shape = formOf(random, how);
  return { ...shape, ...cachesOf(random, shape, how) };
}

function formOf(random, { steady, quick }) {
  const format = steady ? 'sealed' : random.of('sealed', 'sealed', 'sealed', 'qcow2', 'raw');
  const sealed = format === 'sealed';
  const size = quick || steady ? 144 * MiB : (128 + 16 * random.below(9)) * MiB;
  return {
    format,
    size,
    maxSize: size + GROWTH,
    queues: steady ? 2 : random.of(1, 2, 3, 4),
    cache: random.of('none', 'none', 'writeback'),
    engine: random.of('auto', 'auto', 'auto', 'aio', 'threads'),
    place: quick || steady ? 'memory' : random.of('memory', 'disk', 'small', 'small'),
    kinds: steady ? ['host'] : ['serve', 'host', 'host', 'c'],
    ...(format !== 'raw' && {
      cluster: steady ? '64K' : random.of('64K', '64K', '4K', '16K', '512K', '2M'),
    }),
    ...(sealed && {
      suite: random.of('aes-256-gcm', 'aes-256-gcm', 'chacha20-poly1305'),
      log: random.of('1M', '4M', '16M'),
      nonVolatile: random.chance(0.4),
    }),
    ...(format === 'qcow2' && { extendedL2: random.chance(0.3) }),
    crowded: random.chance(0.5), // the small file system: hardly any space, all the time
    packed: random.chance(0.5),
    indirect: random.chance(0.5),
  };
}
