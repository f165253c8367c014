#include "sealed/sessions.h"

#include <algorithm>
#include <cassert>
#include <ctime>

#include "sealed/planted_faults.h"

namespace pqblk::sealed {
namespace {

constexpr std::size_t kMacAt = 96;

Mac32 mac_of(const MacKeys& mac, const char* label, const Uuid& uuid, const std::uint8_t* bytes) {
  return labelled_mac(mac.sessions, label, uuid, {bytes, kMacAt});
}

bool is_free(const SessionEntryRaw& raw) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(&raw);
  for (std::size_t i = 0; i < sizeof raw; ++i) {
    if (bytes[i] != 0) return false;
  }
  return true;
}

Result<crypto::AeadKey> derive_key(const crypto::SecretKey& data_key, const char* label,
                                   const SessionEntryRaw& entry, const Uuid& uuid,
                                   crypto::Suite suite) {
  std::vector<std::uint8_t> info(label, label + std::strlen(label));
  info.insert(info.end(), uuid.begin(), uuid.end());
  const auto* id = reinterpret_cast<const std::uint8_t*>(&entry.id);
  info.insert(info.end(), id, id + 4);
  info.push_back(static_cast<std::uint8_t>(suite));
  std::array<std::uint8_t, 32> bytes;
  crypto::hkdf_sha3_256(data_key.bytes(), entry.salt, info, bytes);
  Result<crypto::AeadKey> key = crypto::AeadKey::create(suite, bytes);
  crypto::wipe(bytes.data(), bytes.size());
  return key;
}

Error no_session(std::uint32_t id) {
  return Error(Kind::wrong_key, "no session " + std::to_string(id) + " is in the session table");
}

}  // namespace

Sessions::Sessions(const Extension& extension, VolumeKeys& keys, const MacKeys& mac)
    : keys_(keys),
      epoch_(keys.current_epoch),
      mac_(mac),
      uuid_(extension.uuid),
      suite_(extension.suite),
      place_{extension.session_table[0], extension.session_table[1]},
      length_(extension.session_table_length) {}

AlignedBuffer Sessions::empty_copy(std::size_t length, const Uuid& uuid, const MacKeys& mac) {
  AlignedBuffer image(length);
  SessionHeadRaw head;
  std::memset(&head, 0, sizeof head);
  std::memcpy(head.magic, kSessionMagic, 8);
  head.version = 1;
  const Mac32 m = mac_of(mac, "head", uuid, reinterpret_cast<const std::uint8_t*>(&head));
  std::memcpy(head.mac, m.data(), m.size());
  std::memcpy(image.data(), &head, sizeof head);
  return image;
}

// Takes the valid entries of one copy into the union. An invalid head or entry asks for a repair.
Error Sessions::absorb(const AlignedBuffer& copy, bool& head_valid, bool any_epoch) {
  SessionHeadRaw head;
  std::memcpy(&head, copy.data(), sizeof head);
  const Mac32 want = mac_of(mac_, "head", uuid_, copy.data());
  head_valid = std::memcmp(head.magic, kSessionMagic, 8) == 0 && crypto::equal_ct(want, head.mac);
  if (head_valid) high_water_ = std::max(high_water_, head.high_water.get());
  if (!head_valid) needs_repair_ = true;
  for (std::size_t n = 1; n < copy.size() / kSessionEntryBytes; ++n) {
    SessionEntryRaw raw;
    std::memcpy(&raw, copy.data() + n * kSessionEntryBytes, sizeof raw);
    if (is_free(raw)) continue;
    const Mac32 mac = mac_of(mac_, "entry", uuid_, reinterpret_cast<const std::uint8_t*>(&raw));
    if (!crypto::equal_ct(mac, raw.mac) || raw.id == 0 || raw.id > kSessionIdMax) {
      needs_repair_ = true;
      continue;
    }
    high_water_ = std::max(high_water_, raw.id.get());
    if (!any_epoch && data_key(raw.epoch) == nullptr) continue;
    entries_.try_emplace(raw.id, Known{raw, n, nullptr});
  }
  return {};
}

Task<Error> Sessions::read_copies(io::Queue& io, const io::File& file, bool& any_head) {
  AlignedBuffer copy[2] = {AlignedBuffer(length_), AlignedBuffer(length_)};
  for (int i = 0; i < 2; ++i) {
    if (Error e = co_await io.read(file, place_[i], copy[i].data(), copy[i].size())) {
      if (e.kind() != Kind::io_error) co_return e;
      needs_repair_ = true;  // an unreadable copy is what the other one is for
      continue;
    }
    bool valid = false;
    if (Error e = absorb(copy[i], valid)) co_return e;
    any_head = any_head || valid;
  }
  if (std::memcmp(copy[0].data(), copy[1].data(), copy[0].size()) != 0) needs_repair_ = true;
  co_return require_room();
}

Error Sessions::require_room() const {
  if ((entries_.size() + 1) * kSessionEntryBytes <= length_) return {};
  return Error(Kind::integrity, "the session table's copies hold more entries than fit");
}

Task<Result<std::unique_ptr<Sessions>>> Sessions::load(io::Queue& io, const io::File& file,
                                                       const Extension& extension, VolumeKeys& keys,
                                                       const MacKeys& mac) {
  std::unique_ptr<Sessions> table(new Sessions(extension, keys, mac));
  bool any_head = false;
  if (Error e = co_await table->read_copies(io, file, any_head)) co_return e;
  if (!any_head) co_return Error(Kind::integrity, "both copies of the session table are damaged");
  co_return std::move(table);
}

Task<Result<std::unique_ptr<Sessions>>> Sessions::load_with(io::Queue& io, const io::File& file,
                                                            const Extension& extension,
                                                            VolumeKeys& keys, const MacKeys& mac,
                                                            std::span<const std::uint8_t> backup,
                                                            bool place_certain) {
  std::unique_ptr<Sessions> table(new Sessions(extension, keys, mac));
  bool any_head = false;
  if (Error e = co_await table->read_copies(io, file, any_head)) co_return e;
  const std::size_t before = table->entries_.size();
  if (!any_head && before == 0 && !place_certain) {
    co_return Error(Kind::integrity, "no session table is where the header has it");
  }
  table->damaged_ = !any_head;
  if (backup.empty()) co_return std::move(table);
  AlignedBuffer third(
      std::max<std::size_t>(table->length_, align_up<std::size_t>(backup.size(), kPage)));
  std::copy(backup.begin(), backup.end(), third.data());
  bool valid = false;
  if (Error e = table->absorb(third, valid, false)) co_return e;
  if (!valid) co_return Error(Kind::integrity, "the session table of the backup does not hold");
  if (Error e = table->require_room()) co_return e;
  table->restored_ = static_cast<std::uint32_t>(table->entries_.size() - before);
  if (table->restored_ > 0) table->needs_repair_ = true;
  co_return std::move(table);
}

std::uint32_t Sessions::newest_epoch() const {
  const auto newest = std::max_element(entries_.begin(), entries_.end(),
                                       [](auto& a, auto& b) { return a.first < b.first; });
  return newest == entries_.end() ? 0 : newest->second.raw.epoch.get();
}

Error Sessions::require_newest() const {
  const std::uint32_t epoch = newest_epoch();
  if (epoch == 0 || data_key(epoch) != nullptr) return {};
  return Error(Kind::wrong_key, "the disk was last written under a data key of epoch " +
                                    std::to_string(epoch) + ", which is missing");
}

void Sessions::go_on_in_newest() {
  const std::uint32_t epoch = newest_epoch();
  if (epoch > epoch_.load(std::memory_order_acquire)) {
    epoch_.store(epoch, std::memory_order_release);
  }
}

bool Sessions::lacks_key(std::uint32_t id) const {
  std::lock_guard guard(mutex_);
  const auto known = entries_.find(id);
  return known != entries_.end() && data_key(known->second.raw.epoch) == nullptr;
}

Task<Error> Sessions::repair_copies(io::Queue& io, const io::File& file) {
  if (needs_repair_) co_return co_await repair(io, file);
  co_return Error();
}

const DataKey* Sessions::data_key(std::uint32_t epoch) const {
  for (const DataKey& key : keys_.data) {
    if (key.epoch == epoch) return &key;
  }
  return nullptr;
}

Result<std::unique_ptr<SessionKeys>> Sessions::derive(const SessionEntryRaw& entry, Use use) const {
  const DataKey* const key = data_key(entry.epoch);
  if (key == nullptr) {
    return Error(Kind::wrong_key, "no data key of epoch " + std::to_string(entry.epoch.get()));
  }
  Result<crypto::AeadKey> sector = derive_key(key->key, "pqblk/v1 sector", entry, uuid_, suite_);
  if (!sector) return sector.take_error();
  std::unique_ptr<SessionKeys> out(
      new SessionKeys{entry.id, entry.epoch, {}, std::move(*sector), std::nullopt});
  std::copy(std::begin(entry.salt), std::end(entry.salt), out->salt.begin());
  if (use == Use::sectors) return out;
  Result<crypto::AeadKey> log = derive_key(key->key, "pqblk/v1 log", entry, uuid_, suite_);
  if (!log) return log.take_error();
  out->log = std::move(*log);
  return out;
}

Error Sessions::find_or_derive(std::uint32_t id, KeyLease& lease) {
  lease.keys_ = lease.own_.get();
  if (lease.keys_ != nullptr && lease.keys_->id == id) return {};
  std::lock_guard guard(mutex_);
  const auto known = entries_.find(id);
  if (known == entries_.end()) return no_session(id);
  std::unique_ptr<SessionKeys>& kept = known->second.keys;
  if (!kept) {
    const bool scarce = crypto::aead_keys_scarce();
    if (scarce) lease.own_.reset();  // its slots first
    Result<std::unique_ptr<SessionKeys>> derived = derive(known->second.raw, Use::sectors);
    if (!derived) return derived.take_error();
    (scarce ? lease.own_ : kept) = std::move(*derived);
  }
  lease.keys_ = kept ? kept.get() : lease.own_.get();
  if (kept) recent_[id % kRecent].store(kept.get(), std::memory_order_release);
  return {};
}

Result<std::unique_ptr<SessionKeys>> Sessions::log_keys(std::uint32_t id) const {
  std::lock_guard guard(mutex_);
  const auto known = entries_.find(id);
  if (known == entries_.end()) return no_session(id);
  return derive(known->second.raw, Use::log_too);
}

std::uint32_t Sessions::epoch_of(std::uint32_t id) const {
  const SessionKeys* keys = recent_[id % kRecent].load(std::memory_order_acquire);
  if (keys != nullptr && keys->id == id) return keys->epoch;
  std::lock_guard guard(mutex_);
  const auto known = entries_.find(id);
  return known == entries_.end() ? 0 : known->second.raw.epoch.get();
}

Error Sessions::use_epoch(DataKey key) {
  if (key.epoch == 0) return Error(Kind::invalid_argument, "epochs count from 1");
  std::lock_guard guard(mutex_);
  const auto known = std::find_if(keys_.data.begin(), keys_.data.end(),
                                  [&](const DataKey& k) { return k.epoch == key.epoch; });
  if (known == keys_.data.end()) {
    keys_.data.push_back(std::move(key));
    epoch_.store(keys_.data.back().epoch, std::memory_order_release);
    return {};
  }
  if (!crypto::equal_ct(known->key.bytes(), key.key.bytes())) {
    return Error(Kind::wrong_key, "epoch " + std::to_string(key.epoch) + " has another data key");
  }
  epoch_.store(key.epoch, std::memory_order_release);
  return {};
}

Task<Error> Sessions::forget_other_epochs(io::Queue& io, const io::File& file) {
  const std::uint32_t keep = epoch();
  {
    std::lock_guard guard(mutex_);
    for (auto& recent : recent_) recent.store(nullptr, std::memory_order_release);
    std::erase_if(entries_, [&](const auto& known) { return known.second.raw.epoch != keep; });
    std::erase_if(keys_.data, [&](const DataKey& key) { return key.epoch != keep; });
  }
  needs_repair_ = true;  // until both copies are written
  co_return co_await repair(io, file);
}

bool Sessions::full() const {
  std::lock_guard guard(mutex_);
  std::size_t last = 0;
  for (const auto& [id, known] : entries_) last = std::max(last, known.position);
  return (last + 2) * kSessionEntryBytes > length_;
}

void Sessions::put_head(AlignedBuffer& image) const {
  SessionHeadRaw head;
  std::memset(&head, 0, sizeof head);
  std::memcpy(head.magic, kSessionMagic, 8);
  head.version = 1;
  head.high_water = high_water_;
  const Mac32 mac = mac_of(mac_, "head", uuid_, reinterpret_cast<const std::uint8_t*>(&head));
  std::memcpy(head.mac, mac.data(), mac.size());
  std::memcpy(image.data(), &head, sizeof head);
}

AlignedBuffer Sessions::build_image() const {
  AlignedBuffer image(length_);
  put_head(image);
  for (const auto& [id, known] : entries_) {
    std::memcpy(image.data() + known.position * kSessionEntryBytes, &known.raw, sizeof known.raw);
  }
  return image;
}

// One copy after the other, each flushed: a crash leaves at least one copy whole.
Task<Error> Sessions::write_both(io::Queue& io, const io::File& file, const AlignedBuffer& image,
                                 std::size_t first, std::size_t bytes) {
  for (const std::uint64_t place : place_) {
    if (Error e = co_await io.write(file, place + first, image.data() + first, bytes)) co_return e;
    if (first != 0) {
      if (Error e = co_await io.write(file, place, image.data(), kPage)) co_return e;
    }
    if (Error e = co_await io.fdatasync(file)) co_return e;
  }
  co_return Error();
}

// Entries may share a position when each copy lost a different write; give every one its own.
Task<Error> Sessions::repair(io::Queue& io, const io::File& file) {
  {
    std::lock_guard guard(mutex_);
    std::size_t position = 1;
    for (auto& [id, known] : entries_) known.position = position++;
  }
  const AlignedBuffer image = build_image();
  if (Error e = co_await write_both(io, file, image, 0, image.size())) co_return e;
  needs_repair_ = false;
  co_return Error();
}

Task<Result<const SessionKeys*>> Sessions::begin(io::Queue& io, const io::File& file) {
  assert(!full());
  if (needs_repair_) {
    if (Error e = co_await repair(io, file)) co_return e;
  }
  if (high_water_ >= kSessionIdMax) {
    co_return Error(Kind::unsupported,
                    "all session ids of this disk are used: copy it to a new one");
  }
  SessionEntryRaw raw;
  std::memset(&raw, 0, sizeof raw);
  raw.id = high_water_ + 1;
  raw.epoch = epoch();
  raw.created = static_cast<std::uint64_t>(std::time(nullptr));
  if (!planted(Fault::equal_session_salts)) {
    if (Error e = crypto::random_bytes(raw.salt)) co_return e;
  }
  const Mac32 mac = mac_of(mac_, "entry", uuid_, reinterpret_cast<const std::uint8_t*>(&raw));
  std::memcpy(raw.mac, mac.data(), mac.size());
  std::size_t position = 1;
  const SessionKeys* keys = nullptr;
  {
    std::lock_guard guard(mutex_);
    Result<std::unique_ptr<SessionKeys>> derived = derive(raw, Use::log_too);
    if (!derived) co_return derived.take_error();
    keys = derived->get();
    for (const auto& [id, known] : entries_) position = std::max(position, known.position + 1);
    entries_.emplace(raw.id, Known{raw, position, std::move(*derived)});
    high_water_ = raw.id;
  }
  const AlignedBuffer image = build_image();
  const std::size_t first = align_down<std::size_t>(position * kSessionEntryBytes, kPage);
  if (Error e = co_await write_both(io, file, image, first, kPage)) co_return e;
  co_return keys;
}

Task<Error> Sessions::move_to(io::Queue& io, const io::File& file, std::uint64_t a, std::uint64_t b,
                              std::uint32_t length) {
  place_[0] = a;
  place_[1] = b;
  length_ = length;
  const AlignedBuffer image = build_image();
  if (Error e = co_await write_both(io, file, image, 0, image.size())) co_return e;
  needs_repair_ = false;
  co_return Error();
}

}  // namespace pqblk::sealed
