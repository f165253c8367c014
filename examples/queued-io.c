/* Fills a disk with a pattern through one of its queues, 32 requests at a time, and reads it back.
 *   queued-io FORMAT DISK [AGENT-SOCKET]        FORMAT: 1 raw, 2 qcow2, 3 sealed
 *   cc -o queued-io queued-io.c $(pkg-config --cflags --libs pqblk) */
#include <err.h>
#include <poll.h>
#include <pqblk.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 32, BLOCK = 65536 };
static struct slot { _Alignas(4096) unsigned char data[BLOCK]; uint64_t block; } slots[DEPTH];
static pqblk_error error = PQBLK_ERROR_INIT;
static void check(int kind) {
  if (kind != PQBLK_OK) errx(1, "%s: %s", pqblk_kind_name(kind), error.message);
}
static unsigned char pattern(uint64_t block) { return (unsigned char)(block * 37 % 251); }
static void start(pqblk_queue *queue, uint32_t type, struct slot *slot, uint64_t block) {
  slot->block = block;
  if (type == PQBLK_WRITE) memset(slot->data, pattern(block), BLOCK);
  pqblk_request request = {.size = sizeof request, .type = type, .offset = block * BLOCK,
                           .iov = &(struct iovec){slot->data, BLOCK}, .iov_count = 1,
                           .cookie = (uintptr_t)slot, .error = &error};
  pqblk_submit(queue, &request, 1); /* takes it: no more than DEPTH are on their way */
}
static void transfer(pqblk_queue *queue, uint32_t type, uint64_t blocks) {
  pqblk_completion done = PQBLK_COMPLETION_INIT;
  struct pollfd ready = {.fd = pqblk_queue_fd(queue), .events = POLLIN}; /* an eventfd */
  uint64_t next = 0;
  for (; next < DEPTH && next < blocks; next++) start(queue, type, &slots[next], next);
  for (uint64_t finished = 0; finished < blocks; finished++) {
    while (pqblk_poll(queue, &done, 1) == 0) poll(&ready, 1, -1);
    struct slot *slot = (struct slot *)(uintptr_t)done.cookie; /* they complete in any order */
    const unsigned char *data = slot->data;
    check(done.kind);
    if (data[0] != pattern(slot->block) || memcmp(data, data + 1, BLOCK - 1) != 0) abort();
    if (next < blocks) start(queue, type, slot, next++);
  }
}

int main(int argc, char **argv) {
  if (argc < 3) errx(2, "expected FORMAT DISK [AGENT-SOCKET]");
  pqblk_open_options options = {.size = sizeof options, .path = argv[2]};
  options.format = (uint32_t)atoi(argv[1]);
  pqblk_keys *keys = NULL;
  pqblk_disk *disk;
  pqblk_queue *queue;
  if (argc > 3) check(pqblk_keys_from_agent(argv[3], argv[2], &keys, &error));
  options.keys = keys;
  check(pqblk_open(&options, &disk, &error));
  pqblk_keys_free(keys);
  check(pqblk_queue_new(disk, 0, DEPTH, &queue, &error));
  const uint64_t blocks = pqblk_size(disk) / BLOCK;
  transfer(queue, PQBLK_WRITE, blocks);
  check(pqblk_flush(disk, &error)); /* from here on it survives power loss */
  transfer(queue, PQBLK_READ, blocks);
  pqblk_queue_free(queue);
  check(pqblk_close(disk, &error));
  printf("%llu blocks written, read and compared\n", (unsigned long long)blocks);
}
