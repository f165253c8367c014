#include "sealed/key_area.h"

#include <algorithm>

#include "base/aligned.h"

namespace pqblk::sealed {
namespace {

crypto::Digest checksum_of(const KeyAreaHeadRaw& head, const std::uint8_t* blob) {
  std::vector<std::uint8_t> message(offsetof(KeyAreaHeadRaw, checksum) + kKeyAreaBytes);
  std::memcpy(message.data(), &head, offsetof(KeyAreaHeadRaw, checksum));
  std::memcpy(message.data() + offsetof(KeyAreaHeadRaw, checksum), blob, kKeyAreaBytes);
  return crypto::sha3_256(message);
}

}  // namespace

Task<Result<KeyArea>> read_key_area(io::Queue& io, const io::File& file,
                                    const Extension& extension) {
  KeyArea area;
  AlignedBuffer bytes(kKeyAreaCopyBytes);
  for (int copy = 0; copy < 2; ++copy) {
    Error e = co_await io.read(file, extension.key_area[copy], bytes.data(), bytes.size());
    if (e && e.kind() != Kind::io_error) co_return e;
    KeyAreaHeadRaw head;
    std::memcpy(&head, bytes.data(), sizeof head);
    const bool valid = !e && std::memcmp(head.magic, kKeyAreaMagic, 8) == 0 &&
                       head.blob_length == kKeyAreaBytes && head.generation != 0 &&
                       checksum_of(head, bytes.data() + kPage) ==
                           *reinterpret_cast<const crypto::Digest*>(head.checksum);
    area.damaged[copy] = !valid;
    if (valid && area.newest >= 0) {
      area.differ = std::memcmp(area.blob.data(), bytes.data() + kPage, kKeyAreaBytes) != 0;
    }
    if (!valid || head.generation <= area.generation) continue;
    area.generation = head.generation;
    area.newest = copy;
    area.blob.assign(bytes.data() + kPage, bytes.data() + kPage + kKeyAreaBytes);
  }
  co_return std::move(area);
}

Task<Error> write_key_area_copy(io::Queue& io, const io::File& file, const Extension& extension,
                                int copy, std::uint64_t generation,
                                const std::vector<std::uint8_t>& blob) {
  if (blob.size() != kKeyAreaBytes) {
    co_return Error(Kind::invalid_argument, "the key area must be " +
                                                std::to_string(kKeyAreaBytes) + " bytes, not " +
                                                std::to_string(blob.size()));
  }
  AlignedBuffer bytes(kKeyAreaCopyBytes);
  KeyAreaHeadRaw head;
  std::memset(&head, 0, sizeof head);
  std::memcpy(head.magic, kKeyAreaMagic, 8);
  head.generation = generation;
  head.blob_length = static_cast<std::uint32_t>(kKeyAreaBytes);
  std::copy(blob.begin(), blob.end(), bytes.data() + kPage);
  const crypto::Digest sum = checksum_of(head, bytes.data() + kPage);
  std::copy(sum.begin(), sum.end(), head.checksum);
  std::memcpy(bytes.data(), &head, sizeof head);
  co_return co_await io.write(file, extension.key_area[copy], bytes.data(), bytes.size());
}

Task<Error> level_key_area(io::Queue& io, const io::File& file, const Extension& extension,
                           const KeyArea& area) {
  if (area.newest < 0) {
    co_return Error(Kind::corrupt, "both copies of the key area are damaged");
  }
  if (Error e = co_await write_key_area_copy(io, file, extension, 1 - area.newest, area.generation,
                                             area.blob)) {
    co_return e;
  }
  co_return co_await io.fdatasync(file);
}

}  // namespace pqblk::sealed
