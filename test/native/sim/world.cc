#include "sim/world.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "io/operation.h"

namespace pqblk::sim {
namespace {

constexpr int kFirstFd = 1 << 20;  // no process has that many; a real system call would fail
constexpr std::uint64_t kStepNs = 1000;
constexpr std::uint32_t kBlock = 512;
// Coroutines that poll with yield() must not keep a deterministic schedule from going on.
constexpr std::uint32_t kReadyStreakMax = 64;

std::atomic<bool>& trace_flag() {
  static std::atomic<bool> flag = [] {
    const char* value = std::getenv("PQBLK_SIM_TRACE");
    return value != nullptr && *value != '\0' && *value != '0';
  }();
  return flag;
}

// The first `length` bytes of the operation's buffers.
void gather(const io::Op& op, std::uint64_t length, std::uint8_t* to) {
  for (std::uint32_t i = 0; length > 0; ++i) {
    const std::uint64_t part = std::min<std::uint64_t>(length, op.iov[i].iov_len);
    if (part == 0) continue;  // an empty entry may have no address
    std::memcpy(to, op.iov[i].iov_base, part);
    to += part;
    length -= part;
  }
}

void scatter(const io::Op& op, std::uint64_t length, const std::uint8_t* from) {
  for (std::uint32_t i = 0; length > 0; ++i) {
    const std::uint64_t part = std::min<std::uint64_t>(length, op.iov[i].iov_len);
    if (part == 0) continue;  // an empty entry may have no address
    std::memcpy(op.iov[i].iov_base, from, part);
    from += part;
    length -= part;
  }
}

}  // namespace

// ---- SimQueue ----

void SimQueue::submit(io::Op& op) { world_.submit(*this, op); }
void SimQueue::post(ReadyNode& node) { ready_.push_back(&node); }
std::uint64_t SimQueue::now_ns() { return world_.now_ns_; }

void SimQueue::post_after(ReadyNode& node, std::uint64_t ns) {
  world_.timers_.push_back({world_.now_ns_ + ns, world_.next_timer_++, this, &node});
}

void SimQueue::cut_short(ReadyNode& node) {
  std::vector<World::Timer>& timers = world_.timers_;
  const auto timer = std::find_if(timers.begin(), timers.end(),
                                  [&](const World::Timer& each) { return each.node == &node; });
  if (timer == timers.end()) return;
  timers.erase(timer);
  post(node);
}

void SimQueue::run() {
  turn_due_ = true;
  world_.run_until([this] { return stopping_ && in_flight_ == 0 && ready_.empty() && !turn_due_; });
  stopping_ = false;
}

// ---- World: construction ----

World::World(Choices& choices, WorldOptions options) : choices_(choices), options_(options) {}
World::~World() = default;

SimQueue& World::add_queue() {
  queues_.push_back(std::make_unique<SimQueue>(*this, static_cast<std::uint32_t>(queues_.size())));
  return *queues_.back();
}

io::File& World::add_file(std::string name, Device device, FileFacts facts) {
  device.set_facts(facts.device);
  auto file = std::make_unique<io::File>();
  file->fd = kFirstFd + static_cast<int>(files_.size());
  file->path = std::move(name);
  file->direct = facts.direct;
  file->read_only = facts.read_only;
  file->non_volatile = facts.device.non_volatile;
  file->atomic_4k = facts.device.atomic_4k;
  file->size = device.size();
  file->memory_align = file->offset_align = facts.direct ? facts.align : 1;
  files_.push_back({std::move(file), std::move(device)});
  return *files_.back().file;
}

Device& World::device(const io::File& file) {
  return files_.at(static_cast<std::size_t>(file.fd - kFirstFd)).device;
}

World::OpenFile& World::open_file(const io::Op& op) {
  return files_.at(static_cast<std::size_t>(op.file->fd - kFirstFd));
}

void World::spawn(SimQueue& queue, Task<void> task) {
  pqblk::spawn([](SimQueue& q, Task<void> inner) -> Task<void> {
    co_await resume_on(q);
    co_await std::move(inner);
  }(queue, std::move(task)));
}

// ---- World: events ----

void World::collect_ready() {
  for (std::size_t i = 0; i < queues_.size(); ++i) {
    if (!queues_[i]->ready_.empty()) events_.push_back({EventType::ready, i});
  }
}

void World::collect_events() {
  events_.clear();
  const bool others_first = ready_streak_ >= kReadyStreakMax;
  if (!others_first) collect_ready();
  if (options_.ready_first && !events_.empty()) return;
  for (std::size_t i = 0; i < timers_.size(); ++i) {
    if (timers_[i].due_ns <= now_ns_) events_.push_back({EventType::timer, i});
  }
  for (std::size_t i = 0; i < queues_.size(); ++i) {
    if (queues_[i]->turn_due_ && queues_[i]->ready_.empty()) {
      events_.push_back({EventType::turn, i});
    }
  }
  for (std::size_t n = 0; n < flights_.size(); ++n) {
    const std::size_t i = options_.newest_first ? flights_.size() - 1 - n : n;
    if (flights_[i].not_before <= steps_) events_.push_back({EventType::completion, i});
  }
  if (others_first) collect_ready();
  if (!events_.empty()) return;
  // Only slow operations and later timers are left.
  if (!flights_.empty()) {
    const auto next = std::min_element(
        flights_.begin(), flights_.end(),
        [](const Flight& a, const Flight& b) { return a.not_before < b.not_before; });
    events_.push_back({EventType::completion, static_cast<std::size_t>(next - flights_.begin())});
  } else if (!timers_.empty()) {
    const auto next =
        std::min_element(timers_.begin(), timers_.end(), [](const Timer& a, const Timer& b) {
          return a.due_ns != b.due_ns ? a.due_ns < b.due_ns : a.order < b.order;
        });
    now_ns_ = std::max(now_ns_, next->due_ns);
    events_.push_back({EventType::timer, static_cast<std::size_t>(next - timers_.begin())});
  }
}

bool World::step() {
  collect_events();
  if (events_.empty()) return false;
  ++steps_;
  now_ns_ += kStepNs;
  const std::uint32_t which =
      events_.size() == 1
          ? 0
          : choices_.choose(static_cast<std::uint32_t>(events_.size()), Why::schedule);
  run_event(events_[which]);
  return true;
}

void World::run_event(Event event) {
  ready_streak_ = event.type == EventType::ready ? ready_streak_ + 1 : 0;
  switch (event.type) {
    case EventType::ready: {
      SimQueue& queue = *queues_[event.index];
      ReadyNode* node = queue.ready_.front();
      queue.ready_.pop_front();
      queue.turn_due_ = true;
      Executor::current() = &queue;
      node->handle.resume();
      break;
    }
    case EventType::timer:
      fire_timer(event.index);
      break;
    case EventType::turn:
      turn(*queues_[event.index]);
      break;
    case EventType::completion:
      complete(event.index);
      break;
  }
  Executor::current() = nullptr;
}

void World::fire_timer(std::size_t index) {
  const Timer timer = timers_[index];
  timers_.erase(timers_.begin() + static_cast<std::ptrdiff_t>(index));
  timer.queue->turn_due_ = true;
  Executor::current() = timer.queue;
  timer.node->handle.resume();
}

void World::turn(SimQueue& queue) {
  Executor::current() = &queue;
  queue.turn_due_ = queue.poll_hook && queue.poll_hook();
  if (queue.before_wait) queue.before_wait();
}

Outcome World::run_until(const std::function<bool()>& done) {
  while (!done()) {
    if (steps_ >= options_.steps_max) return Outcome::too_long;
    if (!step()) return done() ? Outcome::done : Outcome::idle;
  }
  return Outcome::done;
}

Outcome World::drain() {
  return run_until([this] {
    return flights_.empty() && std::all_of(queues_.begin(), queues_.end(), [](const auto& q) {
             return q->ready_.empty() && !q->turn_due_;
           });
  });
}

// ---- World: operations ----

void World::submit(SimQueue& queue, io::Op& op) {
  assert(Executor::current() == &queue && "operations are submitted on their queue's own thread");
  io::begin(op);
  ++queue.in_flight_;
  flights_.push_back({.op = &op, .queue = &queue});
  start(flights_.back());
}

void World::start(Flight& flight) {
  const io::Op& op = *flight.op;
  flight.id = next_flight_++;
  flight.early.clear();
  flight.early_blocks.clear();
  flight.write = nullptr;
  flight.length = 0;
  flight.not_before = 0;
  if (!choices_.exhaustive() && choices_.one_in(options_.slow_one_in, Why::schedule)) {
    flight.not_before = steps_ + choices_.choose(options_.slow_steps, Why::schedule);
  }
  if (op.type == io::OpType::read || op.type == io::OpType::write) {
    const std::uint32_t count = io::transfer_count(op);
    for (std::uint32_t i = 0; i < count; ++i) flight.length += op.iov[i].iov_len;
    // A device that does not tear 4096 bytes does not cut a transfer inside them either.
    const std::uint64_t unit = std::max<std::uint64_t>(kBlock, open_file(op).device.tear_unit());
    const std::uint64_t units = flight.length / unit;
    if (units > 1 && choices_.one_in(options_.faults.short_transfer, Why::fault)) {
      const auto most = static_cast<std::uint32_t>(std::min<std::uint64_t>(units - 1, 1U << 20));
      flight.length = (1 + choices_.choose(most, Why::fault)) * unit;
    }
  }
  flight.refused = check(op, flight.length);
  if (flight.refused == 0 && choices_.one_in(options_.faults.interrupted, Why::fault)) {
    flight.refused = -EINTR;
  }
  if (flight.refused == 0) {
    if (op.type == io::OpType::write) start_write(flight);
    if (op.type == io::OpType::fallocate || op.type == io::OpType::truncate) {
      start_fallocate(flight);
    }
    if (op.type == io::OpType::fdatasync) flight.sync = open_file(op).device.begin_sync();
  }
  ++changes_;
  if (tracing()) trace("start " + text(flight));
}

// What the kernel would refuse outright; 0 when it would not.
int World::check(const io::Op& op, std::uint64_t length) const {
  if (op.type == io::OpType::nop) return 0;
  if (op.file == nullptr || op.file->fd < kFirstFd ||
      static_cast<std::size_t>(op.file->fd - kFirstFd) >= files_.size()) {
    return -EBADF;
  }
  const bool changes = op.type == io::OpType::write || op.type == io::OpType::fallocate ||
                       op.type == io::OpType::truncate;
  if (changes && op.file->read_only) return op.type == io::OpType::truncate ? -EINVAL : -EBADF;
  if (op.type == io::OpType::fallocate && op.length == 0) return -EINVAL;
  const auto file = static_cast<std::size_t>(op.file->fd - kFirstFd);
  if (op.type == io::OpType::fallocate && !files_[file].device.facts().allocates) {
    return -EOPNOTSUPP;
  }
  const bool transfer = op.type == io::OpType::read || op.type == io::OpType::write;
  if (!transfer || !op.file->direct) return 0;
  if ((op.offset + op.done) % op.file->offset_align != 0) return -EINVAL;
  for (std::uint32_t i = 0; length > 0; ++i) {
    const auto address = reinterpret_cast<std::uintptr_t>(op.iov[i].iov_base);
    const std::uint64_t part = std::min<std::uint64_t>(op.iov[i].iov_len, length);
    if (address % op.file->memory_align != 0 || part % op.file->offset_align != 0) return -EINVAL;
    length -= part;
  }
  return 0;
}

void World::start_write(Flight& flight) {
  const io::Op& op = *flight.op;
  const std::uint64_t at = op.offset + op.done;
  const std::uint64_t room = options_.faults.file_size_max;
  if (at + flight.length > room) {
    if (at >= room) {
      flight.refused = -ENOSPC;
      ++injected_;
      return;
    }
    flight.length = room - at;  // short; the rest is refused
  }
  if (flight.length == 0) return;
  Write write{.type = Write::Type::data, .offset = at, .length = flight.length};
  write.bytes.resize(flight.length);
  gather(op, flight.length, write.bytes.data());
  flight.write = open_file(op).device.begin(std::move(write));
}

void World::start_fallocate(Flight& flight) {
  const io::Op& op = *flight.op;
  Device& device = open_file(op).device;
  Write write{.type = Write::Type::resize, .offset = op.length};
  std::uint64_t end = op.length;
  if (op.type == io::OpType::fallocate) {
    end = op.mode == io::FallocateMode::punch ? 0 : op.offset + op.length;
    if (op.mode == io::FallocateMode::allocate) {
      write = {.type = Write::Type::extend, .offset = end};
    } else {
      const bool punch = op.mode == io::FallocateMode::punch;
      write = {.type = punch ? Write::Type::zero : Write::Type::zero_range,
               .offset = op.offset,
               .length = op.length};
    }
  }
  if (end > options_.faults.file_size_max && op.type == io::OpType::fallocate) {
    flight.refused = -ENOSPC;
    ++injected_;
    return;
  }
  flight.write = device.begin(std::move(write));
}

void World::complete(std::size_t index) {
  Flight flight = std::move(flights_[index]);
  flights_.erase(flights_.begin() + static_cast<std::ptrdiff_t>(index));
  io::Op& op = *flight.op;
  const int raw = flight.refused != 0 ? flight.refused : take_effect(flight);
  ++changes_;
  if (tracing()) trace("end   " + text(flight) + " = " + std::to_string(raw));
  if (io::advance(op, raw) == io::Step::resubmit) {
    flights_.push_back(std::move(flight));
    start(flights_.back());
    return;
  }
  --flight.queue->in_flight_;
  flight.queue->turn_due_ = true;
  Executor::current() = flight.queue;
  io::complete(op);
}

int World::take_effect(Flight& flight) {
  const std::uint64_t number = operations_++;
  const bool doomed = number == options_.faults.fail_operation;
  const std::uint64_t lost = options_.faults.unreadable_at;
  const std::uint64_t at = flight.op->offset + flight.op->done;
  switch (flight.op->type) {
    case io::OpType::read:
      if (doomed || (lost >= at && lost < at + flight.length) ||
          choices_.one_in(options_.faults.read_eio, Why::fault)) {
        ++injected_;
        return -EIO;
      }
      return finish_read(flight);
    case io::OpType::write:
    case io::OpType::fallocate:
    case io::OpType::truncate:
      if (doomed || choices_.one_in(options_.faults.write_eio, Why::fault)) {
        ++injected_;
        if (flight.write) open_file(*flight.op).device.fail(flight.write, choices_);
        return -EIO;
      }
      return finish_write(flight);
    case io::OpType::fdatasync:
      if (doomed || choices_.one_in(options_.faults.sync_eio, Why::fault)) {
        ++injected_;
        ++failed_syncs_;
        open_file(*flight.op).device.fail_sync(flight.sync, choices_);
        return -EIO;
      }
      return finish_sync(flight);
    case io::OpType::nop:
    case io::OpType::poll:  // refused before: nothing here has a descriptor to wait for
      return 0;
  }
  return 0;
}

int World::finish_sync(Flight& flight) {
  open_file(*flight.op).device.complete_sync(flight.sync);
  return 0;
}

int World::finish_write(Flight& flight) {
  if (!flight.write) return 0;
  Device& device = open_file(*flight.op).device;
  if (flight.op->type == io::OpType::write) check_buffer(flight);
  serve_early(*flight.write, device);
  device.complete(flight.write);
  return flight.op->type == io::OpType::write ? static_cast<int>(flight.length) : 0;
}

// A read in flight may have been served before this write: takes the old content by choice.
void World::serve_early(const Write& write, const Device& device) {
  for (Flight& read : flights_) {
    if (read.op->type != io::OpType::read || read.refused != 0) continue;
    const std::uint64_t at = read.op->offset + read.op->done;
    if (&open_file(*read.op).device != &device || write.touched_from >= at + read.length ||
        at >= write.touched_to) {
      continue;
    }
    const std::uint32_t how = choices_.choose(3, Why::mix);  // 1: all of it, 2: some blocks
    if (how == 0 || (how == 2 && choices_.exhaustive())) continue;
    read.early.resize(read.length);
    read.early_blocks.resize((read.length + kBlock - 1) / kBlock);
    std::uint64_t coins = 0;
    for (std::size_t i = 0; i < read.early_blocks.size(); ++i, coins >>= 1) {
      if (i % 64 == 0) coins = how == 1 ? ~std::uint64_t{0} : choices_.bits(Why::mix);
      if (read.early_blocks[i] || (coins & 1) == 0) continue;
      read.early_blocks[i] = true;
      const std::uint64_t from = i * kBlock;
      device.cache().read(at + from, read.early.data() + from,
                          std::min<std::uint64_t>(kBlock, read.length - from));
    }
  }
}

int World::finish_read(Flight& flight) {
  const io::Op& op = *flight.op;
  const Device& device = open_file(op).device;
  const std::uint64_t at = op.offset + op.done;
  if (at >= device.size()) return 0;
  const std::uint64_t length = std::min(flight.length, device.size() - at);
  std::vector<std::uint8_t> data(length);
  device.cache().read(at, data.data(), length);
  for (const Device::WriteRef& write : device.in_flight()) {
    if (!write->ranged()) continue;
    const std::uint64_t from = std::max(at, write->offset);
    const std::uint64_t to = std::min(at + length, write->offset + write->length);
    if (from >= to) continue;
    const std::uint32_t how = choices_.choose(3, Why::mix);  // 0: not seen, 1: seen, 2: in part
    std::uint64_t coins = how == 0 ? 0 : ~std::uint64_t{0};
    for (std::uint64_t block = from / kBlock; block * kBlock < to; ++block, coins >>= 1) {
      if (how == 2 && (block - from / kBlock) % 64 == 0) coins = choices_.bits(Why::mix);
      if (how == 0 || (how == 2 && (coins & 1) == 0)) continue;
      const std::uint64_t start = std::max(from, block * kBlock);
      const std::uint64_t end = std::min(to, (block + 1) * kBlock);
      if (write->type == Write::Type::data) {
        std::memcpy(data.data() + (start - at), write->bytes.data() + (start - write->offset),
                    end - start);
      } else {
        std::memset(data.data() + (start - at), 0, end - start);
      }
    }
  }
  for (std::size_t i = 0; i < flight.early_blocks.size(); ++i) {
    const std::uint64_t from = i * kBlock;
    if (!flight.early_blocks[i] || from >= length) continue;
    std::memcpy(data.data() + from, flight.early.data() + from,
                std::min<std::uint64_t>(kBlock, length - from));
  }
  scatter(op, length, data.data());
  return static_cast<int>(length);
}

void World::check_buffer(const Flight& flight) {
  if (!options_.check_buffers || !violation_.empty()) return;
  std::vector<std::uint8_t> now(flight.length);
  gather(*flight.op, flight.length, now.data());
  if (now != flight.write->bytes) {
    violation_ = "the buffer changed while it was being written: " + text(flight);
  }
}

// ---- World: reports ----

std::string World::text(const Flight& flight) const {
  const io::Op& op = *flight.op;
  std::string line = "#" + std::to_string(flight.id) + " q" +
                     std::to_string(flight.queue->index()) + " " +
                     std::string(io::op_name(op.type));
  if (op.type == io::OpType::fallocate) {
    static constexpr const char* kModes[] = {" allocate", " punch", " zero"};
    line += kModes[static_cast<int>(op.mode)];
  }
  const bool transfer = op.type == io::OpType::read || op.type == io::OpType::write;
  line += " " + std::to_string(op.offset + op.done) + "+" +
          std::to_string(transfer ? flight.length : op.length);
  if (files_.size() > 1 && op.file != nullptr) line += " of " + op.file->path;
  return line;
}

std::string World::pending() const {
  std::string list;
  for (const Flight& flight : flights_) list += "  in flight: " + text(flight) + "\n";
  for (const auto& queue : queues_) {
    if (!queue->ready_.empty()) {
      list += "  queue " + std::to_string(queue->index()) + ": " +
              std::to_string(queue->ready_.size()) + " ready\n";
    }
  }
  list += "  timers: " + std::to_string(timers_.size()) + ", steps " + std::to_string(steps_);
  return list;
}

void World::trace(const std::string& line) const {
  if (!tracing()) return;
  std::fprintf(stderr, "sim %6llu  %s\n", static_cast<unsigned long long>(steps_), line.c_str());
}

bool World::tracing() { return trace_flag().load(std::memory_order_relaxed); }
void World::set_tracing(bool on) { trace_flag().store(on); }

}  // namespace pqblk::sim
