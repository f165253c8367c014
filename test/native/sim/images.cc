#include "sim/images.h"

#include <vector>

#include "format/qcow2/check.h"
#include "format/qcow2/create.h"
#include "image/qcow2_backend.h"
#include "image/raw_backend.h"
#include "image/sealed_backend.h"
#include "sealed/backend_api.h"

namespace pqblk::sim {
namespace {

using Opened = Result<std::unique_ptr<image::Backend>>;

// A read-only image that holds version 0 of every sector.
class PatternBackend final : public image::Backend {
 public:
  explicit PatternBackend(std::uint64_t size) : size_(size) {}
  image::Geometry geometry() const override {
    return {.size = size_, .request_align = kSectorSize, .max_transfer = kMiB};
  }
  std::string_view format() const override { return "raw"; }
  Task<Error> read(image::QueueContext& q, GuestOffset at, image::GuestBuffers data) override {
    auto memory = q.buffer(align_up<std::uint64_t>(data.size + 2 * kSectorSize, kSectorSize));
    const std::uint64_t first = at.bytes / kSectorSize;
    const std::uint64_t end = div_ceil<std::uint64_t>(at.bytes + data.size, kSectorSize);
    for (std::uint64_t s = first; s < end; ++s) {
      fill_sector(memory.data() + (s - first) * kSectorSize, s, 0);
    }
    data.copy_in(memory.data() + at.bytes % kSectorSize);
    co_return Error();
  }
  Task<Error> write(image::QueueContext&, GuestOffset, image::GuestBuffers, bool) override {
    return refuse();
  }
  Task<Error> flush(image::QueueContext&) override { co_return Error(); }
  Task<Error> discard(image::QueueContext&, GuestOffset, std::uint64_t) override {
    return refuse();
  }
  Task<Error> write_zeroes(image::QueueContext&, GuestOffset, std::uint64_t,
                           std::uint32_t) override {
    return refuse();
  }
  Task<Result<image::Extent>> extent(image::QueueContext&, GuestOffset,
                                     std::uint64_t length) override {
    co_return image::Extent{.length = length};
  }
  Task<Error> resize(image::QueueContext&, std::uint64_t) override { return refuse(); }
  Task<Error> close(image::QueueContext&) override { co_return Error(); }
  image::BackendStats stats() const override { return {}; }

 private:
  static Task<Error> refuse() { co_return Error(Kind::read_only, "a backing image"); }
  const std::uint64_t size_;
};

image::SealedOptions sealed_options(const test::SealedShape& shape, bool backed) {
  image::SealedOptions how = test::open_options(shape);
  how.allow_unauthenticated_backing = backed;
  if (backed) how.backing = std::make_unique<PatternBackend>(shape.sectors * kSectorSize);
  return how;
}

Error judge(const Result<format::qcow2::CheckReport>& report, bool leaks_allowed) {
  if (!report) return Error(report.error().kind(), report.error().to_string());
  if (report->corruptions == 0 && (leaks_allowed || report->leaks == 0)) return {};
  std::string text = std::to_string(report->corruptions) + " corruptions, " +
                     std::to_string(report->leaks) + " leaks";
  for (const std::string& message : report->messages) text += "\n    " + message;
  return Error(Kind::corrupt, text);
}

Task<Error> check_qcow2(image::QueueContext& q, const io::File& file, bool leaks_allowed) {
  auto metadata =
      co_await format::qcow2::Metadata::open(q.io, file, {.read_only = true, .for_check = true});
  if (!metadata) co_return metadata.take_error();
  auto report = co_await format::qcow2::check(q.io, **metadata, {});
  co_return judge(report, leaks_allowed);
}

// A sealed image's own areas are referenced by its extension, which only its backend reads.
Task<Error> check_sealed(image::QueueContext& q, const io::File& file, test::SealedShape shape,
                         bool backed) {
  image::SealedOptions how = sealed_options(shape, backed);
  how.read_only = true;
  how.for_check = true;
  auto backend = co_await image::SealedBackend::open(q, file, std::move(how));
  if (!backend) co_return backend.take_error();
  auto report = co_await format::qcow2::check(q.io, (*backend)->metadata(), {});
  Error error = judge(report, false);
  Error closed = co_await (*backend)->close(q);
  if (error) co_return error;
  co_return closed;
}

Task<Error> create_backed(test::SealedShape shape, io::Queue& q, const io::File& file) {
  sealed::CreateOptions options = test::create_options(shape);
  options.backing_policy = sealed::BackingPolicy::unauthenticated;
  options.backing_name = "backing";
  options.backing_format = "raw";
  const sealed::VolumeKeys keys = test::test_keys();
  co_return co_await sealed::create_image(q, file, options, keys);
}

Task<Opened> open_backed(test::SealedShape shape, image::QueueContext& service,
                         const io::File& file) {
  auto opened = co_await image::SealedBackend::open(service, file, sealed_options(shape, true));
  if (!opened) co_return opened.take_error();
  co_return std::unique_ptr<image::Backend>(std::move(*opened));
}

}  // namespace

Subject checked_sealed_subject(const test::SealedShape& shape, bool backed) {
  Subject s = test::sealed_subject(shape);
  s.check_closed = [shape, backed](image::QueueContext& q, const io::File& file,
                                   bool /*leaks_allowed*/) {
    return check_sealed(q, file, shape, backed);  // the next open takes back what a crash leaked
  };
  if (!backed) return s;
  s.backed = true;
  s.create = [shape](io::Queue& q, const io::File& file) { return create_backed(shape, q, file); };
  s.open = [shape](image::QueueContext& service, const io::File& file) {
    return open_backed(shape, service, file);
  };
  return s;
}

Subject qcow2_subject(const Qcow2Shape& shape) {
  Subject s;
  s.name = "qcow2";
  s.sectors = shape.sectors;
  s.sectors_per_cluster = (std::uint64_t{1} << shape.cluster_bits) / kSectorSize;
  s.unit = kPatternBlock;
  s.open_is_durable = false;
  s.kill_keeps = false;  // mappings are kept in memory until a flush, as QEMU does
  s.discard_zeroes = false;
  s.create = [shape](io::Queue& q, const io::File& file) -> Task<Error> {
    format::qcow2::CreateOptions o;
    o.size = shape.sectors * kSectorSize;
    o.cluster_bits = shape.cluster_bits;
    o.refcount_bits = shape.refcount_bits;
    o.extended_l2 = shape.extended_l2;
    co_return co_await format::qcow2::create(q, file, o);
  };
  s.open = [](image::QueueContext& service, const io::File& file) {
    return image::open_qcow2(service, file, {.l2_cache = 16 * kKiB});
  };
  s.check_closed = check_qcow2;
  return s;
}

Subject raw_subject(std::uint64_t sectors) {
  Subject s;
  s.name = "raw";
  s.sectors = sectors;
  s.unit = kPatternBlock;
  s.open_is_durable = false;
  s.create = [sectors](io::Queue& q, const io::File& file) -> Task<Error> {
    image::RawCreateOptions o;
    o.size = sectors * kSectorSize;
    co_return co_await image::create_raw(q, file, o);
  };
  s.open = [](image::QueueContext& service, const io::File& file) {
    return image::open_raw(service, file);
  };
  return s;
}

}  // namespace pqblk::sim
