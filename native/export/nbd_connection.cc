#include "export/nbd_connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <utility>

namespace pqblk::exports::nbd {
namespace {

std::size_t class_of(std::size_t bytes) {
  return static_cast<std::size_t>(
      std::bit_width((std::max(bytes, kBufferAlign) - 1) / kBufferAlign));
}
std::size_t capacity_of(std::size_t bytes) { return kBufferAlign << class_of(bytes); }

bool moves_data(Command command) { return command == Command::read || command == Command::write; }

bool changes(Command command) {
  return command == Command::write || command == Command::trim || command == Command::write_zeroes;
}

}  // namespace

Connection::Connection(ConnectionOwner& owner, image::Disk& disk, std::uint32_t queue,
                       std::unique_ptr<Stream> stream, const Agreement& agreement, bool fast_zero,
                       std::span<const std::uint8_t> early)
    : owner_(owner),
      disk_(disk),
      queue_(queue),
      stream_(std::move(stream)),
      agreement_(agreement),
      fast_zero_(fast_zero),
      received_(new std::uint8_t[kReceiveBytes]),
      progress_ns_(disk.ring(queue).now_ns()) {
  assert(early.size() <= kReceiveBytes);
  std::copy(early.begin(), early.end(), received_.get());
  end_ = early.size();
  poll_in_.connection = poll_out_.connection = this;
  turn_later_.run = [](image::Deferred& work) { static_cast<Connection*>(work.context)->turn(); };
  turn_later_.context = this;
}

Connection::~Connection() {
  assert(in_flight_ == 0 && !poll_in_.armed && !poll_out_.armed && !turn_later_.pending);
  for (const auto& slot : slots_) std::free(slot->data);
  for (const auto& buffers : free_buffers_) {
    for (std::uint8_t* buffer : buffers) std::free(buffer);
  }
}

// ---- any thread ----

void Connection::start() {
  disk_.on_queue(queue_, [this] { begin(); });
}

void Connection::stop() {
  stopping_.store(true, std::memory_order_release);
  ::shutdown(stream_->fd(), SHUT_RD);  // completes the poll
}

void Connection::cut() {
  stopping_.store(true, std::memory_order_release);
  ::shutdown(stream_->fd(), SHUT_RDWR);
}

std::uint64_t Connection::silence(std::uint64_t now, Waiting waiting) const {
  if (waiting_.load(std::memory_order_relaxed) != waiting) return 0;
  const std::uint64_t since = progress_ns_.load(std::memory_order_relaxed);
  return now > since ? now - since : 0;
}

// ---- the queue's thread ----

void Connection::begin() {
  parse();
  receive();
  turn();
}

void Connection::arm(Socket& poll, short events) {
  if (poll.armed) return;
  poll.armed = true;
  poll.type = io::OpType::poll;
  poll.poll_fd = stream_->fd();
  poll.poll_events = events;
  poll.completed = socket_ready;
  disk_.ring(queue_).submit(poll);
}

void Connection::socket_ready(io::Op& op) {
  auto& poll = static_cast<Socket&>(op);
  poll.armed = false;
  poll.connection->receive();
  poll.connection->turn();  // may be the end of the connection
}

// Sends what is ready; goes on reading when that made room; ends when all is done.
void Connection::turn() {
  flush();
  if (paused_ && has_room(0)) {
    paused_ = false;
    parse();
    if (!paused_) receive();
  }
  progress();
  end_when_done();
}

void Connection::receive() {
  if (stopping_.load(std::memory_order_acquire)) read_no_more();
  for (std::uint32_t round = 0; reading_ && !paused_ && !poll_in_.armed; ++round) {
    if (round == kRoundsPerTurn) return arm(poll_in_, POLLIN | POLLOUT);  // completes at once
    if (begin_ == end_) begin_ = end_ = 0;
    if (begin_ != 0) {
      std::memmove(received_.get(), received_.get() + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    std::array<iovec, 2> to{};
    std::size_t pieces = 0;
    if (filling_ != nullptr) {
      to[pieces++] = {filling_->data + filled_, filling_->length - filled_};
    }
    to[pieces++] = {received_.get() + end_, kReceiveBytes - end_};
    const Stream::Transfer got = stream_->receive({to.data(), pieces});
    if (got.bytes != 0) {
      counters_.received_bytes.add(got.bytes);
      progress_ns_.store(disk_.ring(queue_).now_ns(), std::memory_order_relaxed);
      take_payload(got.bytes);
      parse();
    }
    if (got.state == Stream::State::closed) return read_no_more();
    if (got.state == Stream::State::wait_read) arm(poll_in_, POLLIN);
    if (got.state == Stream::State::wait_write) return arm(poll_out_, POLLOUT);
  }
}

// Bytes that went straight into a write's buffer; the rest is in received_.
void Connection::take_payload(std::size_t arrived) {
  if (filling_ != nullptr) {
    const std::size_t n = std::min<std::size_t>(arrived, filling_->length - filled_);
    filled_ += n;
    arrived -= n;
    if (filled_ == filling_->length) launch(*std::exchange(filling_, nullptr));
  }
  end_ += arrived;
}

void Connection::parse() {
  while (reading_ && !paused_ && begin_ != end_ && parse_one()) {
  }
}

// False when more bytes are needed.
bool Connection::parse_one() {
  const std::size_t left = end_ - begin_;
  if (skip_ != 0) {
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(skip_, left));
    skip_ -= n;
    begin_ += n;
    return true;
  }
  if (filling_ != nullptr) {
    const std::size_t n = std::min<std::size_t>(left, filling_->length - filled_);
    std::memcpy(filling_->data + filled_, received_.get() + begin_, n);
    filled_ += n;
    begin_ += n;
    if (filled_ == filling_->length) launch(*std::exchange(filling_, nullptr));
    return true;
  }
  if (left < sizeof(RequestHeader)) return false;
  RequestHeader header;
  std::memcpy(&header, received_.get() + begin_, sizeof header);
  accept(header);
  return true;
}

bool Connection::has_room(std::size_t bytes) const {
  if (used_slots_ == kSlotsMax) return false;
  return used_memory_ == 0 || used_memory_ + bytes <= kSlotMemoryMax;
}

// "Request message". Consumes the header unless it has to wait.
void Connection::accept(const RequestHeader& header) {
  if (header.magic != kRequestMagic) {
    owner_.report("a client sent no request where one was due; it was disconnected");
    return read_no_more();
  }
  const auto command = static_cast<Command>(header.type.get());
  const std::uint32_t length = header.length;
  const bool data = moves_data(command) && length <= kPayloadMax;
  if (!has_room(data ? capacity_of(length) : 0)) {
    paused_ = true;
    return;
  }
  begin_ += sizeof header;
  if (command == Command::disconnect) return read_no_more();

  Slot& slot = take_slot();
  slot.command = command;
  slot.flags = header.flags;
  slot.cookie = header.cookie;
  slot.offset = header.offset;
  slot.length = length;
  Errno refusal = check(slot);
  if (refusal == Errno::ok && data && length != 0 && !take_memory(slot, length)) {
    refusal = Errno::no_memory;
  }
  if (refusal != Errno::ok) {
    if (command == Command::write) skip_ = length;
    counters_.refused.add(1);
    return answer_error(slot, refusal, "the request is not valid here");
  }
  if (length == 0 && command != Command::flush) return answer(slot);
  switch (command) {
    case Command::write:
      filling_ = &slot;
      filled_ = 0;
      return;
    case Command::cache:  // an advice; the next read brings the data soon enough
      return answer(slot);
    case Command::block_status:
      ++in_flight_;
      return spawn(block_status(slot));
    default:
      return launch(slot);
  }
}

// What the protocol asks of a request before its disk sees it ("Request types", "Error values").
Errno Connection::check(Slot& slot) const {
  std::uint16_t allowed = kFua;
  switch (slot.command) {
    case Command::read:
      if (agreement_.structured) allowed |= kDf;
      break;
    case Command::write_zeroes:
      allowed |= kNoHole | kFastZero;
      break;
    case Command::block_status:
      allowed |= kReqOne;
      if (!agreement_.allocation || slot.length == 0) return Errno::invalid;
      break;
    case Command::flush:
      return (slot.flags & ~allowed) != 0 ? Errno::invalid : Errno::ok;
    case Command::write:
    case Command::trim:
    case Command::cache:
      break;
    default:
      return Errno::invalid;
  }
  if ((slot.flags & ~allowed) != 0) return Errno::invalid;
  if (changes(slot.command) && agreement_.read_only) return Errno::perm;
  if (moves_data(slot.command) && slot.length > kPayloadMax) return Errno::invalid;
  const std::uint64_t size = disk_.size();
  if (slot.offset > size || slot.length > size - slot.offset) {
    const bool grows = slot.command == Command::write || slot.command == Command::write_zeroes;
    return grows ? Errno::no_space : Errno::invalid;
  }
  if ((slot.flags & kFastZero) != 0 && !fast_zero_) return Errno::not_supported;
  return Errno::ok;
}

void Connection::launch(Slot& slot) {
  image::Request& request = slot.request;
  request.offset = slot.offset;
  request.length = slot.length;
  request.fua = (slot.flags & kFua) != 0;
  request.zero_flags = 0;
  slot.buffer = {slot.data, slot.length};
  request.iov = &slot.buffer;
  request.iov_count = moves_data(slot.command) ? 1 : 0;
  request.context = &slot;
  request.complete = completed;
  switch (slot.command) {
    case Command::read:
      request.type = image::RequestType::in;
      break;
    case Command::write:
      request.type = image::RequestType::out;
      break;
    case Command::trim:
      request.type = image::RequestType::discard;
      break;
    case Command::write_zeroes:
      request.type = image::RequestType::write_zeroes;
      if ((slot.flags & kNoHole) == 0) request.zero_flags = image::kZeroUnmap;
      break;
    default:
      request.type = image::RequestType::flush;
      break;
  }
  ++in_flight_;
  disk_.start(queue_, request);
}

void Connection::completed(image::Request& request) {
  auto& slot = *static_cast<Slot*>(request.context);
  slot.connection->complete(slot);
}

// ---- slots and memory ----

Connection::Slot& Connection::take_slot() {
  assert(used_slots_ < kSlotsMax);
  ++used_slots_;
  if (free_slots_ == nullptr) {
    slots_.push_back(std::make_unique<Slot>());
    slots_.back()->connection = this;
    return *slots_.back();
  }
  Slot& slot = *free_slots_;
  free_slots_ = slot.next;
  slot.head_size = slot.body_size = 0;
  return slot;
}

bool Connection::take_memory(Slot& slot, std::size_t bytes) {
  assert(slot.data == nullptr);
  const std::size_t capacity = capacity_of(bytes);
  const std::size_t size_class = class_of(bytes);
  if (size_class < free_buffers_.size() && !free_buffers_[size_class].empty()) {
    slot.data = free_buffers_[size_class].back();
    free_buffers_[size_class].pop_back();
    free_bytes_ -= capacity;
  } else {
    slot.data = static_cast<std::uint8_t*>(std::aligned_alloc(kBufferAlign, capacity));
    if (slot.data == nullptr) return false;
  }
  slot.capacity = capacity;
  used_memory_ += capacity;
  return true;
}

void Connection::release(Slot& slot) {
  if (slot.data != nullptr) {
    used_memory_ -= slot.capacity;
    if (slot.capacity <= kKeptBufferMax && free_bytes_ + slot.capacity <= kBuffersKept) {
      free_buffers_[class_of(slot.capacity)].push_back(slot.data);
      free_bytes_ += slot.capacity;
    } else {
      std::free(slot.data);
    }
    slot.data = nullptr;
    slot.capacity = 0;
  }
  slot.next = free_slots_;
  free_slots_ = &slot;
  --used_slots_;
}

// ---- limits and the end ----

void Connection::progress() {
  Waiting waiting = Waiting::idle;
  if (filling_ != nullptr || skip_ != 0 || begin_ != end_ || out_head_ != nullptr) {
    waiting = Waiting::client;
  }
  if (in_flight_ != 0 && out_head_ == nullptr && filling_ == nullptr) waiting = Waiting::disk;
  waiting_.store(waiting, std::memory_order_relaxed);
}

// Its I/O is done, its replies are sent or nobody wants them, and the ring has let go of the
// socket.
void Connection::end_when_done() {
  if (reading_ || in_flight_ != 0 || (out_head_ != nullptr && !broken_)) return;
  drop_output();
  if (filling_ != nullptr) release(*std::exchange(filling_, nullptr));
  if (!broken_) stream_->say_goodbye();
  broken_ = true;
  if (poll_in_.armed || poll_out_.armed) {
    ::shutdown(stream_->fd(), SHUT_RDWR);
    return;
  }
  if (turn_later_.pending) return;
  owner_.ended(*this);
}

}  // namespace pqblk::exports::nbd
