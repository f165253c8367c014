#include "node/sandbox.h"

#include <seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <cerrno>
#include <memory>
#include <string>

#include "base/error.h"
#include "crypto/secret_memory.h"

namespace pqblk::node {
namespace {

// What serving never needs. A list of what is allowed would be shorter in effect and longer in
// trouble: Node, OpenSSL and glibc choose their calls by version and CPU. What a name does not
// mean on this machine is left out.
constexpr const char* kRefused[] = {
    // other programs, other processes
    "execve", "execveat", "uselib", "ptrace", "process_vm_readv", "process_vm_writev",
    "process_madvise", "pidfd_getfd", "kcmp", "perf_event_open", "userfaultfd", "personality",
    // other identities, other places
    "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid",
    "setgroups", "capset", "setns", "unshare", "chroot", "pivot_root", "open_by_handle_at",
    "name_to_handle_at", "mknod", "mknodat", "add_key", "keyctl", "request_key",
    // file systems
    "mount", "umount", "umount2", "mount_setattr", "move_mount", "open_tree", "fsopen", "fsconfig",
    "fsmount", "fspick", "quotactl", "quotactl_fd", "swapon", "swapoff", "acct",
    // the kernel and its clocks
    "bpf", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module",
    "create_module", "reboot", "syslog", "settimeofday", "clock_settime", "clock_adjtime",
    "adjtimex", "stime", "sethostname", "setdomainname", "iopl", "ioperm", "modify_ldt", "vm86",
    "vm86old", "vhangup", "lookup_dcookie", "nfsservctl", "_sysctl"};

Error refuse_calls() {
  const std::unique_ptr<void, void (*)(scmp_filter_ctx)> filter(seccomp_init(SCMP_ACT_ALLOW),
                                                                seccomp_release);
  if (filter == nullptr) return Error::from_errno(ENOMEM, "system call filter");
  // Threads that run already get it as well, or none does.
  int result = seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_TSYNC, 1);
  for (const char* name : kRefused) {
    const int number = seccomp_syscall_resolve_name(name);
    if (result != 0 || number < 0) continue;
    result = seccomp_rule_add(filter.get(), SCMP_ACT_ERRNO(EPERM), number, 0);
  }
  if (result == 0) result = seccomp_load(filter.get());
  return result == 0 ? Error() : Error::from_errno(-result, "system call filter");
}

}  // namespace

Napi::Value no_new_privileges(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
}

Napi::Value no_core_dumps(const Napi::CallbackInfo& info) {
  const rlimit none{0, 0};
  const bool ok = ::setrlimit(RLIMIT_CORE, &none) == 0 && ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0;
  return Napi::Boolean::New(info.Env(), ok);
}

Napi::Value no_core_files(const Napi::CallbackInfo& info) {
  // One byte, and not none: only this limit holds where dumps go to a program (core(5)).
  const rlimit one{1, 1};
  const bool ok = ::setrlimit(RLIMIT_CORE, &one) == 0;
  rlimit now{};
  const bool less = ::getrlimit(RLIMIT_CORE, &now) == 0 && now.rlim_max <= one.rlim_max;
  return Napi::Boolean::New(info.Env(), ok || less);
}

Napi::Value keys_are_locked(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), crypto::secret_memory_locked());
}

Napi::Value refuse_system_calls(const Napi::CallbackInfo& info) {
  const Error error = refuse_calls();
  if (!error) return info.Env().Undefined();
  return Napi::String::New(info.Env(), error.to_string());
}

}  // namespace pqblk::node
