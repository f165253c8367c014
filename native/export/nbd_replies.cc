// The answering half of an NBD connection (nbd_connection.h): what became of a request, block
// status, replies, and sending them.
//
// Room export/. All of it runs on the queue's thread, but for the search for extents.
#include <poll.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "export/nbd_connection.h"

namespace pqblk::exports::nbd {

void Connection::complete(Slot& slot) {
  --in_flight_;
  image::Request& request = slot.request;
  if (request.status != image::Status::ok) {
    counters_.errors.add(1);
    Errno error = Errno::io;
    switch (request.error.kind()) {
      case Kind::no_space:
        error = Errno::no_space;
        break;
      case Kind::read_only:
        error = Errno::perm;
        break;
      case Kind::no_memory:
        error = Errno::no_memory;
        break;
      case Kind::out_of_range:
      case Kind::invalid_argument:
        error = Errno::invalid;
        break;
      case Kind::unsupported:
        error = Errno::not_supported;
        break;
      case Kind::closed:
        error = Errno::shutdown;
        break;
      default:
        break;
    }
    constexpr std::array<std::string_view, kCommands> kNames{
        "read", "write", "", "flush", "trim", "cache", "write zeroes", "block status"};
    owner_.failed(request.error, std::string(kNames[static_cast<std::size_t>(slot.command)]) +
                                     " of " + std::to_string(slot.length) + " bytes at " +
                                     std::to_string(slot.offset));
    return answer_error(slot, error, kind_name(request.error.kind()));
  }
  const bool flush_after = slot.command == Command::trim && (slot.flags & kFua) != 0 &&
                           request.type == image::RequestType::discard;
  if (flush_after) {
    request.type = image::RequestType::flush;
    ++in_flight_;
    return disk_.start(queue_, request);
  }
  answer(slot);
}

// ---- block status ----

// Looking for extents blocks, so it happens on the server's own thread.
Task<void> Connection::block_status(Slot& slot) {
  co_await resume_on(owner_.service());
  std::vector<StatusEntry> entries;
  Error error = find_extents(slot, entries);
  co_await resume_on(disk_.ring(queue_));
  slot.request.error = std::move(error);
  slot.request.status = slot.request.error ? image::Status::ioerr : image::Status::ok;
  if (!slot.request.error) {
    const std::size_t bytes = sizeof(Be32) + entries.size() * sizeof(StatusEntry);
    if (take_memory(slot, bytes)) {
      const Be32 id(kBaseAllocation);
      std::memcpy(slot.data, &id, sizeof id);
      std::memcpy(slot.data + sizeof id, entries.data(), bytes - sizeof id);
      slot.body_size = static_cast<std::uint32_t>(bytes);
    } else {
      slot.request.status = image::Status::ioerr;
      slot.request.error = Error(Kind::no_memory, "no memory for the extents");
    }
  }
  complete(slot);
}

// Neighbours of one kind are joined. The reply may end before the range does ("Block status").
Error Connection::find_extents(const Slot& slot, std::vector<StatusEntry>& entries) {
  std::uint64_t at = slot.offset;
  const std::uint64_t end = slot.offset + slot.length;
  std::uint32_t last_state = 0;
  for (std::uint32_t step = 0; at < end && step < kStatusStepsMax; ++step) {
    auto found = disk_.extent(at, end - at);
    if (!found) return entries.empty() ? found.take_error() : Error();
    std::uint32_t state = 0;
    if (found->kind == image::ExtentKind::zero) state = kStateZero;
    if (found->kind == image::ExtentKind::hole) state = kStateZero | kStateHole;
    const auto length = static_cast<std::uint32_t>(found->length);
    if (!entries.empty() && state == last_state) {
      entries.back().length = entries.back().length + length;
    } else {
      const std::size_t most = (slot.flags & kReqOne) != 0 ? 1 : kStatusExtentsMax;
      if (entries.size() == most) break;
      entries.push_back({length, state});
    }
    last_state = state;
    at += length;
  }
  return {};
}

// ---- replies ----

template <class T>
void Connection::set_head(Slot& slot, const T& head) {
  static_assert(sizeof head <= sizeof slot.head);
  std::memcpy(slot.head.data(), &head, sizeof head);
  slot.head_size = sizeof head;
}

// "Structured reply types". A read is answered in one chunk, so it is never fragmented.
void Connection::answer_read(Slot& slot) {
  const auto chunk = [&](Chunk type, std::uint32_t length) {
    return ChunkHeader{kChunkMagic, kChunkDone, static_cast<std::uint16_t>(type), slot.cookie,
                       length};
  };
  if (slot.length == 0) {
    set_head(slot, chunk(Chunk::none, 0));
    return;
  }
  // Zeros need not be moved. Data shows itself in the first bytes; the rest is looked at only then.
  constexpr std::size_t kProbe = 16;
  static constexpr std::array<std::uint8_t, kProbe> kZeros{};
  const bool hole = slot.length >= kPreferredBlock && (slot.flags & kDf) == 0 &&
                    std::memcmp(slot.data, kZeros.data(), kProbe) == 0 &&
                    std::memcmp(slot.data, slot.data + kProbe, slot.length - kProbe) == 0;
  if (hole) {
    constexpr auto kBody = static_cast<std::uint32_t>(sizeof(HoleChunk) - sizeof(ChunkHeader));
    set_head(slot, HoleChunk{chunk(Chunk::offset_hole, kBody), slot.offset, slot.length});
  } else {
    const auto body = static_cast<std::uint32_t>(sizeof(Be64) + slot.length);
    set_head(slot, DataChunk{chunk(Chunk::offset_data, body), slot.offset});
    slot.body_size = slot.length;
  }
}

void Connection::answer(Slot& slot) {
  if (slot.command == Command::block_status) {
    set_head(slot,
             ChunkHeader{kChunkMagic, kChunkDone, static_cast<std::uint16_t>(Chunk::block_status),
                         slot.cookie, slot.body_size});
  } else if (slot.command == Command::read && agreement_.structured) {
    answer_read(slot);
  } else {
    set_head(slot, SimpleReply{kSimpleReplyMagic, 0, slot.cookie});
    if (slot.command == Command::read) slot.body_size = slot.length;
  }
  send_later(slot);
}

void Connection::answer_error(Slot& slot, Errno error, std::string_view why) {
  slot.body_size = 0;
  if (agreement_.structured) {
    why = why.substr(0, sizeof slot.head - sizeof(ErrorChunk));
    const auto length = static_cast<std::uint16_t>(why.size());
    const auto body = static_cast<std::uint32_t>(sizeof(ErrorChunk) - sizeof(ChunkHeader) + length);
    set_head(slot, ErrorChunk{{kChunkMagic, kChunkDone, static_cast<std::uint16_t>(Chunk::error),
                               slot.cookie, body},
                              static_cast<std::uint32_t>(error),
                              length});
    std::copy(why.begin(), why.end(), slot.head.begin() + sizeof(ErrorChunk));
    slot.head_size += length;
  } else {
    set_head(slot, SimpleReply{kSimpleReplyMagic, static_cast<std::uint32_t>(error), slot.cookie});
  }
  send_later(slot);
}

// All replies of a turn go out together, at its end.
void Connection::send_later(Slot& slot) {
  const auto command = static_cast<std::size_t>(slot.command);
  if (command < kCommands) counters_.commands[command].add(1);
  slot.next = nullptr;
  *out_end_ = &slot;
  out_end_ = &slot.next;
  disk_.defer(queue_, turn_later_);
}

void Connection::flush() {
  while (out_head_ != nullptr && !poll_out_.armed) {
    if (broken_) return drop_output();
    std::array<iovec, kPiecesPerSend> pieces;
    std::size_t count = 0;
    std::size_t skip = sent_of_head_;
    for (Slot* slot = out_head_; slot != nullptr && count + 2 <= pieces.size(); slot = slot->next) {
      if (skip < slot->head_size) {
        pieces[count++] = {slot->head.data() + skip, slot->head_size - skip};
        skip = slot->head_size;
      }
      skip -= slot->head_size;
      if (skip < slot->body_size) pieces[count++] = {slot->data + skip, slot->body_size - skip};
      skip = 0;
    }
    const Stream::Transfer done = stream_->send({pieces.data(), count});
    if (done.bytes != 0) sent(done.bytes);
    switch (done.state) {
      case Stream::State::ok:
        break;
      case Stream::State::wait_write:
        arm(poll_out_, POLLOUT);
        break;
      case Stream::State::wait_read:
        return arm(poll_in_, POLLIN);
      case Stream::State::closed:
        broken_ = true;
        read_no_more();
        break;
    }
  }
}

void Connection::sent(std::size_t bytes) {
  counters_.sent_bytes.add(bytes);
  progress_ns_.store(disk_.ring(queue_).now_ns(), std::memory_order_relaxed);
  bytes += sent_of_head_;
  while (out_head_ != nullptr) {
    const std::size_t whole = std::size_t{out_head_->head_size} + out_head_->body_size;
    if (bytes < whole) break;
    bytes -= whole;
    Slot& slot = *out_head_;
    out_head_ = slot.next;
    release(slot);
  }
  if (out_head_ == nullptr) out_end_ = &out_head_;
  sent_of_head_ = bytes;
}

void Connection::drop_output() {
  while (out_head_ != nullptr) {
    Slot& slot = *out_head_;
    out_head_ = slot.next;
    release(slot);
  }
  out_end_ = &out_head_;
  sent_of_head_ = 0;
}

}  // namespace pqblk::exports::nbd
