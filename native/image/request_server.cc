#include "image/request_server.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>
#include <utility>

namespace pqblk::image {

RequestServer::RequestServer(Backend& backend, Settings settings)
    : backend_(backend),
      settings_(std::move(settings)),
      align_(backend.geometry().request_align),
      memory_align_(backend.geometry().memory_align),
      transfer_max_(
          std::max(align_down(backend.geometry().max_transfer != 0
                                  ? std::min(backend.geometry().max_transfer, kTransferMax)
                                  : kTransferMax,
                              align_),
                   align_)),
      size_(backend.geometry().size) {
  assert(align_ != 0 && (align_ & (align_ - 1)) == 0 && align_ <= kBouncePiece);
  assert(memory_align_ != 0 && (memory_align_ & (memory_align_ - 1)) == 0);
}

void RequestServer::serve(RequestQueue& queue, Request& request) { run(queue, request); }

Error RequestServer::check(const Request& request) const {
  switch (request.type) {
    case RequestType::flush:
      return {};
    case RequestType::get_id:
      if (request.length >= kIdBytes) break;
      return Error(Kind::invalid_argument, "the buffer for the disk's id is under 20 bytes");
    case RequestType::in:
    case RequestType::out:
    case RequestType::discard:
    case RequestType::write_zeroes: {
      const std::uint64_t bytes = size();
      if (request.offset > bytes || request.length > bytes - request.offset) {
        return Error(Kind::out_of_range, std::to_string(request.length) + " bytes at " +
                                             std::to_string(request.offset) +
                                             " reach beyond the end of the disk, " +
                                             std::to_string(bytes));
      }
      break;
    }
    default:
      return Error(Kind::unsupported, "request type " +
                                          std::to_string(static_cast<std::uint32_t>(request.type)) +
                                          " is not one of virtio-blk's that this disk knows");
  }
  const bool moves_data = request.type == RequestType::in || request.type == RequestType::out ||
                          request.type == RequestType::get_id;
  if (moves_data) {
    std::uint64_t sum = 0;
    for (std::uint32_t i = 0; i < request.iov_count; ++i) sum += request.iov[i].iov_len;
    if (sum != request.length) {
      return Error(Kind::invalid_argument, "the buffers hold " + std::to_string(sum) +
                                               " bytes, the request says " +
                                               std::to_string(request.length));
    }
  }
  const bool reads = request.type == RequestType::in || request.type == RequestType::get_id;
  if (!reads && settings_.read_only) return Error(Kind::read_only, "the disk was opened read-only");
  return {};
}

bool RequestServer::needs_bounce(const Request& request) const {
  if (((request.offset | request.length) & (align_ - 1)) != 0) return true;
  if (memory_align_ == 1) return false;
  std::uint64_t bits = 0;
  for (std::uint32_t i = 0; i < request.iov_count; ++i) {
    bits |= reinterpret_cast<std::uintptr_t>(request.iov[i].iov_base) | request.iov[i].iov_len;
  }
  return (bits & (memory_align_ - 1)) != 0;
}

Error RequestServer::write_failure() const {
  if (!failed_.load(std::memory_order_acquire)) return {};
  std::lock_guard guard(failure_lock_);
  return failure_;
}

detail::Detached RequestServer::run(RequestQueue& queue, Request& request) {
  QueueContext& q = queue.context();
  Error error = check(request);
  const bool moves = request.type == RequestType::in || request.type == RequestType::out;
  if (error || (request.length == 0 && request.type != RequestType::flush)) {
    // nothing to do
  } else if (moves) {
    const bool bounce = needs_bounce(request);
    if (bounce || request.length > transfer_max_) {
      error = co_await transfer_split(queue, request, bounce);
    } else {
      const GuestBuffers data{{request.iov, request.iov_count}, 0, request.length};
      if (request.type == RequestType::in) {
        error = co_await backend_.read(q, {request.offset}, data);
      } else {
        error =
            co_await write_piece(q, {request.offset, request.length, data, fua_of(request), false});
      }
    }
  } else if (request.type == RequestType::flush) {
    error = co_await flush(q);
  } else if (request.type == RequestType::discard) {
    error = co_await discard(q, request);
  } else if (request.type == RequestType::write_zeroes) {
    error = co_await write_zeroes(q, request);
  } else {
    get_id(request);
  }
  assert(Executor::current() == &q.io);
  if (error) {
    request.status = error.kind() == Kind::unsupported ? Status::unsupp : Status::ioerr;
    request.error = std::move(error);
  } else {
    request.status = Status::ok;
    if (request.error) request.error = Error();
  }
  queue.finish(request);
}

// ---- requests that one pass cannot do ----

// The shared state of the workers of one split request. All run on the queue's thread.
struct RequestServer::Split {
  RequestServer& server;
  QueueContext& context;
  const Request& request;
  const std::uint64_t step;  // cut at multiples of it
  const bool bounce;
  const bool fua;
  std::uint64_t next = 0;    // bytes of the request handed out
  std::uint32_t active = 1;  // workers, and the parent while it starts them
  Error error;
  std::coroutine_handle<> parent;

  bool await_ready() { return --active == 0; }
  void await_suspend(std::coroutine_handle<> h) { parent = h; }
  void await_resume() const {}

  Piece take() {
    const std::uint64_t at = request.offset + next;
    const std::uint64_t cut = align_down(at, step) + step;
    const std::uint64_t length = std::min(cut - at, request.length - next);
    const GuestBuffers whole{{request.iov, request.iov_count}, 0, request.length};
    Piece piece{at, length, whole.part(next, length), fua, bounce};
    next += length;
    return piece;
  }
};

detail::Detached RequestServer::split_worker(Split& split) {
  while (split.next < split.request.length && !split.error) {
    Piece piece = split.take();
    Error e;
    if (split.request.type == RequestType::in) {
      e = co_await read_piece(split.context, piece);
    } else {
      e = co_await write_piece(split.context, piece);
    }
    if (e && !split.error) split.error = std::move(e);
  }
  if (--split.active == 0) split.parent.resume();
}

Task<Error> RequestServer::transfer_split(RequestQueue& queue, const Request& request,
                                          bool bounce) {
  const std::uint64_t step = bounce ? std::min(kBouncePiece, transfer_max_) : transfer_max_;
  // One flush at the end makes all pieces durable; asking for it on each would flush many times.
  const bool flush_after =
      request.type == RequestType::out && fua_of(request) && request.length > step;
  Split split{*this,   queue.context(),
              request, step,
              bounce,  request.type == RequestType::out && fua_of(request) && !flush_after};
  for (std::uint32_t i = 0; i < kPiecesAtOnce && split.next < request.length; ++i) {
    ++split.active;
    split_worker(split);
  }
  co_await split;
  if (!split.error && flush_after) co_return co_await flush(queue.context());
  co_return std::move(split.error);
}

Task<Error> RequestServer::read_piece(QueueContext& q, Piece piece) {
  if (!piece.bounce) co_return co_await backend_.read(q, {piece.offset}, piece.data);
  const std::uint64_t begin = align_down(piece.offset, align_);
  const std::uint64_t end = align_up(piece.offset + piece.length, align_);
  const QueueContext::Buffer buffer = q.buffer(end - begin);
  const iovec v{buffer.data(), end - begin};
  Error e = co_await backend_.read(q, {begin}, {{&v, 1}, 0, end - begin});
  if (!e) piece.data.copy_in(buffer.data() + (piece.offset - begin));
  co_return e;
}

Task<Error> RequestServer::write_piece(QueueContext& q, Piece piece) {
  const std::uint64_t begin = align_down(piece.offset, align_);
  const std::uint64_t end = align_up(piece.offset + piece.length, align_);
  RangeLocks::Range range(locks_, begin, end - begin);
  co_await range;
  if (Error e = write_failure()) co_return e;
  if (!piece.bounce) co_return co_await backend_.write(q, {piece.offset}, piece.data, piece.fua);
  co_return co_await rewrite(q, piece, begin, end);
}

// Read-modify-write of whole blocks, under the caller's range lock.
Task<Error> RequestServer::rewrite(QueueContext& q, const Piece& piece, std::uint64_t begin,
                                   std::uint64_t end) {
  const QueueContext::Buffer buffer = q.buffer(end - begin);
  const std::uint64_t piece_end = piece.offset + piece.length;
  const std::uint64_t last = end - align_;  // the last block
  const bool head = piece.offset != begin;
  const bool tail = piece_end != end && !(head && last == begin);
  if (head) {
    const iovec v{buffer.data(), align_};
    if (Error e = co_await backend_.read(q, {begin}, {{&v, 1}, 0, align_})) co_return e;
  }
  if (tail) {
    const iovec v{buffer.data() + (last - begin), align_};
    if (Error e = co_await backend_.read(q, {last}, {{&v, 1}, 0, align_})) co_return e;
  }
  std::uint8_t* const target = buffer.data() + (piece.offset - begin);
  if (piece.data.iov.empty()) {
    std::memset(target, 0, piece.length);
  } else {
    piece.data.copy_out(target);
  }
  const iovec v{buffer.data(), end - begin};
  co_return co_await backend_.write(q, {begin}, {{&v, 1}, 0, end - begin}, piece.fua);
}

// ---- discard, zeroes, flush, id ----

// Advisory: only whole blocks are discarded.
Task<Error> RequestServer::discard(QueueContext& q, const Request& request) {
  if (Error e = write_failure()) co_return e;
  const std::uint64_t end = align_down(request.offset + request.length, align_);
  std::uint64_t at = align_up(request.offset, align_);
  while (at < end) {
    const std::uint64_t length = std::min(end - at, kMaxZeroBytes);
    RangeLocks::Range range(locks_, at, length);
    co_await range;
    if (Error e = co_await backend_.discard(q, {at}, length)) co_return e;
    at += length;
  }
  co_return Error();
}

Task<Error> RequestServer::write_zeroes(QueueContext& q, const Request& request) {
  if (Error e = write_failure()) co_return e;
  const std::uint64_t end = request.offset + request.length;
  const std::uint64_t whole_begin = std::min(align_up(request.offset, align_), end);
  const std::uint64_t whole_end = std::max(align_down(end, align_), whole_begin);
  if (request.offset != whole_begin) {
    Piece head{request.offset, whole_begin - request.offset, {}, false, true};
    if (Error e = co_await write_piece(q, head)) co_return e;
  }
  if (Error e = co_await zero_whole_blocks(q, whole_begin, whole_end, request.zero_flags)) {
    co_return e;
  }
  if (whole_end != end) {
    Piece tail{whole_end, end - whole_end, {}, false, true};
    if (Error e = co_await write_piece(q, tail)) co_return e;
  }
  if (fua_of(request)) co_return co_await flush(q);
  co_return Error();
}

Task<Error> RequestServer::zero_whole_blocks(QueueContext& q, std::uint64_t begin,
                                             std::uint64_t end, std::uint32_t flags) {
  for (std::uint64_t at = begin; at < end;) {
    const std::uint64_t length = std::min(end - at, kMaxZeroBytes);
    RangeLocks::Range range(locks_, at, length);
    co_await range;
    if (Error e = co_await backend_.write_zeroes(q, {at}, length, flags)) co_return e;
    at += length;
  }
  co_return Error();
}

Task<Error> RequestServer::rekey(QueueContext& q, std::uint64_t offset, std::uint64_t length,
                                 SealedBackend& sealed, SealedBackend::Rekeyed& out) {
  if (Error e = write_failure()) co_return e;
  RangeLocks::Range range(locks_, offset, length);
  co_await range;
  co_return co_await sealed.rekey(q, {offset}, length, out);
}

Task<Error> RequestServer::flush(QueueContext& q) {
  if (settings_.read_only || settings_.cache == Cache::unsafe) co_return Error();
  if (Error e = write_failure()) co_return e;
  Error e = co_await backend_.flush(q);
  if (e) {
    std::lock_guard guard(failure_lock_);
    if (!failed_.load(std::memory_order_relaxed)) failure_ = e;
    failed_.store(true, std::memory_order_release);
  }
  co_return e;
}

void RequestServer::get_id(const Request& request) const {
  std::array<char, kIdBytes> id{};
  settings_.id.copy(id.data(), id.size());
  const GuestBuffers data{{request.iov, request.iov_count}, 0, request.length};
  data.zero();
  data.part(0, kIdBytes).copy_in(id.data());
}

}  // namespace pqblk::image
