#include <algorithm>
#include <cassert>
#include <cstring>

#include "image/backend.h"

namespace pqblk::image {
namespace {

// Calls fn(base, length) for each piece of memory until `size` bytes were visited.
template <class Fn>
void for_each_piece(const GuestBuffers& data, Fn fn) {
  std::uint64_t left = data.size;
  std::size_t skip = data.skip;
  for (const iovec& v : data.iov) {
    if (left == 0) return;
    const std::size_t length = std::min<std::uint64_t>(v.iov_len - skip, left);
    if (length != 0) fn(static_cast<std::uint8_t*>(v.iov_base) + skip, length);
    left -= length;
    skip = 0;
  }
  assert(left == 0);
}

}  // namespace

GuestBuffers GuestBuffers::part(std::uint64_t offset, std::uint64_t length) const {
  assert(offset + length <= size);
  std::uint64_t from = skip + offset;
  std::size_t i = 0;
  while (i < iov.size() && from >= iov[i].iov_len) from -= iov[i++].iov_len;
  return {iov.subspan(i), static_cast<std::size_t>(from), length};
}

std::uint8_t* GuestBuffers::contiguous(std::uint64_t offset, std::uint64_t length) const {
  std::uint64_t at = skip + offset;
  for (const iovec& v : iov) {
    if (at < v.iov_len) {
      return at + length <= v.iov_len ? static_cast<std::uint8_t*>(v.iov_base) + at : nullptr;
    }
    at -= v.iov_len;
  }
  return nullptr;
}

std::vector<iovec> GuestBuffers::pieces() const {
  std::vector<iovec> out;
  out.reserve(iov.size());
  for_each_piece(*this, [&](std::uint8_t* base, std::size_t length) {
    out.push_back({base, length});
  });
  return out;
}

void GuestBuffers::copy_in(const void* from) const {
  auto* source = static_cast<const std::uint8_t*>(from);
  for_each_piece(*this, [&](std::uint8_t* base, std::size_t length) {
    std::memcpy(base, source, length);
    source += length;
  });
}

void GuestBuffers::copy_out(void* to) const {
  auto* target = static_cast<std::uint8_t*>(to);
  for_each_piece(*this, [&](const std::uint8_t* base, std::size_t length) {
    std::memcpy(target, base, length);
    target += length;
  });
}

void GuestBuffers::zero() const {
  for_each_piece(*this,
                 [](std::uint8_t* base, std::size_t length) { std::memset(base, 0, length); });
}

}  // namespace pqblk::image
