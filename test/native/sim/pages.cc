#include "sim/pages.h"

#include <algorithm>
#include <cstring>

namespace pqblk::sim {

std::uint64_t mix64(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}

std::uint64_t hash_bytes(const void* data, std::size_t length) {
  const auto* p = static_cast<const std::uint8_t*>(data);
  std::uint64_t lanes[4] = {1, 2, 3, length};
  for (; length >= 32; length -= 32, p += 32) {
    std::uint64_t words[4];
    std::memcpy(words, p, sizeof words);
    for (int i = 0; i < 4; ++i) {
      lanes[i] = (lanes[i] ^ words[i]) * 0x9e3779b97f4a7c15U;
      lanes[i] ^= lanes[i] >> 29;
    }
  }
  for (; length > 0; --length, ++p) lanes[0] = (lanes[0] ^ *p) * 0x100000001b3U;
  return mix64(lanes[0] + mix64(lanes[1] + mix64(lanes[2] + mix64(lanes[3]))));
}

void Pages::resize(std::uint64_t size) {
  if (size < size_) {
    zero(size, size_ - size);
    const std::uint64_t pages = (size + kPage - 1) / kPage;
    chunks_.resize((pages + kPagesPerChunk - 1) / kPagesPerChunk);
  } else {
    const std::uint64_t pages = (size + kPage - 1) / kPage;
    const std::uint64_t chunks = (pages + kPagesPerChunk - 1) / kPagesPerChunk;
    if (chunks > chunks_.size()) chunks_.resize(chunks);
  }
  size_ = size;
}

const Pages::Page* Pages::find(std::uint64_t page) const {
  const std::uint64_t chunk = page / kPagesPerChunk;
  if (chunk >= chunks_.size() || !chunks_[chunk]) return nullptr;
  return chunks_[chunk]->pages[page % kPagesPerChunk].get();
}

std::shared_ptr<Pages::Page>& Pages::own_slot(std::uint64_t page) {
  std::shared_ptr<Chunk>& chunk = chunks_[page / kPagesPerChunk];
  if (!chunk) {
    chunk = std::make_shared<Chunk>();
  } else if (chunk.use_count() > 1) {
    chunk = std::make_shared<Chunk>(*chunk);
  }
  chunk->hashed = false;
  return chunk->pages[page % kPagesPerChunk];
}

Pages::Page& Pages::own(std::uint64_t page) {
  std::shared_ptr<Page>& slot = own_slot(page);
  if (!slot) {
    slot = std::make_shared<Page>();
  } else if (slot.use_count() > 1) {
    slot = std::make_shared<Page>(*slot);
  }
  slot->hashed = false;
  return *slot;
}

void Pages::read(std::uint64_t offset, void* out, std::size_t length) const {
  auto* to = static_cast<std::uint8_t*>(out);
  while (length > 0) {
    const std::size_t within = offset % kPage;
    const std::size_t part = std::min(length, kPage - within);
    const Page* page = offset < size_ ? find(offset / kPage) : nullptr;
    if (page != nullptr) {
      std::memcpy(to, page->bytes.data() + within, part);
    } else {
      std::memset(to, 0, part);
    }
    to += part;
    offset += part;
    length -= part;
  }
}

void Pages::write(std::uint64_t offset, const void* data, std::size_t length) {
  if (length == 0) return;
  if (offset + length > size_) resize(offset + length);
  const auto* from = static_cast<const std::uint8_t*>(data);
  while (length > 0) {
    const std::size_t within = offset % kPage;
    const std::size_t part = std::min(length, kPage - within);
    std::memcpy(own(offset / kPage).bytes.data() + within, from, part);
    from += part;
    offset += part;
    length -= part;
  }
}

void Pages::zero(std::uint64_t offset, std::uint64_t length) {
  if (offset >= size_) return;
  length = std::min(length, size_ - offset);
  while (length > 0) {
    const std::size_t within = offset % kPage;
    const std::uint64_t part = std::min<std::uint64_t>(length, kPage - within);
    if (find(offset / kPage) != nullptr) {
      if (part == kPage) {
        own_slot(offset / kPage).reset();
      } else {
        std::memset(own(offset / kPage).bytes.data() + within, 0, part);
      }
    }
    offset += part;
    length -= part;
  }
}

std::uint64_t Pages::hash_of(Page& page) {
  if (!page.hashed) {
    static const std::uint64_t zeros = hash_bytes(Page().bytes.data(), kPage);
    page.hash = hash_bytes(page.bytes.data(), kPage) - zeros;  // a page of zeros counts as absent
    page.hashed = true;
  }
  return page.hash;
}

std::uint64_t Pages::hash_of(Chunk& chunk) {
  if (!chunk.hashed) {
    chunk.hash = 0;
    for (std::size_t i = 0; i < kPagesPerChunk; ++i) {
      if (!chunk.pages[i]) continue;
      const std::uint64_t h = hash_of(*chunk.pages[i]);
      if (h != 0) chunk.hash += mix64(h + i * 0x9e3779b97f4a7c15U);
    }
    chunk.hashed = true;
  }
  return chunk.hash;
}

std::uint64_t Pages::hash() const {
  std::uint64_t sum = mix64(size_);
  for (std::size_t i = 0; i < chunks_.size(); ++i) {
    if (!chunks_[i]) continue;
    const std::uint64_t h = hash_of(*chunks_[i]);
    if (h != 0) sum += mix64(h + i * 0xd1b54a32d192ed03U);
  }
  return sum;
}

}  // namespace pqblk::sim
