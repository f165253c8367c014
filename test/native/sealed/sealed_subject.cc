#include "sealed/sealed_subject.h"

#include "sealed/backend_api.h"

namespace pqblk::test {

using namespace sealed;  // NOLINT

namespace {

sim::NonceTrace& trace() {
  static sim::NonceTrace instance;
  return instance;
}

void consume(std::uint32_t session, const std::uint8_t* salt, const crypto::Nonce& nonce,
             bool log) {
  std::vector<std::uint8_t> key(salt, salt + 32);
  for (int shift = 0; shift < 32; shift += 8)
    key.push_back(static_cast<std::uint8_t>(session >> shift));
  key.push_back(log ? 1 : 0);
  trace().consume(key, nonce);
}

crypto::SecretKey key_of(std::uint8_t fill) {
  std::array<std::uint8_t, 32> bytes;
  bytes.fill(fill);
  return std::move(*crypto::SecretKey::copy_of(bytes));
}

}  // namespace

VolumeKeys test_keys() {
  VolumeKeys keys;
  keys.integrity = key_of(0x11);
  keys.data.push_back({1, key_of(0x22)});
  keys.current_epoch = 1;
  return keys;
}

Uuid test_uuid() {
  Uuid uuid;
  for (std::size_t i = 0; i < uuid.size(); ++i) uuid[i] = static_cast<std::uint8_t>(0xa0 + i);
  return uuid;
}

CreateOptions create_options(const SealedShape& shape) {
  CreateOptions o;
  o.size = shape.sectors * kSectorSize;
  o.cluster_bits = shape.cluster_bits;
  o.suite = shape.suite;
  o.uuid = test_uuid();
  o.log_bytes = shape.log_bytes;
  o.key_area.assign(kKeyAreaBytes, 0x5a);
  return o;
}

image::SealedOptions open_options(const SealedShape& shape) {
  image::SealedOptions o;
  o.keys = test_keys();
  o.expected_uuid = test_uuid();
  o.l2_cache_bytes = 256 * kKiB;
  o.entry_cache_bytes = 256 * kKiB;
  o.pending_bytes = 16 * kSectorSize;
  o.overlay_sectors_max = shape.overlay_sectors_max;
  o.session_sectors_max = shape.session_sectors_max;
  o.relocate_bytes_min = shape.relocate_bytes_min;
  return o;
}

sim::Subject sealed_subject(const SealedShape& shape) {
  sim::Subject s;
  s.name = "sealed";
  s.sectors = shape.sectors;
  s.sectors_per_cluster = (std::uint64_t{1} << shape.cluster_bits) / kSectorSize;
  s.file.device = {.non_volatile = shape.non_volatile, .atomic_4k = shape.non_volatile};
  s.create = [shape](io::Queue& io, const io::File& file) -> Task<Error> {
    const VolumeKeys keys = test_keys();
    const CreateOptions options = create_options(shape);
    co_return co_await create_image(io, file, options, keys);
  };
  s.open = [shape](image::QueueContext& service,
                   const io::File& file) -> Task<Result<std::unique_ptr<image::Backend>>> {
    auto opened = co_await image::SealedBackend::open(service, file, open_options(shape));
    if (!opened) co_return opened.take_error();
    if ((*opened)->recovery().damaged != 0) {
      co_return Error(Kind::integrity, "recovery reports damage");
    }
    co_return std::unique_ptr<image::Backend>(std::move(*opened));
  };
  s.checkpoint = [](image::Backend& backend, image::QueueContext& q, bool) -> Task<Error> {
    co_return co_await static_cast<image::SealedBackend&>(backend).checkpoint(q);
  };
  s.begin_run = [](std::uint64_t) {
    trace().reset();
    nonce_tracer.store(&consume);
  };
  s.verdict = [] { return trace().duplicate(); };
  return s;
}

}  // namespace pqblk::test
