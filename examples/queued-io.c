/* Writes a pattern all over a disk through one of its queues, reads it back and compares, 32 requests
 * at a time, in an epoll loop of its own.
 *
 *   queued-io FORMAT DISK [AGENT-SOCKET]        FORMAT: 1 raw, 2 qcow2, 3 sealed
 *
 *   cc -o queued-io queued-io.c $(pkg-config --cflags --libs pqblk)
 */
#include <pqblk.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

enum { DEPTH = 32, BLOCK = 65536 };

static unsigned char buffers[DEPTH][BLOCK] __attribute__((aligned(4096)));
static pqblk_error error = PQBLK_ERROR_INIT;

static void check(int kind) {
  if (kind == PQBLK_OK) return;
  fprintf(stderr, "queued-io: %s: %s\n", pqblk_kind_name(kind), error.message);
  exit(1);
}

/* Each request's cookie is its place in `buffers`; a completion makes place for the next request. */
static void transfer(pqblk_queue *queue, int epoll, uint32_t type, uint64_t blocks) {
  pqblk_completion done[DEPTH] = {PQBLK_COMPLETION_INIT};
  uint64_t block_of[DEPTH], next = 0, finished = 0;
  struct epoll_event event;
  int ready[DEPTH], idle = DEPTH;
  for (int i = 0; i < DEPTH; i++) ready[i] = i;
  while (finished < blocks) {
    pqblk_request batch[DEPTH];
    struct iovec memory[DEPTH];
    uint32_t count = 0;
    for (; idle > 0 && next < blocks; count++, next++) {
      int place = ready[--idle];
      block_of[place] = next;
      if (type == PQBLK_WRITE) memset(buffers[place], (int)(next * 37 % 251), BLOCK);
      memory[count] = (struct iovec){buffers[place], BLOCK};
      batch[count] = (pqblk_request){.size = sizeof(pqblk_request), .type = type, .iov_count = 1,
                                     .iov = &memory[count], .offset = next * BLOCK,
                                     .cookie = (uint64_t)place, .error = &error};
    }
    pqblk_submit(queue, batch, count); /* takes all: no more than DEPTH are on their way */
    if (epoll_wait(epoll, &event, 1, -1) < 0) continue;
    int n = pqblk_poll(queue, done, DEPTH);
    for (int i = 0; i < n; i++, finished++) {
      int place = ready[idle++] = (int)done[i].cookie;
      check(done[i].kind);
      unsigned char *data = buffers[place], expected = (unsigned char)(block_of[place] * 37 % 251);
      if (data[0] != expected || memcmp(data, data + 1, BLOCK - 1) != 0) abort();
    }
  }
}

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  options.format = (uint32_t)atoi(argv[1]);
  options.path = argv[2];
  pqblk_keys *keys = NULL;
  if (argc > 3) check(pqblk_keys_from_agent(argv[3], argv[2], &keys, &error));
  options.keys = keys;
  pqblk_disk *disk;
  check(pqblk_open(&options, &disk, &error));
  pqblk_keys_free(keys);
  pqblk_queue *queue;
  check(pqblk_queue_new(disk, 0, DEPTH, &queue, &error));
  int epoll = epoll_create1(EPOLL_CLOEXEC);
  struct epoll_event event = {.events = EPOLLIN};
  if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, pqblk_queue_fd(queue), &event) != 0) abort();
  uint64_t blocks = pqblk_size(disk) / BLOCK;
  transfer(queue, epoll, PQBLK_WRITE, blocks);
  check(pqblk_flush(disk, &error)); /* from here on it survives power loss */
  transfer(queue, epoll, PQBLK_READ, blocks);
  pqblk_queue_free(queue);
  check(pqblk_close(disk, &error));
  printf("%llu blocks written, read and compared\n", (unsigned long long)blocks);
  return 0;
}
