#include "image/range_lock.h"

#include <algorithm>
#include <cassert>

namespace pqblk::image {

RangeLocks::Range::Range(RangeLocks& locks, std::uint64_t offset, std::uint64_t length)
    : locks_(locks), begin_(offset), end_(offset + length) {
  assert(length != 0 && end_ > begin_);
  const std::uint64_t regions = (end_ - 1) / kLockRegion - begin_ / kLockRegion + 1;
  positions_ = static_cast<std::uint32_t>(std::min<std::uint64_t>(regions, kLockShards));
  if (positions_ > nodes_.size()) more_nodes_.reset(new Node[positions_]);
}

RangeLocks::Range::~Range() {
  for (std::uint32_t i = 0; i < entered_; ++i) leave(i);
}

RangeLocks::Range::Node& RangeLocks::Range::node(std::uint32_t position) {
  return more_nodes_ ? more_nodes_[position] : nodes_[position];
}

// Shards in ascending order, also when the regions wrap around the table's end.
RangeLocks::Shard& RangeLocks::Range::shard(std::uint32_t position) const {
  if (positions_ == kLockShards) return locks_.shards_[position];
  const auto first = static_cast<std::uint32_t>(begin_ / kLockRegion % kLockShards);
  const std::uint32_t end = first + positions_;
  const std::uint32_t wrapped = end > kLockShards ? end - kLockShards : 0;
  return locks_.shards_[position < wrapped ? position : first + position - wrapped];
}

bool RangeLocks::Range::await_suspend(std::coroutine_handle<> handle) {
  ready_.handle = handle;
  home_ = Executor::current();
  return !advance();
}

// Enters shards until one blocks; true once all are held. Runs on the waiter's thread first and
// then, while it is suspended, on the threads of those it waits for. Once blocked, nothing of *this
// may be touched here: whoever releases the range goes on with it.
bool RangeLocks::Range::advance() {
  while (entered_ < positions_) {
    Node& own = node(entered_);
    Shard& in = shard(entered_);
    own.range = this;
    std::lock_guard guard(in.inner);
    ++entered_;
    for (Node* n = in.oldest; n != nullptr; n = n->newer) own.blockers += n->range->overlaps(*this);
    own.older = in.newest;
    (in.newest != nullptr ? in.newest->newer : in.oldest) = &own;
    in.newest = &own;
    if (own.blockers != 0) return false;
  }
  return true;
}

void RangeLocks::Range::leave(std::uint32_t position) {
  Node& own = node(position);
  Shard& in = shard(position);
  Range* awake = nullptr;
  Range** last_awake = &awake;
  {
    std::lock_guard guard(in.inner);
    for (Node* n = own.newer; n != nullptr; n = n->newer) {
      if (!n->range->overlaps(*this) || --n->blockers != 0) continue;
      n->range->next_awake_ = nullptr;
      *last_awake = n->range;
      last_awake = &n->range->next_awake_;
    }
    (own.older != nullptr ? own.older->newer : in.oldest) = own.newer;
    (own.newer != nullptr ? own.newer->older : in.newest) = own.older;
  }
  while (awake != nullptr) {
    Range* next = awake->next_awake_;  // the range may be gone once it runs
    if (awake->advance()) awake->home_->post(awake->ready_);
    awake = next;
  }
}

}  // namespace pqblk::image
