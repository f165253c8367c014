#include "sealed/sealed_subject.h"

#include <functional>
#include <optional>
#include <string>

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

// What the key layer would keep in the key area: the epochs whose keys a volume has.
struct Epochs {
  std::uint8_t current = 1, next = 0;  // next: a rotation is under way
  KeyArea area;                        // that says so

  std::vector<std::uint8_t> blob() const {
    std::vector<std::uint8_t> bytes(kKeyAreaBytes, 0x5a);
    bytes[0] = current;
    bytes[1] = next;
    return bytes;
  }
  VolumeKeys keys() const {
    VolumeKeys keys = test_keys();
    keys.data.clear();
    keys.data.push_back(test_data_key(current));
    if (next != 0) keys.data.push_back(test_data_key(next));
    const bool whole = area[0].blob == area[1].blob;
    keys.current_epoch = next != 0 && whole ? next : current;
    return keys;
  }
};

std::uint32_t newest_of(const KeyArea& area) { return area[1].number > area[0].number ? 1 : 0; }

Task<Result<Epochs>> epochs_of(io::Queue& io, const io::File& file) {
  auto info = co_await read_public_info(io, file);
  if (!info) co_return info.take_error();
  KeyArea& area = info->key_area;
  const auto& blob = area[newest_of(area)].blob;
  if (blob.empty()) co_return Error(Kind::io_error, "no copy of the key area was read");
  co_return Epochs{blob[0], blob[1], std::move(area)};
}

// The next step of a rotation: begin one, or finish it when nothing of the old epoch is left.
Task<Error> step_rotation(image::SealedBackend& backend, image::QueueContext& q,
                          const SealedShape& shape) {
  auto epochs = co_await epochs_of(q.io, backend.file());
  if (!epochs) co_return epochs.take_error();
  const auto replace = [&](Epochs with) -> Task<Error> {
    const std::uint32_t newest = newest_of(epochs->area);
    KeyAreaChange change;
    change.blob = with.blob();
    change.expected = state_of(epochs->area);
    change.number = epochs->area[newest].number + 1;
    change.copy = 1 - newest;
    Error e = co_await backend.change_key_area(q, change);
    if (e) co_return e.kind() == Kind::locked ? Error() : std::move(e);  // another one was faster
    auto half = co_await epochs_of(q.io, backend.file());
    if (!half) co_return half.take_error();
    const bool mine = half->area[1 - newest].blob == change.blob &&
                      half->area[newest].checksum == epochs->area[newest].checksum;
    if (!mine) co_return Error();  // as above
    change.expected = state_of(half->area);
    change.copy = newest;
    e = co_await backend.change_key_area(q, change);
    co_return e.kind() == Kind::locked ? Error() : std::move(e);
  };
  if (epochs->next == 0) {
    co_return co_await replace(
        {epochs->current, static_cast<std::uint8_t>(epochs->current + 1), {}});
  }
  if (backend.epoch() != epochs->next) {
    const bool whole = epochs->area[0].blob == epochs->area[1].blob;
    if (!whole) co_return co_await replace({epochs->current, epochs->next, {}});
    const std::vector<std::uint8_t> state = state_of(epochs->area);
    Error e = co_await backend.begin_epoch(q, test_data_key(epochs->next), state);
    co_return e.kind() == Kind::locked ? Error() : std::move(e);  // as above
  }
  auto left = co_await backend.count_other_epochs(q, {0}, shape.sectors * kSectorSize);
  if (!left) co_return left.take_error();
  if (*left != 0) co_return Error();
  Error e = co_await backend.finish_epoch(q, epochs->next);
  if (e) co_return e.kind() == Kind::canceled ? Error() : std::move(e);  // as above
  co_return co_await replace({epochs->next, 0, {}});
}

// A copy of the log's header, and where it was.
struct LostCopy {
  AlignedBuffer page{kPage};
  std::uint64_t at = 0;
};

// As a medium would that was copied without a bad block: mostly the newer copy, which counts.
Task<Error> lose_log_header(io::Queue& io, const io::File& file, LostCopy& lost) {
  AlignedBuffer first(kPage), heads(kLogHeadBytes);
  if (Error e = co_await io.read(file, 0, first.data(), first.size())) co_return e;
  ExtensionRaw extension;
  std::memcpy(&extension, first.data() + kExtensionAt, sizeof extension);
  const std::uint64_t log = extension.log_offset;
  if (Error e = co_await io.read(file, log, heads.data(), heads.size())) co_return e;
  LogHeaderRaw copy[2];
  for (std::size_t i = 0; i < 2; ++i) {
    std::memcpy(&copy[i], heads.data() + i * kPage, sizeof copy[i]);
    if (std::memcmp(copy[i].magic, kLogMagic, 8) != 0) co_return Error();
  }
  const std::uint64_t newer = copy[1].serial > copy[0].serial ? 1 : 0;
  const std::uint64_t which = copy[newer].serial % 4 == 0 ? 1 - newer : newer;
  lost.at = log + which * kPage;
  std::memcpy(lost.page.data(), heads.data() + which * kPage, kPage);
  AlignedBuffer zeros(kPage);
  if (Error e = co_await io.write(file, lost.at, zeros.data(), kPage)) co_return e;
  co_return co_await io.fdatasync(file);
}

using Opened = Result<std::unique_ptr<image::SealedBackend>>;

Task<Opened> open_without_log_header(image::QueueContext& q, const io::File& file,
                                     const std::function<image::SealedOptions()>& options) {
  LostCopy lost;
  if (Error e = co_await lose_log_header(q.io, file, lost)) co_return e;
  Opened opened = co_await image::SealedBackend::open(q, file, options());
  const bool round = !opened && opened.error().message().find("gone round") != std::string::npos;
  if (!round || lost.at == 0) co_return std::move(opened);
  if (Error e = co_await q.io.write(file, lost.at, lost.page.data(), kPage)) co_return e;
  co_return co_await image::SealedBackend::open(q, file, options());
}

}  // namespace

DataKey test_data_key(std::uint32_t epoch) {
  return {epoch, key_of(static_cast<std::uint8_t>(0x21 + epoch))};
}

VolumeKeys test_keys() {
  VolumeKeys keys;
  keys.integrity = key_of(0x11);
  keys.data.push_back(test_data_key(1));
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
  o.key_area = Epochs{}.blob();
  return o;
}

image::SealedOptions open_options(const SealedShape& shape) {
  image::SealedOptions o;
  o.keys = test_keys();
  o.expected_uuid = test_uuid();
  o.limits.l2_cache = 256 * kKiB;
  o.limits.entry_cache = 256 * kKiB;
  o.limits.pending_data = 16 * kSectorSize;
  o.overlay_sectors_max = shape.overlay_sectors_max;
  o.session_sectors_max = shape.session_sectors_max;
  o.relocate_bytes_min = shape.relocate_bytes_min;
  o.rest_ns = shape.rest_ns;
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
    std::optional<Epochs> epochs;
    if (shape.rotates) {
      auto found = co_await epochs_of(service.io, file);
      if (!found) co_return found.take_error();
      epochs = std::move(*found);
    }
    const std::function<image::SealedOptions()> options = [&] {
      image::SealedOptions o = open_options(shape);
      if (epochs) o.keys = epochs->keys();
      return o;
    };
    Opened opened(Error(Kind::canceled, "not opened"));
    if (shape.loses_log_header) {
      opened = co_await open_without_log_header(service, file, options);
    } else {
      opened = co_await image::SealedBackend::open(service, file, options());
    }
    if (!opened) co_return opened.take_error();
    if ((*opened)->recovery().damaged != 0) {
      co_return Error(Kind::integrity, "recovery reports damage");
    }
    co_return std::unique_ptr<image::Backend>(std::move(*opened));
  };
  s.checkpoint = [](image::Backend& backend, image::QueueContext& q, bool) -> Task<Error> {
    co_return co_await static_cast<image::SealedBackend&>(backend).checkpoint(q);
  };
  if (shape.rotates) {
    s.checkpoint = [shape](image::Backend& backend, image::QueueContext& q,
                           bool full) -> Task<Error> {
      auto& sealed = static_cast<image::SealedBackend&>(backend);
      if (full) co_return co_await step_rotation(sealed, q, shape);
      co_return co_await sealed.checkpoint(q);
    };
    s.relocate = [shape](image::Backend& backend, image::QueueContext& q,
                         std::uint64_t cluster) -> Task<Error> {
      const std::uint64_t bytes = std::uint64_t{1} << shape.cluster_bits;
      const std::uint64_t at = cluster * bytes;
      image::SealedBackend::Rekeyed done;
      Error e = co_await static_cast<image::SealedBackend&>(backend).rekey(
          q, {at}, std::min(bytes, shape.sectors * kSectorSize - at), done);
      if (!e && !done.damaged.empty()) e = Error(Kind::integrity, "rekey found damage");
      if (!e && !done.unreadable.empty()) e = Error(Kind::io_error, "rekey could not read");
      co_return e;
    };
  }
  s.begin_run = [](std::uint64_t) {
    trace().reset();
    nonce_tracer.store(&consume);
  };
  s.verdict = [] { return trace().duplicate(); };
  return s;
}

}  // namespace pqblk::test
