#include "sim/life.h"

#include <malloc.h>

#include <algorithm>
#include <cassert>
#include <cstring>

namespace pqblk::sim {
namespace {

// What failed lives leave: their coroutines stay suspended for ever, so everything they refer to
// stays too. A failure ends the test soon after; memory that is reachable is no leak.
struct Abandoned {
  std::unique_ptr<World> world;
  std::vector<std::unique_ptr<image::QueueContext>> contexts;
  std::unique_ptr<image::Backend> backend;
};

void abandon(Abandoned life) {
  static auto* const lives = new std::vector<Abandoned>();  // never destroyed
  lives->push_back(std::move(life));
}

constexpr std::uint64_t kVerifyChunk = 8;  // sectors read at once

}  // namespace

std::string_view op_type_name(OpType type) {
  static constexpr std::string_view kNames[] = {
      "write", "write_fua", "write_cluster", "zero",       "zero_unmap",      "discard",
      "read",  "flush",     "extent",        "checkpoint", "checkpoint_full", "relocate"};
  static_assert(std::size(kNames) == static_cast<std::size_t>(OpType::count_));
  return kNames[static_cast<std::size_t>(type)];
}

std::string OpSpec::text() const {
  return std::string(op_type_name(type)) + "(" + std::to_string(sector) +
         (count == 1 ? "" : "+" + std::to_string(count)) + ")";
}

// ---- SectorLocks ----

bool SectorLocks::is_free(std::uint64_t first, std::uint64_t count) const {
  for (std::uint64_t s = first; s < first + count; ++s) {
    if (busy_[s]) return false;
  }
  return true;
}

bool SectorLocks::blocked(const Acquire& by, std::size_t waiters_before) const {
  if (!is_free(by.first, by.count)) return true;
  for (std::size_t i = 0; i < waiters_before; ++i) {
    const Acquire& w = *waiters_[i];
    if (w.first < by.first + by.count && by.first < w.first + w.count) return true;
  }
  return false;
}

void SectorLocks::take(std::uint64_t first, std::uint64_t count, bool value) {
  for (std::uint64_t s = first; s < first + count; ++s) {
    assert(busy_[s] != value);
    busy_[s] = value;
  }
}

bool SectorLocks::Acquire::await_suspend(std::coroutine_handle<> h) {
  if (!locks.blocked(*this, locks.waiters_.size())) {
    locks.take(first, count, true);
    return false;
  }
  handle = h;
  locks.waiters_.push_back(this);
  return true;
}

void SectorLocks::release(std::uint64_t first, std::uint64_t count) {
  take(first, count, false);
  for (std::size_t i = 0; i < waiters_.size();) {
    Acquire* waiter = waiters_[i];
    if (blocked(*waiter, i)) {
      ++i;
      continue;
    }
    take(waiter->first, waiter->count, true);
    waiters_.erase(waiters_.begin() + static_cast<std::ptrdiff_t>(i));
    waiter->home->post(*waiter);
  }
}

// ---- Life ----

Life::Life(const Subject& subject, Device image, Model model, Choices& choices,
           const LifeOptions& options)
    : subject_(subject),
      choices_(choices),
      options_(options),
      world_(std::make_unique<World>(choices, options.world)),
      model_(std::move(model)),
      locks_(subject.sectors) {
  for (std::uint32_t i = 0; i <= options.queues; ++i) {
    contexts_.push_back(std::make_unique<image::QueueContext>(world_->add_queue(), i));
  }
  file_ = &world_->add_file(subject.name, std::move(image), subject.file);
}

Life::~Life() {
  if (finished_) return;
  abandon({std::move(world_), std::move(contexts_), std::move(backend_)});
}

void Life::start(SimQueue& queue, Task<void> activity) {
  ++active_;
  world_->spawn(queue, [](Life& life, Task<void> inner) -> Task<void> {
    co_await std::move(inner);
    --life.active_;
  }(*this, std::move(activity)));
}

void Life::fail(std::string what) {
  if (!failure_.empty()) return;
  failure_ = std::move(what);
  world_->trace("FAILURE " + failure_);
}

// Errors are excused only where the world injected faults; a broken image never is.
bool Life::excusable(const Error& error) const {
  return world_->injected() > 0 && error.kind() != Kind::integrity &&
         error.kind() != Kind::corrupt && error.kind() != Kind::wrong_key;
}

void Life::step() {
  if (!world_->step() && busy()) fail("hang: nothing left to do\n" + world_->pending());
  if (world_->steps() >= options_.world.steps_max) {
    fail("hang: step limit reached\n" + world_->pending());
  }
  if (!world_->violation().empty()) fail(world_->violation());
}

void Life::open() { start(world_->queue(options_.queues), do_open()); }
void Life::verify() { start(world_->queue(0), do_verify()); }
void Life::close() { start(world_->queue(options_.queues), do_close()); }

void Life::run_program(std::vector<OpSpec> program, std::uint32_t clients) {
  program_ = std::move(program);
  next_ = 0;
  for (std::uint32_t i = 0; i < clients; ++i) start(world_->queue(i % options_.queues), client(i));
}

void Life::run_random(std::uint32_t operations, std::uint32_t clients) {
  random_left_ = operations;
  for (std::uint32_t i = 0; i < clients; ++i) start(world_->queue(i % options_.queues), client(i));
}

void Life::finish() {
  random_left_ = 0;
  next_ = program_.size();
  run();
  if (failure_.empty() && backend_ && !closed_) {
    close();
    run();
  }
  if (failure_.empty() && world_->drain() == Outcome::too_long) {
    fail("hang: step limit reached after close\n" + world_->pending());
  }
  if (failure_.empty() && subject_.verdict) {
    if (std::string wrong = subject_.verdict(); !wrong.empty()) fail(std::move(wrong));
  }
  if (!failure_.empty()) return;
  backend_.reset();
  finished_ = true;
  if (closed_well_ && options_.check_closed && world_->injected() == 0) check_closed();
}

void Life::check_closed() {
  if (!subject_.check_closed) return;
  QuietChoices quiet;
  World world(quiet);
  image::QueueContext q(world.add_queue(), 0);
  const io::File& file = world.add_file(subject_.name, device(), subject_.file);
  Error wrong =
      world.run(subject_.check_closed(q, file, model_.crashed()), Error(Kind::canceled, "hang"));
  if (wrong) fail("after a clean close: " + wrong.to_string());
}

Task<void> Life::do_open() {
  auto opened = co_await subject_.open(service(), *file_);
  if (opened) {
    backend_ = std::move(*opened);
  } else if (!excusable(opened.error())) {
    fail("open failed: " + opened.error().to_string());
  }
}

Task<void> Life::do_close() {
  Error error = co_await backend_->close(service());
  closed_ = true;
  if (!error) {
    closed_well_ = true;
    model_.closed();
    ++model_changes_;
  } else if (!excusable(error)) {
    fail("close failed: " + error.to_string());
  }
}

Task<void> Life::do_verify() {
  if (!backend_) co_return;
  image::QueueContext& q = *contexts_[0];
  for (std::uint64_t at = 0; at < subject_.sectors && failure_.empty(); at += kVerifyChunk) {
    const std::uint64_t count = std::min(kVerifyChunk, subject_.sectors - at);
    auto memory = q.buffer(count * kSectorSize);
    iovec iov{memory.data(), count * kSectorSize};
    Error error = co_await backend_->read(q, {at * kSectorSize}, {{&iov, 1}, 0, iov.iov_len});
    if (error) {
      if (!excusable(error)) fail("reading after open: " + error.to_string());
      continue;
    }
    std::string wrong = model_.settle(at, count, memory.data());
    ++model_changes_;
    if (!wrong.empty()) fail("after open: " + wrong);
  }
}

Task<void> Life::client(std::uint32_t number) {
  image::QueueContext& q = *contexts_[number % options_.queues];
  OpSpec op;
  while (backend_ && next_op(op)) {
    if (World::tracing()) world_->trace("guest " + std::to_string(number) + " " + op.text());
    Error error = co_await run_op(q, op);
    ++model_changes_;
    if (World::tracing()) {
      world_->trace("guest " + std::to_string(number) + " " + op.text() +
                    (error ? " failed: " + error.to_string() : " done"));
    }
    if (error && !excusable(error)) fail(op.text() + " failed: " + error.to_string());
  }
}

bool Life::next_op(OpSpec& op) {
  if (!failure_.empty()) return false;
  if (next_ < program_.size()) {
    op = within_disk(program_[next_++]);
    return true;
  }
  if (random_left_ == 0) return false;
  --random_left_;
  op = within_disk(random_op());
  return true;
}

OpSpec Life::within_disk(OpSpec op) const {
  if (op.type == OpType::write_cluster || op.type == OpType::relocate) {
    op.sector -= op.sector % subject_.sectors_per_cluster;
    op.count = subject_.sectors_per_cluster;
  }
  assert(op.sector < subject_.sectors);
  op.count = std::min(op.count, subject_.sectors - op.sector);
  return op;
}

OpSpec Life::random_op() {
  struct Weight {
    OpType type;
    std::uint32_t weight;
  };
  static constexpr Weight kWeights[] = {
      {OpType::write, 30},     {OpType::write_fua, 5},       {OpType::write_cluster, 5},
      {OpType::zero, 4},       {OpType::zero_unmap, 4},      {OpType::discard, 4},
      {OpType::read, 14},      {OpType::flush, 10},          {OpType::extent, 3},
      {OpType::checkpoint, 4}, {OpType::checkpoint_full, 2}, {OpType::relocate, 3}};
  static constexpr std::uint32_t kSum = [] {
    std::uint32_t sum = 0;
    for (const Weight& w : kWeights) sum += w.weight;
    return sum;
  }();
  OpSpec op;
  std::uint32_t pick = choices_.choose(kSum, Why::workload);
  for (const Weight& w : kWeights) {
    op.type = w.type;
    if (pick < w.weight) break;
    pick -= w.weight;
  }
  const bool checkpoint = op.type == OpType::checkpoint || op.type == OpType::checkpoint_full;
  if (checkpoint && !subject_.checkpoint) op.type = OpType::flush;
  if (op.type == OpType::relocate && !subject_.relocate) op.type = OpType::write_cluster;
  op.sector = choices_.choose(static_cast<std::uint32_t>(subject_.sectors), Why::workload);
  // Mostly single sectors, at times a run of up to two clusters.
  if (choices_.one_in(4, Why::workload)) {
    const auto most = static_cast<std::uint32_t>(2 * subject_.sectors_per_cluster);
    op.count = 1 + choices_.choose(most, Why::workload);
  }
  // Half of the time in a few hot sectors, so that versions follow each other closely.
  if (choices_.one_in(2, Why::workload)) op.sector %= std::min<std::uint64_t>(subject_.sectors, 4);
  return op;
}

Task<Error> Life::run_op(image::QueueContext& q, const OpSpec& op) {
  switch (op.type) {
    case OpType::write:
    case OpType::write_fua:
    case OpType::write_cluster:
      co_return co_await write(q, op);
    case OpType::zero:
    case OpType::zero_unmap:
    case OpType::discard:
      co_return co_await zero(q, op);
    case OpType::read:
      co_return co_await read(q, op);
    case OpType::flush:
      co_return co_await flush(q);
    case OpType::extent:
      co_return co_await extent(q, op);
    case OpType::checkpoint:
    case OpType::checkpoint_full:
      if (!subject_.checkpoint) co_return Error();
      co_return co_await subject_.checkpoint(*backend_, q, op.type == OpType::checkpoint_full);
    case OpType::relocate:
      co_return co_await relocate(q, op);
    case OpType::count_:
      break;
  }
  co_return Error();
}

Task<Error> Life::write(image::QueueContext& q, const OpSpec& op) {
  co_await locks_.acquire(op.sector, op.count);
  const std::uint64_t version = model_.begin(op.sector, op.count, false);
  ++model_changes_;
  auto memory = q.buffer(op.count * kSectorSize);
  for (std::uint64_t i = 0; i < op.count; ++i) {
    fill_sector(memory.data() + i * kSectorSize, op.sector + i, version);
  }
  // Two pieces where there is more than one sector, so that scatter lists are met too.
  const std::uint64_t cut = op.count / 2 * kSectorSize;
  const std::uint64_t size = op.count * kSectorSize;
  iovec iov[2] = {{memory.data() + cut, size - cut}, {}};
  std::size_t pieces = 1;
  if (cut > 0) {
    iov[1] = iov[0];
    iov[0] = {memory.data(), cut};
    pieces = 2;
  }
  const bool fua = op.type == OpType::write_fua;
  Error error =
      co_await backend_->write(q, {op.sector * kSectorSize}, {{iov, pieces}, 0, size}, fua);
  if (!error) model_.acknowledge(version, op.sector, op.count, fua);
  locks_.release(op.sector, op.count);
  co_return error;
}

Task<Error> Life::zero(image::QueueContext& q, const OpSpec& op) {
  co_await locks_.acquire(op.sector, op.count);
  const std::uint64_t version = model_.begin(op.sector, op.count, true);
  ++model_changes_;
  const GuestOffset at{op.sector * kSectorSize};
  const std::uint64_t size = op.count * kSectorSize;
  Error error;
  if (op.type == OpType::discard) {
    error = co_await backend_->discard(q, at, size);
  } else {
    const std::uint32_t flags =
        op.type == OpType::zero_unmap ? std::uint32_t{image::kZeroUnmap} : 0;
    error = co_await backend_->write_zeroes(q, at, size, flags);
  }
  const bool advisory = op.type == OpType::discard && !subject_.discard_zeroes;
  if (!error && !advisory) model_.acknowledge(version, op.sector, op.count, false);
  locks_.release(op.sector, op.count);
  co_return error;
}

Task<Error> Life::read(image::QueueContext& q, const OpSpec& op) {
  auto memory = q.buffer(op.count * kSectorSize);
  std::memset(memory.data(), 0x5a, op.count * kSectorSize);
  iovec iov{memory.data(), op.count * kSectorSize};
  const Model::Ticket ticket = model_.begin_read(op.sector, op.count);
  Error error = co_await backend_->read(q, {op.sector * kSectorSize}, {{&iov, 1}, 0, iov.iov_len});
  if (!error) {
    std::string wrong = model_.end_read(ticket, op.sector, op.count, memory.data());
    if (!wrong.empty()) fail(op.text() + ": " + wrong);
  }
  co_return error;
}

Task<Error> Life::extent(image::QueueContext& q, const OpSpec& op) {
  const std::uint64_t asked = op.count * kSectorSize;
  const Model::Ticket ticket = model_.begin_read(op.sector, op.count);
  auto found = co_await backend_->extent(q, {op.sector * kSectorSize}, asked);
  if (!found) co_return found.take_error();
  if (found->length == 0 || found->length > asked) {
    fail(op.text() + ": an extent of " + std::to_string(found->length) + " bytes");
  } else if (found->kind != image::ExtentKind::data && found->length == asked) {
    const std::vector<std::uint8_t> zeros(asked);
    std::string wrong = model_.end_read(ticket, op.sector, op.count, zeros.data());
    if (!wrong.empty()) fail(op.text() + " says hole or zeros: " + wrong);
  }
  co_return Error();
}

Task<Error> Life::flush(image::QueueContext& q) {
  const Model::Ticket ticket = model_.begin_flush();
  Error error = co_await backend_->flush(q);
  if (!error) model_.end_flush(ticket);
  co_return error;
}

Task<Error> Life::relocate(image::QueueContext& q, const OpSpec& op) {
  if (!subject_.relocate) co_return Error();
  co_await locks_.acquire(op.sector, op.count);
  Error error = co_await subject_.relocate(*backend_, q, op.sector / subject_.sectors_per_cluster);
  locks_.release(op.sector, op.count);
  co_return error;
}

void keep_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 64 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

Device fresh_image(const Subject& subject, std::string& error) {
  QuietChoices quiet;
  World world(quiet);
  world.add_queue();
  io::File& file = world.add_file(subject.name, Device(subject.file.device), subject.file);
  Error e = world.run(subject.create(world.queue(0), file), Error(Kind::canceled, "hang"));
  if (e) error = "create failed: " + e.to_string();
  return Device(subject.file.device, world.device(file).cache());
}

}  // namespace pqblk::sim
