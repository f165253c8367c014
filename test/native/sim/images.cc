#include "sim/images.h"

#include <algorithm>
#include <array>
#include <vector>

#include "format/qcow2/check.h"
#include "format/qcow2/create.h"
#include "image/qcow2_backend.h"
#include "image/raw_backend.h"
#include "image/sealed_backend.h"
#include "sealed/backend_api.h"
#include "sealed/nonce.h"

namespace pqblk::sim {
namespace {

using Opened = Result<std::unique_ptr<image::Backend>>;

constexpr sealed::Uuid kUuid = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

crypto::SecretKey key_of(std::uint8_t value) {
  std::array<std::uint8_t, 32> bytes;
  bytes.fill(value);
  auto key = crypto::SecretKey::copy_of(bytes);
  return key ? std::move(*key) : crypto::SecretKey();
}

sealed::VolumeKeys volume_keys() {
  sealed::VolumeKeys keys;
  keys.integrity = key_of(1);
  keys.data.push_back({.epoch = 1, .key = key_of(2)});
  keys.current_epoch = 1;
  return keys;
}

void trace_nonce(std::uint32_t session, const std::uint8_t* salt, const crypto::Nonce& nonce,
                 bool log_key) {
  std::array<std::uint8_t, 37> key;  // what the session key is derived from, and which of the two
  std::copy_n(salt, 32, key.begin());
  for (int i = 0; i < 4; ++i) key[32 + i] = static_cast<std::uint8_t>(session >> (8 * i));
  key[36] = log_key ? 1 : 0;
  nonce_trace().consume(key, nonce);
}

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

image::SealedOptions sealed_options(const SealedShape& shape) {
  image::SealedOptions how;
  how.keys = volume_keys();
  how.expected_uuid = kUuid;
  how.l2_cache_bytes = how.entry_cache_bytes = 64 * kKiB;
  how.pending_bytes = 64 * kKiB;
  how.overlay_sectors_max = shape.overlay_sectors;
  how.session_sectors_max = shape.session_sectors;
  how.allow_unauthenticated_backing = shape.backed;
  if (shape.backed) how.backing = std::make_unique<PatternBackend>(shape.sectors * kSectorSize);
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
Task<Error> check_sealed(image::QueueContext& q, const io::File& file, SealedShape shape,
                         bool leaks_allowed) {
  image::SealedOptions how = sealed_options(shape);
  how.read_only = true;
  how.for_check = true;
  auto backend = co_await image::SealedBackend::open(q, file, std::move(how));
  if (!backend) co_return backend.take_error();
  auto report = co_await format::qcow2::check(q.io, (*backend)->metadata(), {});
  Error error = judge(report, leaks_allowed);
  Error closed = co_await (*backend)->close(q);
  if (error) co_return error;
  co_return closed;
}

sealed::CreateOptions create_options(const SealedShape& shape) {
  sealed::CreateOptions o;
  o.size = shape.sectors * kSectorSize;
  o.cluster_bits = shape.cluster_bits;
  o.suite = shape.suite;
  o.uuid = kUuid;
  o.log_bytes = shape.log_bytes;
  o.key_area.resize(sealed::kKeyAreaBytes);
  if (shape.backed) {
    o.backing_policy = sealed::BackingPolicy::unauthenticated;
    o.backing_name = "backing";
    o.backing_format = "raw";
  }
  return o;
}

Task<Opened> open_sealed(SealedShape shape, image::QueueContext& service, const io::File& file) {
  auto opened = co_await image::SealedBackend::open(service, file, sealed_options(shape));
  if (!opened) co_return opened.take_error();
  co_return std::unique_ptr<image::Backend>(std::move(*opened));
}

}  // namespace

NonceTrace& nonce_trace() {
  static NonceTrace trace;
  return trace;
}

Subject sealed_subject(const SealedShape& shape) {
  Subject s;
  s.name = "sealed";
  s.sectors = shape.sectors;
  s.sectors_per_cluster = (std::uint64_t{1} << shape.cluster_bits) / kSectorSize;
  s.backed = shape.backed;
  s.file = shape.file;
  s.create = [shape](io::Queue& q, const io::File& file) -> Task<Error> {
    const sealed::CreateOptions options = create_options(shape);
    const sealed::VolumeKeys keys = volume_keys();
    co_return co_await sealed::create_image(q, file, options, keys);
  };
  s.open = [shape](image::QueueContext& service, const io::File& file) {
    return open_sealed(shape, service, file);
  };
  s.checkpoint = [](image::Backend& backend, image::QueueContext& q, bool) {
    return static_cast<image::SealedBackend&>(backend).checkpoint(q);
  };
  s.begin_run = [](std::uint64_t) {
    sealed::nonce_tracer.store(trace_nonce);
    nonce_trace().reset();
  };
  s.verdict = [] { return nonce_trace().duplicate(); };
  s.check_closed = [shape](image::QueueContext& q, const io::File& file, bool leaks_allowed) {
    return check_sealed(q, file, shape, leaks_allowed);
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
