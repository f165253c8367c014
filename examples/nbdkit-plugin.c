/* An nbdkit plugin: a pqblk disk behind nbdkit's TLS, filters and policies.
 *
 *   nbdkit ./nbdkit-pqblk-plugin.so disk=vm.sealed keys-agent=/run/user/1000/vm.keys
 *   nbdkit ./nbdkit-pqblk-plugin.so disk=vm.qcow2 format=qcow2
 *
 * A format is said and never probed; without one a disk is sealed. Built by CMakeLists.txt here, or:
 *
 *   cc -shared -fPIC -o nbdkit-pqblk-plugin.so nbdkit-plugin.c \
 *      $(pkg-config --cflags nbdkit) $(pkg-config --cflags --libs pqblk)
 */
#define NBDKIT_API_VERSION 2
#include <errno.h>
#include <fcntl.h>
#include <nbdkit-plugin.h>
#include <pqblk.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static struct {
  char *disk, *keys_agent, *keys_file;
  uint32_t format, cache, queues;
  int keys_fd, read_only;
} config = {.format = PQBLK_SEALED, .queues = 2, .keys_fd = -1};

static pqblk_disk *disk;

/* Tells nbdkit what went wrong; 0 or -1, as its callbacks return. */
static int result(int kind, const pqblk_error *error) {
  if (kind == PQBLK_OK) return 0;
  nbdkit_error("%s: %s", pqblk_kind_name(kind), error->message);
  nbdkit_set_error(kind == PQBLK_OUT_OF_RANGE ? EINVAL : pqblk_kind_errno(kind));
  return -1;
}

/* ---- configuration ---- */

struct choice {
  const char *name;
  uint32_t value;
};

static const struct choice formats[] = {
    {"raw", PQBLK_RAW}, {"qcow2", PQBLK_QCOW2}, {"sealed", PQBLK_SEALED}, {NULL, 0}};
static const struct choice caches[] = {{"none", PQBLK_CACHE_NONE},
                                       {"writeback", PQBLK_CACHE_WRITEBACK},
                                       {"writethrough", PQBLK_CACHE_WRITETHROUGH},
                                       {"unsafe", PQBLK_CACHE_UNSAFE},
                                       {NULL, 0}};

static int choose(const char *key, const char *value, const struct choice *choices, uint32_t *out) {
  for (; choices->name != NULL; choices++) {
    if (strcmp(choices->name, value) == 0) {
      *out = choices->value;
      return 0;
    }
  }
  nbdkit_error("%s: '%s' is none of its values", key, value);
  return -1;
}

static int set_path(char **out, const char *value) {
  free(*out);
  *out = nbdkit_absolute_path(value); /* nbdkit may change its directory later */
  return *out == NULL ? -1 : 0;
}

static int plugin_config(const char *key, const char *value) {
  if (strcmp(key, "disk") == 0) return set_path(&config.disk, value);
  if (strcmp(key, "format") == 0) return choose(key, value, formats, &config.format);
  if (strcmp(key, "cache") == 0) return choose(key, value, caches, &config.cache);
  if (strcmp(key, "queues") == 0) return nbdkit_parse_uint32_t(key, value, &config.queues);
  if (strcmp(key, "keys-agent") == 0) return set_path(&config.keys_agent, value);
  if (strcmp(key, "keys-file") == 0) return set_path(&config.keys_file, value);
  if (strcmp(key, "keys-fd") == 0) return nbdkit_parse_int(key, value, &config.keys_fd);
  if (strcmp(key, "read-only") == 0) {
    config.read_only = nbdkit_parse_bool(value);
    return config.read_only < 0 ? -1 : 0;
  }
  nbdkit_error("unknown parameter '%s'", key);
  return -1;
}

static int plugin_config_complete(void) {
  int sources = (config.keys_agent != NULL) + (config.keys_file != NULL) + (config.keys_fd >= 0);
  if (config.disk == NULL) {
    nbdkit_error("say disk=PATH");
    return -1;
  }
  if (config.format == PQBLK_SEALED ? sources != 1 : sources != 0) {
    nbdkit_error("a sealed disk, and no other, has one of keys-agent=, keys-fd= and keys-file=");
    return -1;
  }
  return 0;
}

#define plugin_config_help                                              \
  "disk=PATH         (required) The image.\n"                                 \
  "format=FORMAT     raw, qcow2 or sealed (the default); never probed.\n"     \
  "keys-agent=SOCKET Ask this `pqblk agent` for the keys.\n"                  \
  "keys-fd=N         Read them from a descriptor: `pqblk unlock DISK --fd`.\n" \
  "keys-file=PATH    Read them from a pipe or file.\n"                        \
  "cache=MODE        none (the default), writeback, writethrough, unsafe.\n"  \
  "queues=N          Engine queues, 1 to 64 (default 2).\n"                   \
  "read-only=true    Open the image read-only."

/* ---- opening: after nbdkit forked, because neither threads nor keys survive that ---- */

static int get_keys(pqblk_keys **keys) {
  pqblk_error error = PQBLK_ERROR_INIT;
  if (config.keys_agent != NULL) {
    return result(pqblk_keys_from_agent(config.keys_agent, config.disk, keys, &error), &error);
  }
  int fd = config.keys_fd;
  if (config.keys_file != NULL) fd = open(config.keys_file, O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    nbdkit_error("%s: %m", config.keys_file);
    return -1;
  }
  int r = result(pqblk_keys_from_fd(fd, keys, &error), &error);
  close(fd);
  return r;
}

static int plugin_after_fork(void) {
  pqblk_error error = PQBLK_ERROR_INIT;
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  pqblk_keys *keys = NULL;
  if (config.format == PQBLK_SEALED && get_keys(&keys) < 0) return -1;
  options.path = config.disk;
  options.format = config.format;
  options.cache = config.cache;
  options.queues = config.queues;
  options.flags = config.read_only ? PQBLK_OPEN_READ_ONLY : 0;
  options.keys = keys;
  int kind = pqblk_open(&options, &disk, &error);
  pqblk_keys_free(keys);
  return result(kind, &error);
}

static void plugin_cleanup(void) {
  pqblk_error error = PQBLK_ERROR_INIT;
  result(pqblk_close(disk, &error), &error);
  disk = NULL;
}

static void plugin_unload(void) {
  free(config.disk);
  free(config.keys_agent);
  free(config.keys_file);
}

/* ---- connections ---- */

static void *plugin_open(int readonly) {
  (void)readonly;
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t plugin_get_size(void *handle) {
  (void)handle;
  return (int64_t)pqblk_size(disk);
}

static int plugin_can_write(void *handle) {
  (void)handle;
  return !config.read_only;
}

/* All connections use the one disk: what one of them flushed is flushed for all. */
static int plugin_yes(void *handle) {
  (void)handle;
  return 1;
}

static int plugin_can_fua(void *handle) {
  (void)handle;
  return NBDKIT_FUA_NATIVE;
}

static int plugin_block_size(void *handle, uint32_t *minimum, uint32_t *preferred,
                                   uint32_t *maximum) {
  (void)handle;
  *minimum = 1;
  *preferred = 4096;
  *maximum = 32 * 1024 * 1024;
  return 0;
}

/* ---- requests ---- */

static int plugin_pread(void *handle, void *data, uint32_t count, uint64_t offset,
                              uint32_t flags) {
  pqblk_error error = PQBLK_ERROR_INIT;
  (void)handle, (void)flags;
  return result(pqblk_pread(disk, data, count, offset, &error), &error);
}

static uint32_t fua_of(uint32_t flags) { return flags & NBDKIT_FLAG_FUA ? PQBLK_FUA : 0; }

static int plugin_pwrite(void *handle, const void *data, uint32_t count, uint64_t offset,
                               uint32_t flags) {
  pqblk_error error = PQBLK_ERROR_INIT;
  (void)handle;
  return result(pqblk_pwrite(disk, data, count, offset, fua_of(flags), &error), &error);
}

static int plugin_flush(void *handle, uint32_t flags) {
  pqblk_error error = PQBLK_ERROR_INIT;
  (void)handle, (void)flags;
  return result(pqblk_flush(disk, &error), &error);
}

static int plugin_trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags) {
  pqblk_error error = PQBLK_ERROR_INIT;
  int kind = pqblk_discard(disk, offset, count, &error);
  if (kind == PQBLK_OK && fua_of(flags)) return plugin_flush(handle, 0);
  return result(kind, &error);
}

static int plugin_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags) {
  pqblk_error error = PQBLK_ERROR_INIT;
  uint32_t how = fua_of(flags) | (flags & NBDKIT_FLAG_MAY_TRIM ? PQBLK_UNMAP : 0);
  (void)handle;
  return result(pqblk_write_zeroes(disk, offset, count, how, &error), &error);
}

static int plugin_extents(void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                                struct nbdkit_extents *extents) {
  static const uint32_t types[] = {[PQBLK_EXTENT_DATA] = 0,
                                   [PQBLK_EXTENT_ZERO] = NBDKIT_EXTENT_ZERO,
                                   [PQBLK_EXTENT_HOLE] = NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO};
  pqblk_error error = PQBLK_ERROR_INIT;
  uint64_t done = 0;
  (void)handle;
  while (done < count) {
    pqblk_extent found[64] = {PQBLK_EXTENT_INIT};
    uint32_t max = flags & NBDKIT_FLAG_REQ_ONE ? 1 : 64;
    int n = pqblk_get_extents(disk, offset + done, count - done, found, max, &error);
    if (n < 0) return result(-n, &error);
    for (int i = 0; i < n; i++) {
      uint32_t type = types[found[i].kind];
      if (nbdkit_add_extent(extents, found[i].offset, found[i].length, type) < 0) return -1;
      done += found[i].length;
    }
    if (flags & NBDKIT_FLAG_REQ_ONE) break;
  }
  return 0;
}

static struct nbdkit_plugin plugin = {
    .name = "pqblk",
    .longname = "pqblk: raw, QCOW2 and sealed QCOW2 disks",
    .version = "1",
    .magic_config_key = "disk",
    .unload = plugin_unload,
    .config = plugin_config,
    .config_complete = plugin_config_complete,
    .config_help = plugin_config_help,
    .after_fork = plugin_after_fork,
    .cleanup = plugin_cleanup,
    .open = plugin_open,
    .get_size = plugin_get_size,
    .block_size = plugin_block_size,
    .can_write = plugin_can_write,
    .can_flush = plugin_yes,
    .can_trim = plugin_yes,
    .can_zero = plugin_yes,
    .can_extents = plugin_yes,
    .can_multi_conn = plugin_yes,
    .can_fua = plugin_can_fua,
    .pread = plugin_pread,
    .pwrite = plugin_pwrite,
    .flush = plugin_flush,
    .trim = plugin_trim,
    .zero = plugin_zero,
    .extents = plugin_extents,
};

NBDKIT_REGISTER_PLUGIN(plugin)
