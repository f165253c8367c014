/* A program that knows libpqblk by its header alone and loads it at run time.
 *
 *   host LIBRARY DISK          opens a sealed disk with the keys that stdin brings, writes, reads back
 *   host --hold LIBRARY DISK   opens a raw disk and keeps it open
 */
#include <dlfcn.h>
#include <pqblk.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void *library;

#define LOAD(name) __typeof__(name) *p_##name = (__typeof__(name) *)dlsym(library, #name)

static int failed(int kind, const pqblk_error *error) {
  if (kind != PQBLK_OK) fprintf(stderr, "host: %d: %s\n", kind, error->message);
  return kind != PQBLK_OK;
}

static int hold(const char *path) {
  LOAD(pqblk_open);
  pqblk_error error = PQBLK_ERROR_INIT;
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  pqblk_disk *disk;
  options.format = PQBLK_RAW;
  options.path = path;
  if (failed(p_pqblk_open(&options, &disk, &error), &error)) return 1;
  puts("held");
  fflush(stdout);
  sleep(60);
  return 0;
}

static int use(const char *path) {
  LOAD(pqblk_abi_version);
  LOAD(pqblk_keys_from_fd);
  LOAD(pqblk_keys_free);
  LOAD(pqblk_open);
  LOAD(pqblk_pwrite);
  LOAD(pqblk_flush);
  LOAD(pqblk_pread);
  LOAD(pqblk_close);
  pqblk_error error = PQBLK_ERROR_INIT;
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  pqblk_keys *keys;
  pqblk_disk *disk;
  char out[512], in[512];
  if (p_pqblk_abi_version() != PQBLK_ABI_VERSION) return 1;
  if (failed(p_pqblk_keys_from_fd(STDIN_FILENO, &keys, &error), &error)) return 1;
  options.format = PQBLK_SEALED;
  options.path = path;
  options.keys = keys;
  if (failed(p_pqblk_open(&options, &disk, &error), &error)) return 1;
  p_pqblk_keys_free(keys);
  memset(out, 0x5a, sizeof out);
  if (failed(p_pqblk_pwrite(disk, out, sizeof out, 0, 0, &error), &error)) return 1;
  if (failed(p_pqblk_flush(disk, &error), &error)) return 1;
  if (failed(p_pqblk_pread(disk, in, sizeof in, 0, &error), &error)) return 1;
  if (memcmp(in, out, sizeof in) != 0) return 1;
  return failed(p_pqblk_close(disk, &error), &error);
}

int main(int argc, char **argv) {
  int holds = argc == 4 && strcmp(argv[1], "--hold") == 0;
  if (!holds && argc != 3) return 2;
  library = dlopen(argv[argc - 2], RTLD_NOW | RTLD_GLOBAL);
  if (library == NULL) {
    fprintf(stderr, "host: %s\n", dlerror());
    return 1;
  }
  int result = holds ? hold(argv[3]) : use(argv[2]);
  dlclose(library);
  return result;
}
