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

std::vector<std::uint8_t> state_of(const KeyArea& area) {
  std::vector<std::uint8_t> state;
  for (const KeyAreaCopy& copy : area) {
    state.insert(state.end(), copy.checksum.begin(), copy.checksum.end());
  }
  return state;
}

Task<Result<KeyArea>> read_key_area(io::Queue& io, const io::File& file,
                                    const Extension& extension) {
  KeyArea area;
  AlignedBuffer bytes(kKeyAreaCopyBytes);
  for (std::size_t copy = 0; copy < area.size(); ++copy) {
    Error e = co_await io.read(file, extension.key_area[copy], bytes.data(), bytes.size());
    if (e && e.kind() != Kind::io_error) co_return e;
    KeyAreaHeadRaw head;
    std::memcpy(&head, bytes.data(), sizeof head);
    const crypto::Digest sum = checksum_of(head, bytes.data() + kPage);
    const bool valid = !e && std::memcmp(head.magic, kKeyAreaMagic, 8) == 0 &&
                       head.blob_length == kKeyAreaBytes && head.number != 0 &&
                       std::memcmp(sum.data(), head.checksum, sum.size()) == 0;
    if (!valid) continue;
    area[copy].number = head.number;
    area[copy].checksum = sum;
    area[copy].blob.assign(bytes.data() + kPage, bytes.data() + kPage + kKeyAreaBytes);
  }
  co_return std::move(area);
}

Task<Error> write_key_area_copy(io::Queue& io, const io::File& file, const Extension& extension,
                                std::uint32_t copy, std::uint64_t number,
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
  head.number = number;
  head.blob_length = static_cast<std::uint32_t>(kKeyAreaBytes);
  std::copy(blob.begin(), blob.end(), bytes.data() + kPage);
  const crypto::Digest sum = checksum_of(head, bytes.data() + kPage);
  std::copy(sum.begin(), sum.end(), head.checksum);
  std::memcpy(bytes.data(), &head, sizeof head);
  co_return co_await io.write(file, extension.key_area[copy], bytes.data(), bytes.size());
}

}  // namespace pqblk::sealed
