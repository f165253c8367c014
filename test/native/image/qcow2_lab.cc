#include "image/qcow2_lab.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "base/aligned.h"
#include "storage/file.h"

namespace pqblk::image::test {
namespace {

[[noreturn]] void give_up(const std::string& why) {
  std::fprintf(stderr, "qcow2 lab: %s\n", why.c_str());
  std::abort();
}

}  // namespace

Shell run_command(const std::string& command) {
  Shell result;
  std::FILE* pipe = ::popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) give_up("popen");
  std::array<char, 4096> buffer;
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe)) {
    result.output.append(buffer.data(), n);
  }
  const int status = ::pclose(pipe);
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return result;
}

Lab::Lab(io::EngineType engine) {
  std::string pattern = io::test::scratch_directory() + "/pqblk-qcow2-XXXXXX";
  if (::mkdtemp(pattern.data()) == nullptr) give_up("mkdtemp");
  directory_ = pattern;
  Result<std::unique_ptr<io::QueueThread>> started = io::QueueThread::start({.engine = engine});
  if (!started) give_up(started.error().to_string());
  thread_ = std::move(*started);
  context_ = std::make_unique<QueueContext>(thread_->queue(), 0);
}

Lab::~Lab() {
  backend_.reset();
  storage::close_file(file_);
  thread_->stop();
  std::filesystem::remove_all(directory_);
}

Bytes Lab::load(const std::string& name) const {
  std::FILE* in = std::fopen(path(name).c_str(), "rb");
  if (in == nullptr) give_up("open " + name);
  Bytes bytes(std::filesystem::file_size(path(name)));
  if (std::fread(bytes.data(), 1, bytes.size(), in) != bytes.size()) give_up("read " + name);
  std::fclose(in);
  return bytes;
}

void Lab::save(const std::string& name, const Bytes& bytes) const {
  std::FILE* out = std::fopen(path(name).c_str(), "wb");
  // An empty vector's data() may be null, which fwrite must not be given.
  const std::size_t size = bytes.size();
  if (out == nullptr || (size > 0 && std::fwrite(bytes.data(), 1, size, out) != size) ||
      std::fclose(out) != 0) {
    give_up("write " + name);
  }
}

std::string Lab::qemu_img(const std::string& args) const {
  const Shell shell = run_command("cd " + directory_ + " && qemu-img " + args);
  if (shell.code != 0) give_up("qemu-img " + args + ": " + shell.output);
  return shell.output;
}

Bytes Lab::qemu_read(const std::string& name, const std::string& snapshot) const {
  const std::string select = snapshot.empty() ? "" : "-l snapshot.name=" + snapshot + " ";
  qemu_img("convert " + select + "-f qcow2 -O raw " + name + " out.raw");
  Bytes bytes = load("out.raw");
  std::filesystem::remove(path("out.raw"));
  return bytes;
}

std::string Lab::qemu_check(const std::string& name) const {
  const Shell shell = run_command("cd " + directory_ + " && qemu-img check -f qcow2 " + name);
  return shell.code == 0 ? "" : shell.output;
}

Error Lab::create(const std::string& name, const qcow2::CreateOptions& options) {
  Result<io::File> file = storage::open_file(path(name), {.create = true});
  if (!file) return file.take_error();
  Error error = run([&] { return qcow2::create(thread_->queue(), *file, options); });
  storage::close_file(*file);
  return error;
}

Error Lab::open(const std::string& name, bool read_only, const std::string& backing_format,
                bool direct, std::uint64_t l2_cache) {
  storage::OpenOptions how;
  how.read_only = read_only;
  how.direct = direct ? storage::Direct::required : storage::Direct::off;
  how.lock = read_only ? storage::Lock::shared : storage::Lock::exclusive;
  Result<io::File> file = storage::open_file(path(name), how);
  if (!file) return file.take_error();
  file_ = std::move(*file);
  Result<std::unique_ptr<Backend>> opened = run([&] {
    Qcow2Options options;
    options.read_only = read_only;
    options.l2_cache = l2_cache;
    options.backing.format = backing_format;
    options.backing.gate = [this](const std::string& p) { return p.starts_with(directory_); };
    return open_qcow2(*context_, file_, std::move(options));
  });
  if (!opened) {
    storage::close_file(file_);
    return opened.take_error();
  }
  backend_ = std::move(*opened);
  return Error();
}

Error Lab::close() {
  Error error = run([&] { return backend_->close(*context_); });
  backend_.reset();
  storage::close_file(file_);
  return error;
}

Error Lab::write(std::uint64_t offset, const Bytes& data, bool fua) {
  AlignedBuffer buffer(data.size());
  std::memcpy(buffer.data(), data.data(), data.size());
  iovec iov{buffer.data(), data.size()};
  return run([&] {
    return backend_->write(*context_, {offset}, GuestBuffers{{&iov, 1}, 0, data.size()}, fua);
  });
}

Error Lab::try_read(std::uint64_t offset, Bytes& out) {
  AlignedBuffer buffer(out.size());
  std::memset(buffer.data(), 0xa5, out.size());  // zeros must be written, not found
  iovec iov{buffer.data(), out.size()};
  Error error = run([&] {
    return backend_->read(*context_, {offset}, GuestBuffers{{&iov, 1}, 0, out.size()});
  });
  std::memcpy(out.data(), buffer.data(), out.size());
  return error;
}

Bytes Lab::read(std::uint64_t offset, std::uint64_t size) {
  Bytes out(size);
  constexpr std::uint64_t kStep = 1 * kMiB;
  for (std::uint64_t done = 0; done < size; done += kStep) {
    Bytes part(std::min(kStep, size - done));
    Error error = try_read(offset + done, part);
    if (error) give_up("read: " + error.to_string());
    std::memcpy(out.data() + done, part.data(), part.size());
  }
  return out;
}

Error Lab::flush() {
  return run([&] { return backend_->flush(*context_); });
}

Result<qcow2::CheckReport> Lab::check(const std::string& name, bool repair) {
  Result<io::File> file = storage::open_file(path(name), {.read_only = !repair});
  if (!file) return file.take_error();
  auto report = run([&]() -> Task<Result<qcow2::CheckReport>> {
    qcow2::OpenOptions options;
    options.read_only = !repair;
    options.for_check = true;
    auto metadata = co_await qcow2::Metadata::open(thread_->queue(), *file, options);
    if (!metadata) co_return metadata.take_error();
    qcow2::CheckOptions how;
    how.repair = repair;
    co_return co_await qcow2::check(thread_->queue(), **metadata, how);
  });
  storage::close_file(*file);
  return report;
}

Bytes mixed_content(Random& random, std::uint64_t size) {
  Bytes bytes(size);
  for (std::uint64_t at = 0; at < size;) {
    const std::uint64_t n = std::min<std::uint64_t>(size - at, 512 * (1 + random.below(400)));
    const std::uint64_t kind = random.below(4);
    if (kind == 1) std::memset(bytes.data() + at, static_cast<int>(random.below(256)), n);
    if (kind >= 2) {
      const Bytes noise = io::test::pattern(random.next(), n);
      std::memcpy(bytes.data() + at, noise.data(), n);
    }
    at += n;
  }
  return bytes;
}

std::string difference(const Bytes& a, const Bytes& b) {
  if (a.size() != b.size()) {
    return "sizes " + std::to_string(a.size()) + " and " + std::to_string(b.size());
  }
  if (a == b) return "";  // memcmp: a sanitizer does not look at every byte of it
  const auto found = std::mismatch(a.begin(), a.end(), b.begin());
  return "byte " + std::to_string(found.first - a.begin()) + ": " + std::to_string(*found.first) +
         " and " + std::to_string(*found.second);
}

namespace {

struct Step {
  enum class What : std::uint8_t { write, discard, zero, unmap } what = What::write;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
  bool fua = false;
  AlignedBuffer data;
  std::vector<iovec> iov;
};

Step make_step(Random& random, std::uint64_t from, std::uint64_t end, std::uint64_t most) {
  Step step;
  const std::uint64_t room = (end - from) / 512;
  const std::uint64_t small = random.below(2) == 0 ? 8 : most / 512;
  step.length = 512 * (1 + random.below(std::min(room, small)));
  step.offset = from + 512 * random.below((end - from - step.length) / 512 + 1);
  const std::uint64_t kind = random.below(10);
  if (kind == 7) step.what = Step::What::discard;
  if (kind == 8) step.what = Step::What::zero;
  if (kind == 9) step.what = Step::What::unmap;
  step.fua = random.below(12) == 0;
  if (step.what != Step::What::write) return step;
  step.data = AlignedBuffer(step.length);
  const Bytes noise = io::test::pattern(random.next(), step.length);
  std::memcpy(step.data.data(), noise.data(), noise.size());
  // Scattered over several buffers, of sizes that only buffered files take.
  const std::uint64_t cut = random.below(3) == 0 ? 512 * random.below(step.length / 512) : 0;
  if (cut != 0) step.iov.push_back({step.data.data(), cut});
  step.iov.push_back({step.data.data() + cut, step.length - cut});
  return step;
}

Task<Error> perform(Lab& lab, const Step& step) {
  Backend& disk = lab.disk();
  switch (step.what) {
    case Step::What::write:
      co_return co_await disk.write(lab.context(), {step.offset},
                                    GuestBuffers{step.iov, 0, step.length}, step.fua);
    case Step::What::discard:
      co_return co_await disk.discard(lab.context(), {step.offset}, step.length);
    case Step::What::zero:
      co_return co_await disk.write_zeroes(lab.context(), {step.offset}, step.length, 0);
    case Step::What::unmap:
      co_return co_await disk.write_zeroes(lab.context(), {step.offset}, step.length, kZeroUnmap);
  }
  co_return Error();
}

void apply(const Step& step, Bytes& model, const Bytes& seen) {
  std::uint8_t* at = model.data() + step.offset;
  if (step.what == Step::What::write) {
    std::memcpy(at, step.data.data(), step.length);
  } else if (step.what != Step::What::discard) {
    std::memset(at, 0, step.length);
  } else {
    // Discarded blocks hold what they held, or zeros: nothing else, block by block.
    const Bytes zeros(512);
    for (std::uint64_t i = 0; i < step.length; i += 512) {
      if (std::memcmp(seen.data() + step.offset + i, zeros.data(), 512) == 0) {
        std::memset(at + i, 0, 512);
      }
    }
  }
}

}  // namespace

void exercise(Lab& lab, Bytes& model, Random& random, const ExerciseOptions& options) {
  for (std::uint32_t round = 0; round < options.rounds; ++round) {
    std::vector<Step> steps;
    // Disjoint pieces of a window, so that several requests meet in one cluster.
    const std::uint64_t window =
        std::min<std::uint64_t>(model.size(), options.request_max * options.parallel);
    const std::uint64_t base = 512 * random.below((model.size() - window) / 512 + 1);
    const std::uint64_t piece = align_down<std::uint64_t>(window / options.parallel, 512);
    for (std::uint32_t i = 0; i < options.parallel; ++i) {
      steps.push_back(
          make_step(random, base + i * piece, base + (i + 1) * piece, options.request_max));
    }
    const bool flush = options.flushes && random.below(3) == 0;
    const Error error = lab.run([&]() -> Task<Error> {
      std::vector<Task<Error>> tasks;
      for (const Step& step : steps) tasks.push_back(perform(lab, step));
      if (flush) tasks.push_back(lab.disk().flush(lab.context()));
      co_return co_await io::test::all_of(lab.queue(), std::move(tasks));
    });
    REQUIRE_MESSAGE(error.ok(), error.to_string());
    const Bytes seen = lab.read(0, model.size());
    for (const Step& step : steps) apply(step, model, seen);
    const std::string what = difference(seen, model);
    REQUIRE_MESSAGE(what.empty(), "round " << round << ": " << what);
  }
}

}  // namespace pqblk::image::test
