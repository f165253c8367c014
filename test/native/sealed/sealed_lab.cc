#include "sealed/sealed_lab.h"

#include "base/aligned.h"
#include "base/endian.h"

namespace pqblk::test {

using namespace sealed;  // NOLINT

std::uint64_t load64(const sim::Pages& image, std::uint64_t at) {
  Be64 value = 0;
  image.read(at, &value, sizeof value);
  return value;
}

Places places_of(const sim::Pages& image) {
  Places p;
  std::vector<std::uint8_t> payload(sizeof(ExtensionRaw));
  image.read(kExtensionAt, payload.data(), payload.size());
  Be32 cluster_bits = 0, l1_size = 0;
  image.read(20, &cluster_bits, 4);
  image.read(36, &l1_size, 4);
  const std::uint64_t cluster = std::uint64_t{1} << cluster_bits;
  auto extension = parse_extension(payload, cluster);
  if (!extension) std::abort();  // the tests' own image
  p.extension = *extension;
  p.l1 = load64(image, 40);
  p.refcount_table = load64(image, 48);
  p.per_table = cluster / 8;
  for (std::uint64_t i = 0; i < l1_size; ++i) {
    p.l2.push_back(l2_host(load64(image, p.l1 + i * 8)));
  }
  return p;
}

Lab::Lab(const SealedShape& shape, sim::Device image) : shape_(shape) {
  q_ = std::make_unique<image::QueueContext>(world_.add_queue(), 0);
  file_ = &world_.add_file("sealed", std::move(image));
}

Lab::~Lab() {
  if (backend_) static_cast<void>(close().ok());
}

Error Lab::create() {
  const VolumeKeys keys = test_keys();
  const CreateOptions options = create_options(shape_);
  Error e = run(create_image(q_->io, *file_, options, keys), Error(Kind::canceled, "hang"));
  file_->size = image().size();
  return e;
}

Error Lab::open(bool read_only) {
  image::SealedOptions o = open_options(shape_);
  o.read_only = read_only;
  return open(std::move(o));
}

Error Lab::open(image::SealedOptions options) {
  using Opened = Result<std::unique_ptr<image::SealedBackend>>;
  file_->size = image().size();  // it may have grown since
  Opened opened = run(image::SealedBackend::open(*q_, *file_, std::move(options)),
                      Opened(Error(Kind::canceled, "hang")));
  if (!opened) return opened.take_error();
  backend_ = std::move(*opened);
  return {};
}

Error Lab::close() {
  Error e = run(backend_->close(*q_), Error(Kind::canceled, "hang"));
  world_.drain();
  backend_.reset();
  return e;
}

Error Lab::write(std::uint64_t sector, std::uint64_t version, std::uint64_t count) {
  AlignedBuffer memory(count * kSectorSize);
  for (std::uint64_t i = 0; i < count; ++i) {
    sim::fill_sector(memory.data() + i * kSectorSize, sector + i, version);
  }
  iovec iov{memory.data(), memory.size()};
  return run(backend_->write(*q_, {sector * kSectorSize}, {{&iov, 1}, 0, iov.iov_len}, false),
             Error(Kind::canceled, "hang"));
}

Error Lab::zero(std::uint64_t sector, std::uint64_t count) {
  return run(backend_->write_zeroes(*q_, {sector * kSectorSize}, count * kSectorSize, 0),
             Error(Kind::canceled, "hang"));
}

Error Lab::flush() { return run(backend_->flush(*q_), Error(Kind::canceled, "hang")); }
Error Lab::checkpoint() { return run(backend_->checkpoint(*q_), Error(Kind::canceled, "hang")); }

Error Lab::begin_epoch(std::uint32_t epoch) {
  const auto begun = [&]() -> Task<Error> {
    auto info = co_await sealed::read_public_info(q_->io, *file_);
    if (!info) co_return info.take_error();
    const std::vector<std::uint8_t> state = sealed::state_of(info->key_area);
    co_return co_await backend_->begin_epoch(*q_, test_data_key(epoch), state);
  };
  return run(begun(), Error(Kind::canceled, "hang"));
}

Error Lab::read(std::uint64_t sector, sim::Seen& seen) {
  AlignedBuffer memory(kSectorSize);
  iovec iov{memory.data(), kSectorSize};
  Error e = run(backend_->read(*q_, {sector * kSectorSize}, {{&iov, 1}, 0, kSectorSize}),
                Error(Kind::canceled, "hang"));
  if (e) return e;
  seen = sim::look_at_block(memory.data());
  for (std::uint32_t b = 1; b < sim::kBlocksPerSector; ++b) {
    const sim::Seen other = sim::look_at_block(memory.data() + b * sim::kPatternBlock);
    if (other.what != seen.what || other.version != seen.version)
      seen.what = sim::Seen::What::garbage;
  }
  if (seen.what == sim::Seen::What::data && seen.sector != sector) {
    seen.what = sim::Seen::What::garbage;
  }
  return {};
}

std::string Lab::look(std::uint64_t sector) {
  sim::Seen seen;
  if (Error e = read(sector, seen)) return std::string(kind_name(e.kind()));
  switch (seen.what) {
    case sim::Seen::What::zeros:
      return "zeros";
    case sim::Seen::What::data:
      return "v" + std::to_string(seen.version);
    case sim::Seen::What::garbage:
      break;
  }
  return "garbage";
}

std::vector<std::string> Lab::look_at_all() {
  std::vector<std::string> all;
  for (std::uint64_t s = 0; s < shape_.sectors; ++s) all.push_back(look(s));
  return all;
}

sim::Device killed(const sim::Device& device) {
  sim::QuietChoices keep_all;
  return device.power_loss(keep_all);
}

}  // namespace pqblk::test
