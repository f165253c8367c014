/* libpqblk: virtual disks (raw, QCOW2, sealed QCOW2) for programs in C.
 *
 * Plain C11. docs/c-library.md has the whole story: linking, threads, keys, what stays stable.
 *
 * Units      Sizes, offsets and lengths are bytes, of any alignment. Multiples of 4096, in memory
 *            that is aligned to 4096, are never copied through buffers of the library.
 * Structs    The first member of every struct is its size, set by the caller (the PQBLK_*_INIT
 *            macros do it and leave all else zero, which means: the default). The library takes
 *            members that an older caller does not have as zero, refuses members that it does not
 *            know unless they are zero, and writes no byte beyond the size. In an array all
 *            elements have the size of the first one.
 * Errors     Functions that can fail return PQBLK_OK or another kind, and fill `error` when it is
 *            not null. Where the result is a count, a failure is minus its kind. There is no global
 *            state, and the library never prints.
 * Threads    A disk may be used by any number of threads at once. A queue may be used by one thread
 *            at a time, whichever; several queues may share an engine queue of the disk. The
 *            library's own threads block all signals, and never call back but for the backing gate.
 * Processes  A disk does not survive fork(): open it in the process that uses it. The same is true
 *            of keys, which a forked child finds wiped.
 * Strings    UTF-8, terminated; the library keeps no pointer to what it was given unless it says
 * so.
 */
#ifndef PQBLK_H
#define PQBLK_H

#include <stdint.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows with an incompatible change, as does the number in the name libpqblk.so.1. */
#define PQBLK_ABI_VERSION 1

#if defined(__GNUC__)
#define PQBLK_API __attribute__((visibility("default")))
#else
#define PQBLK_API
#endif

typedef struct pqblk_disk pqblk_disk;   /* an open disk */
typedef struct pqblk_queue pqblk_queue; /* requests on their way, and completions to fetch */
typedef struct pqblk_keys pqblk_keys;   /* the secrets of one volume, in memory that is wiped */

/* PQBLK_ABI_VERSION of the library that runs, and its version as text, "0.1.0". */
PQBLK_API uint32_t pqblk_abi_version(void);
PQBLK_API const char* pqblk_version(void);

/* ---- errors ---------------------------------------------------------------------------------- */

enum pqblk_kind {
  PQBLK_OK = 0,
  PQBLK_IO_ERROR,         /* the device or file system failed a request */
  PQBLK_NO_SPACE,         /* ENOSPC or a quota */
  PQBLK_CORRUPT,          /* an image, or a key bundle, contradicts itself or its specification */
  PQBLK_INTEGRITY,        /* a tag or MAC does not hold: somebody changed a sealed disk */
  PQBLK_WRONG_KEY,        /* keys do not belong to this image */
  PQBLK_LOCKED,           /* another process has the image */
  PQBLK_READ_ONLY,        /* a write to something opened or stored read-only */
  PQBLK_UNSUPPORTED,      /* a feature this library does not have; the message names it */
  PQBLK_INVALID_ARGUMENT, /* the caller broke the contract */
  PQBLK_OUT_OF_RANGE,     /* beyond the end of the disk */
  PQBLK_NOT_FOUND,        /* no such file, queue or agent */
  PQBLK_EXISTS,           /* would overwrite something */
  PQBLK_PERMISSION,       /* EACCES, EPERM; an agent that refuses */
  PQBLK_CLOSED,           /* the disk was closed */
  PQBLK_CANCELED,         /* stopped on request */
  PQBLK_NEEDS_RECOVERY,   /* not closed cleanly, and what is needed to recover is missing */
  PQBLK_NO_RANDOM,        /* the random source failed */
  PQBLK_GATE_REFUSED,     /* the image names a backing file that the caller did not allow */
  PQBLK_NO_MEMORY         /* a named bound or the allocator refused */
};

#define PQBLK_NO_OFFSET UINT64_MAX

typedef struct pqblk_error {
  uint32_t size;
  int32_t kind;
  int32_t os_errno; /* what the kernel said; 0 when it was not the cause */
  uint32_t reserved;
  uint64_t offset;   /* in the file concerned, or PQBLK_NO_OFFSET */
  char message[488]; /* one line for people: path: operation at offset: what, never a secret */
} pqblk_error;
#define PQBLK_ERROR_INIT                   \
  {                                        \
    sizeof(pqblk_error), 0, 0, 0, 0, { 0 } \
  }

/* "io_error"; "unknown" for a number that is no kind. Static memory. */
PQBLK_API const char* pqblk_kind_name(int kind);
/* The nearest positive errno value, 0 for PQBLK_OK. */
PQBLK_API int pqblk_kind_errno(int kind);

/* ---- keys ------------------------------------------------------------------------------------ */

typedef struct pqblk_data_key {
  uint32_t size;
  uint32_t epoch; /* from 1 */
  uint8_t key[32];
} pqblk_data_key;

/* Copies the secrets of a volume: its UUID (16 bytes), its integrity key (32 bytes) and the data
 * keys of 1 to 64 epochs, each once, `current_epoch` among them. The caller may wipe his at once.
 * Kinds: invalid_argument, no_memory. */
PQBLK_API int pqblk_keys_new(const uint8_t* volume_uuid, const uint8_t* integrity_key,
                             const pqblk_data_key* data_keys, uint32_t count,
                             uint32_t current_epoch, pqblk_keys** keys, pqblk_error* error);

/* Reads a key bundle (docs/handing-keys.md), as `pqblk unlock DISK --fd N` writes it, from a pipe,
 * socket or file; blocks until it is there and reads no byte beyond it. The descriptor stays the
 * caller's. Kinds: corrupt, unsupported, io_error. */
PQBLK_API int pqblk_keys_from_fd(int fd, pqblk_keys** keys, pqblk_error* error);

/* Asks the `pqblk agent` on this Unix socket for the keys of the sealed disk at `disk` (a path).
 * Waits for its answer, at most 10 seconds. Kinds: not_found (nobody listens, no such disk),
 * permission (the agent runs as somebody else, or refuses), wrong_key (it has another disk's keys),
 * corrupt, and those of pqblk_inspect. */
PQBLK_API int pqblk_keys_from_agent(const char* socket, const char* disk, pqblk_keys** keys,
                                    pqblk_error* error);

/* Wipes the keys. Null is fine. */
PQBLK_API void pqblk_keys_free(pqblk_keys* keys);

/* ---- opening --------------------------------------------------------------------------------- */

/* Said by whoever opens, and never probed: a guest may write into its raw disk what it likes. */
enum pqblk_format { PQBLK_RAW = 1, PQBLK_QCOW2 = 2, PQBLK_SEALED = 3 };

/* As QEMU means them: none is O_DIRECT, unsafe does not pass flushes on. */
enum pqblk_cache {
  PQBLK_CACHE_NONE = 0,
  PQBLK_CACHE_WRITEBACK = 1,
  PQBLK_CACHE_WRITETHROUGH = 2,
  PQBLK_CACHE_UNSAFE = 3
};

enum pqblk_engine {
  PQBLK_ENGINE_AUTO = 0, /* io_uring where the kernel allows it, else threads */
  PQBLK_ENGINE_IO_URING = 1,
  PQBLK_ENGINE_AIO = 2,
  PQBLK_ENGINE_THREADS = 3
};

enum pqblk_open_flags {
  PQBLK_OPEN_READ_ONLY = 1,
  PQBLK_OPEN_DIRECT_REQUIRED = 2,         /* cache none: refuse instead of going buffered */
  PQBLK_OPEN_SQPOLL = 4,                  /* io_uring: a kernel thread submits */
  PQBLK_OPEN_UNAUTHENTICATED_BACKING = 8, /* sealed: trust a backing file that has no keys */
  PQBLK_OPEN_ASSUME_NON_VOLATILE =
      16,                          /* the operator's word: completed writes survive power loss */
  PQBLK_OPEN_ASSUME_VOLATILE = 32, /* the operator's word: they do not, until flushed */
  PQBLK_OPEN_TO_RESIZE = 64 /* sealed: also a disk with data beyond its size, whose header is of
                               before it was grown; it takes no write before pqblk_resize */
};

/* Whether the image may name `path`, absolute, as its backing file; 0 refuses. Called from
 * pqblk_open only, on a thread of the library. */
typedef int (*pqblk_backing_gate)(void* context, const char* path);

typedef struct pqblk_open_options {
  uint32_t size;
  uint32_t format; /* enum pqblk_format; must be said */
  const char* path;
  /* What follows may be left zero. */
  uint32_t flags;          /* enum pqblk_open_flags */
  uint32_t cache;          /* enum pqblk_cache */
  uint32_t engine;         /* enum pqblk_engine */
  uint32_t queues;         /* engine queues, each a thread and a ring: 1 to 64; 0: 1 */
  uint32_t ring_depth;     /* operations in one ring at once; 0: 256 */
  uint32_t spin_us;        /* an idle queue polls so long before it sleeps; 0: not at all */
  uint32_t backing_format; /* PQBLK_RAW or PQBLK_QCOW2, for an image that does not say; 0: refuse */
  uint32_t reserved;
  uint64_t l2_cache_bytes;    /* bounds of caches, at most 64 GiB each; 0: 32 MiB */
  uint64_t entry_cache_bytes; /* sealed; 0: 64 MiB */
  uint64_t pending_bytes;     /* sealed: ciphertext kept until it is written home; 0: 28 MiB */
  const pqblk_keys* keys;     /* sealed, required; copied, stays the caller's */
  pqblk_backing_gate gate;    /* null: the image may not name a backing file */
  void* gate_context;
} pqblk_open_options;
#define PQBLK_OPEN_OPTIONS_INIT \
  { sizeof(pqblk_open_options), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* Opens a disk, and recovers one that was not closed cleanly (a sealed one then takes a moment).
 * Blocks. One writer or any number of readers may have an image open. On failure `*disk` is null.
 * Kinds: not_found, permission, locked (the message names the holder), wrong_key, integrity,
 * corrupt, unsupported, needs_recovery, gate_refused, read_only, invalid_argument, io_error. */
PQBLK_API int pqblk_open(const pqblk_open_options* options, pqblk_disk** disk, pqblk_error* error);

/* Waits for what is in flight, flushes, closes the image cleanly and frees the disk, also when it
 * fails. No other call with this disk may run or follow. Its queues stay: their completions can be
 * fetched, further requests complete with kind closed, and each is still to be freed. Null is fine.
 * Blocks. Kinds: those of writing; what was not flushed before may then be lost. */
PQBLK_API int pqblk_close(pqblk_disk* disk, pqblk_error* error);

/* ---- facts ----------------------------------------------------------------------------------- */

enum pqblk_fact_flags {
  PQBLK_FACT_READ_ONLY = 1,
  PQBLK_FACT_DIRECT = 2 /* O_DIRECT is in use */
};

typedef struct pqblk_facts {
  uint32_t size;
  uint32_t format; /* enum pqblk_format */
  uint64_t disk_bytes;
  uint32_t cluster_bytes; /* 0: raw */
  uint32_t queues;
  uint32_t flags;           /* enum pqblk_fact_flags */
  uint32_t session_id;      /* sealed: of this opener, once it has written; 0: none */
  char id[24];              /* the serial number that guests see, at most 20 characters */
  char engine[16];          /* what runs: "io_uring", "aio", "threads" */
  char suite[32];           /* sealed: "AES-256-GCM", "ChaCha20-Poly1305" */
  char aead[32];            /* sealed: the implementation that runs it */
  char durability[64];      /* what a completed write is worth here, in words */
  char fallback_cause[128]; /* why the engine is not io_uring */
} pqblk_facts;
#define PQBLK_FACTS_INIT                                                  \
  {                                                                       \
    sizeof(pqblk_facts), 0, 0, 0, 0, 0, 0, {0}, {0}, {0}, {0}, {0}, { 0 } \
  }

/* Texts that do not fit are cut. Kinds: invalid_argument. */
PQBLK_API int pqblk_get_facts(pqblk_disk* disk, pqblk_facts* facts, pqblk_error* error);

/* The size of the disk now. */
PQBLK_API uint64_t pqblk_size(pqblk_disk* disk);

/* Counters since the disk was opened. */
typedef struct pqblk_stats {
  uint32_t size;
  uint32_t reserved;
  uint64_t metadata_reads, metadata_writes;
  uint64_t l2_hits, l2_misses;       /* qcow2, sealed: the cache of mappings */
  uint64_t entry_hits, entry_misses; /* sealed: the cache of sector entries */
  uint64_t log_bytes;                /* sealed: written to the log */
  uint64_t log_capacity, log_used;   /* sealed: bytes, now */
  uint64_t checkpoints;              /* sealed: times the log was written home */
  uint64_t integrity_failures;       /* sealed: sectors whose tag did not hold */
  uint64_t sectors_sealed, sectors_opened;
} pqblk_stats;
#define PQBLK_STATS_INIT \
  { sizeof(pqblk_stats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

typedef struct pqblk_queue_stats {
  uint32_t size;
  uint32_t reserved;
  uint64_t reads, writes, flushes, discards, zeroes; /* that succeeded */
  uint64_t errors;
  uint64_t read_bytes, written_bytes;
  uint64_t in_flight; /* now */
} pqblk_queue_stats;
#define PQBLK_QUEUE_STATS_INIT \
  { sizeof(pqblk_queue_stats), 0, 0, 0, 0, 0, 0, 0, 0, 0 }

PQBLK_API int pqblk_get_stats(pqblk_disk* disk, pqblk_stats* stats, pqblk_error* error);
/* Of one engine queue. Kinds: not_found, invalid_argument. */
PQBLK_API int pqblk_get_queue_stats(pqblk_disk* disk, uint32_t queue, pqblk_queue_stats* stats,
                                    pqblk_error* error);

/* What an image's file says of itself; nothing is opened, locked or authenticated. */
enum pqblk_image_flags {
  PQBLK_IMAGE_IN_USE = 1, /* somebody has it open for writing */
  PQBLK_IMAGE_CLEAN = 2,  /* sealed: closed cleanly */
  PQBLK_IMAGE_BACKED = 4  /* it names a backing file */
};

typedef struct pqblk_image_info {
  uint32_t size;
  uint32_t format;
  uint64_t disk_bytes, file_bytes, allocated_bytes;
  uint32_t cluster_bytes;
  uint32_t flags;          /* enum pqblk_image_flags */
  int64_t holder_pid;      /* in use: by whom; 0: unknown */
  uint8_t volume_uuid[16]; /* sealed */
} pqblk_image_info;
#define PQBLK_IMAGE_INFO_INIT                            \
  {                                                      \
    sizeof(pqblk_image_info), 0, 0, 0, 0, 0, 0, 0, { 0 } \
  }

/* Blocks. Kinds: not_found, permission, corrupt, unsupported, io_error, invalid_argument. */
PQBLK_API int pqblk_inspect(const char* path, uint32_t format, pqblk_image_info* info,
                            pqblk_error* error);

/* ---- changing and mapping -------------------------------------------------------------------- */

/* Grows the disk to `bytes`, a multiple of 512. Requests wait meanwhile. Blocks. */
PQBLK_API int pqblk_resize(pqblk_disk* disk, uint64_t bytes, pqblk_error* error);

enum pqblk_extent_kind {
  PQBLK_EXTENT_DATA = 0,
  PQBLK_EXTENT_ZERO = 1, /* known to read as zeros */
  PQBLK_EXTENT_HOLE = 2  /* nothing is allocated; reads as zeros */
};

typedef struct pqblk_extent {
  uint32_t size;
  uint32_t kind;
  uint64_t offset, length;
} pqblk_extent;
#define PQBLK_EXTENT_INIT \
  { sizeof(pqblk_extent), 0, 0, 0 }

/* What is allocated in [offset, offset + length), in order and without gaps; fills at most `max`
 * extents (the first one's size is that of all) and returns how many, at least 1, or minus a kind.
 * The last one may end before the range does. Blocks. */
PQBLK_API int pqblk_get_extents(pqblk_disk* disk, uint64_t offset, uint64_t length,
                                pqblk_extent* extents, uint32_t max, pqblk_error* error);

/* ---- requests, one at a time ------------------------------------------------------------------
 */

enum pqblk_request_flags {
  PQBLK_FUA = 1,  /* write, write_zeroes: durable on completion */
  PQBLK_UNMAP = 2 /* write_zeroes: give the space back */
};

/* All of it or a failure; blocking, from any thread but the library's. Kinds: out_of_range,
 * integrity, io_error, no_space, read_only, invalid_argument. */
PQBLK_API int pqblk_pread(pqblk_disk* disk, void* data, uint64_t length, uint64_t offset,
                          pqblk_error* error);
PQBLK_API int pqblk_pwrite(pqblk_disk* disk, const void* data, uint64_t length, uint64_t offset,
                           uint32_t flags, pqblk_error* error);
/* On return everything that completed before the call survives power loss. */
PQBLK_API int pqblk_flush(pqblk_disk* disk, pqblk_error* error);
/* Advice that a range is no longer needed: whole blocks inside it may read as zeros. */
PQBLK_API int pqblk_discard(pqblk_disk* disk, uint64_t offset, uint64_t length, pqblk_error* error);
PQBLK_API int pqblk_write_zeroes(pqblk_disk* disk, uint64_t offset, uint64_t length, uint32_t flags,
                                 pqblk_error* error);

/* ---- requests in queues ------------------------------------------------------------------------
 */

/* The numbers are virtio-blk's. */
enum pqblk_request_type {
  PQBLK_READ = 0,
  PQBLK_WRITE = 1,
  PQBLK_FLUSH = 4,
  PQBLK_DISCARD = 11,
  PQBLK_WRITE_ZEROES = 13
};

typedef struct pqblk_request {
  uint32_t size;
  uint32_t type;           /* enum pqblk_request_type */
  uint32_t flags;          /* enum pqblk_request_flags */
  uint32_t iov_count;      /* read, write: at most 1024 */
  const struct iovec* iov; /* copied; the memory it names is the library's until completion */
  uint64_t offset;         /* flush: 0 */
  uint64_t length;         /* discard, write_zeroes; read, write: 0 or the sum of iov; flush: 0 */
  uint64_t cookie;         /* the caller's; comes back with the completion */
  pqblk_error* error;      /* filled by the pqblk_poll that hands out the completion; may be null */
} pqblk_request;
#define PQBLK_REQUEST_INIT \
  { sizeof(pqblk_request), 0, 0, 0, 0, 0, 0, 0, 0 }

typedef struct pqblk_completion {
  uint32_t size;
  int32_t kind; /* enum pqblk_kind */
  uint64_t cookie;
} pqblk_completion;
#define PQBLK_COMPLETION_INIT \
  { sizeof(pqblk_completion), 0, 0 }

/* A queue of up to `depth` requests (1 to 65536), submitted and not yet fetched, on the engine
 * queue `index` (from 0). Requests of a queue run side by side and complete in any order; what must
 * follow another request is submitted after its completion. Kinds: not_found, invalid_argument,
 * no_memory. */
PQBLK_API int pqblk_queue_new(pqblk_disk* disk, uint32_t index, uint32_t depth, pqblk_queue** queue,
                              pqblk_error* error);

/* Waits for its requests in flight, drops completions that nobody fetched, and frees the queue.
 * Null is fine. */
PQBLK_API void pqblk_queue_free(pqblk_queue* queue);

/* Hands over `count` requests, with one wake-up for all. Returns how many were taken, from the
 * first on: fewer when the queue's depth is reached. What is wrong with a request is told by its
 * completion. Does not block. Minus invalid_argument: the first request's size is none. */
PQBLK_API int pqblk_submit(pqblk_queue* queue, const pqblk_request* requests, uint32_t count);

/* Fetches up to `max` completions into an array (the first one's size is that of all) and returns
 * how many; 0 when there are none. Does not block. Minus invalid_argument: that size is none. */
PQBLK_API int pqblk_poll(pqblk_queue* queue, pqblk_completion* completions, uint32_t max);

/* An eventfd that poll(2) reports readable while there may be completions to fetch, for the
 * caller's own event loop; pqblk_poll resets it. It is the queue's: not to be read or closed. */
PQBLK_API int pqblk_queue_fd(pqblk_queue* queue);

#ifdef __cplusplus
}
#endif

#endif
