#include "image/backing.h"

#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <utility>

#include "image/qcow2_backend.h"
#include "image/raw_backend.h"

namespace pqblk::image {
namespace {

Error read_only() { return Error(Kind::read_only, "a backing image is read-only"); }

class BackingImage final : public Backend {
 public:
  explicit BackingImage(io::File file) : file_(std::move(file)) {}
  ~BackingImage() override {
    inner_.reset();
    storage::close_file(file_);
  }
  const io::File& file() const { return file_; }
  void set_inner(std::unique_ptr<Backend> inner) {
    inner_ = std::move(inner);
    size_ = inner_->geometry().size;
    align_ = std::max(inner_->geometry().request_align, inner_->geometry().memory_align);
  }

  Geometry geometry() const override {
    Geometry g = inner_->geometry();
    g.request_align = 1;
    g.memory_align = 1;
    return g;
  }
  std::string_view format() const override { return inner_->format(); }
  Task<Error> read(QueueContext& q, GuestOffset at, GuestBuffers data) override;
  Task<Error> write(QueueContext&, GuestOffset, GuestBuffers, bool) override {
    co_return read_only();
  }
  Task<Error> flush(QueueContext&) override { co_return Error(); }
  Task<Error> discard(QueueContext&, GuestOffset, std::uint64_t) override { co_return read_only(); }
  Task<Error> write_zeroes(QueueContext&, GuestOffset, std::uint64_t, std::uint32_t) override {
    co_return read_only();
  }
  Task<Result<Extent>> extent(QueueContext& q, GuestOffset at, std::uint64_t length) override;
  Task<Error> resize(QueueContext&, std::uint64_t) override { co_return read_only(); }
  Task<Error> close(QueueContext& q) override { return inner_->close(q); }
  BackendStats stats() const override { return inner_->stats(); }

 private:
  static constexpr std::uint64_t kBounceBytes = 256 * kKiB;
  bool aligned(GuestOffset at, const GuestBuffers& data) const;

  io::File file_;
  std::unique_ptr<Backend> inner_;
  std::uint64_t size_ = 0;
  std::uint32_t align_ = 1;
};

bool BackingImage::aligned(GuestOffset at, const GuestBuffers& data) const {
  if (align_ == 1) return true;
  std::uint64_t bits = at.bytes | data.size | data.skip;
  for (const iovec& v : data.iov) {
    bits |= reinterpret_cast<std::uintptr_t>(v.iov_base) | v.iov_len;
  }
  return (bits & (align_ - 1)) == 0;
}

Task<Error> BackingImage::read(QueueContext& q, GuestOffset at, GuestBuffers data) {
  const std::uint64_t inside =
      at.bytes >= size_ ? 0 : std::min<std::uint64_t>(data.size, size_ - at.bytes);
  if (inside < data.size) data.part(inside, data.size - inside).zero();
  if (inside == 0) co_return Error();
  const GuestBuffers part = data.part(0, inside);
  if (aligned(at, part)) {
    Error error = co_await inner_->read(q, at, part);
    co_return error;
  }
  for (std::uint64_t done = 0; done < inside;) {
    const std::uint64_t from = align_down<std::uint64_t>(at.bytes + done, align_);
    const std::uint64_t end =
        std::min(align_up<std::uint64_t>(at.bytes + inside, align_), from + kBounceBytes);
    const QueueContext::Buffer buffer = q.buffer(static_cast<std::size_t>(end - from));
    iovec whole{buffer.data(), static_cast<std::size_t>(end - from)};
    const GuestBuffers into{{&whole, 1}, 0, end - from};
    Error error = co_await inner_->read(q, {from}, into);
    if (error) co_return error;
    const std::uint64_t skip = at.bytes + done - from;
    const std::uint64_t n = std::min(end - from - skip, inside - done);
    part.part(done, n).copy_in(buffer.data() + skip);
    done += n;
  }
  co_return Error();
}

Task<Result<Extent>> BackingImage::extent(QueueContext& q, GuestOffset at, std::uint64_t length) {
  if (at.bytes >= size_) co_return Extent{length, ExtentKind::hole};
  Result<Extent> extent = co_await inner_->extent(q, at, std::min(length, size_ - at.bytes));
  co_return extent;
}

// "nbd:...", "json:{...}", "https://...": a protocol comes before any slash.
bool names_protocol(const std::string& name) {
  const std::size_t colon = name.find(':');
  if (colon == std::string::npos || colon == 0) return false;
  return std::all_of(name.begin(), name.begin() + static_cast<std::ptrdiff_t>(colon), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '+' || c == '-' || c == '.';
  });
}

Result<FileId> file_id(const io::File& file) {
  struct stat st {};
  if (::fstat(file.fd, &st) != 0) return Error::from_errno(errno, "stat", file.path);
  return FileId{st.st_dev, st.st_ino};
}

}  // namespace

Result<std::string> backing_path(const std::string& image_path, const std::string& name) {
  if (names_protocol(name)) {
    return Error(Kind::unsupported,
                 "backing file \"" + name + "\": only local files are supported");
  }
  const std::filesystem::path path(name);
  if (path.is_absolute()) return name;
  return (std::filesystem::path(image_path).parent_path() / path).string();
}

Task<Result<std::unique_ptr<Backend>>> open_backing(QueueContext& service, const io::File& image,
                                                    const std::string& name,
                                                    const std::string& format,
                                                    BackingOptions options) {
  Result<std::string> path = backing_path(image.path, name);
  if (!path) co_return path.take_error();
  if (!options.gate || !options.gate(*path)) {
    co_return Error(Kind::gate_refused, "the image names a backing file that was not allowed")
        .in(*path);
  }
  const std::string& kind = format.empty() ? options.format : format;
  if (kind != "raw" && kind != "qcow2") {
    const std::string what = kind.empty()
                                 ? "the image does not name its backing file's format, "
                                   "and formats are never guessed: name it when opening"
                                 : "backing files of format " + kind + " are not supported";
    co_return Error(Kind::unsupported, what).in(*path);
  }
  if (options.chain.empty()) {
    Result<FileId> top = file_id(image);
    if (!top) co_return top.take_error();
    options.chain.push_back(*top);
  }
  storage::OpenOptions how;
  how.read_only = true;
  how.direct = options.direct;
  how.lock = storage::Lock::shared;
  Result<io::File> file = storage::open_file(*path, how);
  if (!file) co_return file.take_error();
  auto backing = std::make_unique<BackingImage>(std::move(*file));
  Result<FileId> id = file_id(backing->file());
  if (!id) co_return id.take_error();
  if (std::find(options.chain.begin(), options.chain.end(), *id) != options.chain.end()) {
    co_return Error(Kind::corrupt, "the chain of backing files comes back to this one").in(*path);
  }
  if (options.chain.size() >= kBackingDepthMax) {
    co_return Error(Kind::unsupported, "more than 64 backing files in a chain").in(*path);
  }
  options.chain.push_back(*id);
  if (kind == "raw") {
    Result<std::unique_ptr<Backend>> inner = co_await open_raw(service, backing->file());
    if (!inner) co_return inner.take_error();
    backing->set_inner(std::move(*inner));
  } else {
    Qcow2Options below;
    below.read_only = true;
    below.l2_cache = options.l2_cache;
    options.format.clear();  // said for this one only
    below.backing = std::move(options);
    Result<std::unique_ptr<Backend>> inner =
        co_await open_qcow2(service, backing->file(), std::move(below));
    if (!inner) co_return inner.take_error();
    backing->set_inner(std::move(*inner));
  }
  co_return std::unique_ptr<Backend>(std::move(backing));
}

}  // namespace pqblk::image
