// Runs a program for which a part of a file cannot be read: `failing-medium FIRST LENGTH PROGRAM...`.
//
// A pread that reaches into those bytes (below 4 GiB) of whatever file ends with EIO, as on a disk with a bad
// block. The kernel's filter for system calls does that, so there is no io_uring, which has its own ways.
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF(test, value, yes, no) BPF_JUMP(BPF_JMP | test | BPF_K, value, yes, no)
#define ANSWER(value) BPF_STMT(BPF_RET | BPF_K, value)

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const uint32_t first = (uint32_t)strtoul(argv[1], NULL, 10);
  const uint32_t end = first + (uint32_t)strtoul(argv[2], NULL, 10);
  struct sock_filter rules[] = {
      LOAD(nr),
      IF(BPF_JEQ, __NR_io_uring_setup, 9, 0),  // no such call
      IF(BPF_JEQ, __NR_pread64, 0, 6),
      LOAD(args[3]),  // the lower half of the offset: the machine is little-endian
      IF(BPF_JGE, end, 4, 0),
      BPF_STMT(BPF_MISC | BPF_TAX, 0),
      LOAD(args[2]),  // and of the count
      BPF_STMT(BPF_ALU | BPF_ADD | BPF_X, 0),
      IF(BPF_JGT, first, 1, 0),
      ANSWER(SECCOMP_RET_ALLOW),
      ANSWER(SECCOMP_RET_ERRNO | EIO),
      ANSWER(SECCOMP_RET_ERRNO | ENOSYS),
  };
  const struct sock_fprog program = {sizeof rules / sizeof rules[0], rules};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return 3;
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) return 3;
  execvp(argv[3], argv + 3);
  return 4;
}
