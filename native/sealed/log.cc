#include "sealed/log.h"

#include <algorithm>
#include <cassert>

#include "sealed/nonce.h"
#include "sealed/planted_faults.h"

namespace pqblk::sealed {
namespace {

constexpr std::uint64_t kForever = ~std::uint64_t{0};
constexpr std::uint32_t kPageRecordBytes = static_cast<std::uint32_t>(kPage - sizeof(LogBlockRaw));

constexpr std::uint32_t header_pages_for(std::uint32_t record_bytes) {
  return static_cast<std::uint32_t>(
      div_ceil<std::uint64_t>(sizeof(LogBlockRaw) + record_bytes, kPage));
}

}  // namespace

struct Log::Block {
  std::uint64_t sequence = 0;
  std::uint64_t page = 0;  // virtual
  std::uint32_t records = 0;
  std::uint32_t record_bytes = 0;
  std::uint32_t skip_pages = 0;    // of a skip block: pages that follow
  std::uint32_t pending_data = 0;  // records whose data has not completed
  bool skip = false, sealed = false, written = false;
  CipherRef header;
  std::vector<CipherRef> payload;
  std::vector<std::pair<Sector, Entry>> inline_sectors;

  std::uint32_t header_pages() const { return header_pages_for(record_bytes); }
  std::uint64_t pages() const { return header_pages() + (skip ? skip_pages : payload.size()); }
};

Log::Log(const io::File& file, const Extension& extension, const MacKeys& mac, Overlay& overlay,
         CipherPool& pool, std::uint64_t retain_max)
    : file_(file),
      extension_(extension),
      mac_(mac),
      overlay_(overlay),
      pool_(pool),
      retain_max_(retain_max),
      ring_pages_((extension.log_length - kLogHeadBytes) / kPage) {}

Log::~Log() = default;

void Log::Receipt::count(std::uint64_t sequence) {
  if (blocks > 0 && pending[blocks - 1].first == sequence) {
    ++pending[blocks - 1].second;
    return;
  }
  assert(blocks < kReceiptBlocks);
  pending[blocks++] = {sequence, 1};
}

// Worst case: every append starts a block of its own, every block of payload holds one page of
// records, the first one is shared and nearly full, and the ring's end splits one block and wastes
// a page.
std::uint32_t Log::pages_for(std::uint32_t records, std::uint32_t payload_pages,
                             std::uint32_t appends) {
  const std::uint32_t per_page = kPageRecordBytes / sizeof(RecordW);
  return payload_pages + div_ceil(records, per_page) + appends + 3;
}

std::uint64_t Log::place_of(std::uint64_t virtual_page) const {
  return extension_.log_offset + kLogHeadBytes + virtual_page % ring_pages_ * kPage;
}

// ---------------------------------------------------------------- appending

void Log::start_block(bool skip) {
  auto block = std::make_unique<Block>();
  block->sequence = next_sequence_++;
  block->page = head_page_;
  block->skip = skip;
  block->header = take_cipher(pool_, kBlockHeaderPagesMax * kPage);
  open_ = block.get();
  to_launch_.push_back(open_);
  blocks_.push_back(std::move(block));
  if (skip) {
    open_->skip_pages = static_cast<std::uint32_t>(ring_pages_ - head_page_ % ring_pages_ - 1);
    seal(*open_);
  }
}

// The open block with room for one more record (and payload page), closing a full one first.
Log::Block& Log::open_block(std::uint32_t record_bytes, bool payload) {
  const std::uint64_t left = ring_pages_ - head_page_ % ring_pages_;
  if (open_ != nullptr) {
    const std::uint32_t bytes = open_->record_bytes + record_bytes;
    const std::uint32_t header_pages = header_pages_for(bytes);
    const std::uint64_t payload_pages = open_->payload.size() + (payload ? 1 : 0);
    // Payload places are fixed when they are appended, so such a block has one header page.
    const bool fits = bytes <= kBlockRecordBytesMax && (payload_pages == 0 || header_pages == 1) &&
                      payload_pages <= kBlockPayloadPagesMax &&
                      header_pages + payload_pages <= left;
    if (fits) return *open_;
    seal(*open_);
  }
  const std::uint64_t room = ring_pages_ - head_page_ % ring_pages_;
  if (room < (payload ? 2u : 1u)) start_block(true);
  start_block(false);
  return *open_;
}

void Log::seal(Block& block) {
  assert(!block.sealed);
  authenticate(block);
  block.sealed = true;
  head_page_ += block.pages();
  assert(head_page_ - tail_page_ <= ring_pages_);  // live blocks are never written over (I8)
  if (open_ == &block) open_ = nullptr;
}

// Once for each block: its sequence number is the nonce.
void Log::authenticate(Block& block) {
  const SessionKeys& keys = *session();
  std::uint8_t* bytes = block.header.data();
  LogBlockRaw raw;
  std::memset(&raw, 0, sizeof raw);
  std::memcpy(raw.magic, kBlockMagic, 4);
  raw.header_pages = static_cast<std::uint16_t>(block.header_pages());
  raw.flags = block.skip ? kBlockSkip : std::uint16_t{0};
  std::copy(header_.log_uuid.begin(), header_.log_uuid.end(), raw.log_uuid);
  raw.generation = header_.generation;
  raw.session = keys.id;
  raw.payload_pages =
      block.skip ? block.skip_pages : static_cast<std::uint32_t>(block.payload.size());
  raw.sequence = block.sequence;
  raw.covered = planted(Fault::covered_from_log_durable) ? durable_.value() : covered_.value();
  raw.record_count = block.records;
  raw.record_bytes = block.record_bytes;
  std::copy(last_mac_.begin(), last_mac_.end(), raw.previous_mac);
  std::memcpy(bytes, &raw, sizeof raw);
  const std::size_t used = sizeof raw + block.record_bytes;
  std::memset(bytes + used, 0, block.header_pages() * kPage - used);

  crypto::Nonce nonce{};
  const Be64 sequence = block.sequence;
  std::memcpy(nonce.data() + 4, &sequence, 8);
  if (NonceTracer trace = nonce_tracer.load(std::memory_order_relaxed)) {
    trace(keys.id, keys.salt.data(), nonce, true);
  }
  crypto::Tag tag;
  keys.log->seal(nonce, {bytes, used}, nullptr, nullptr, 0, tag);
  std::memcpy(bytes + offsetof(LogBlockRaw, mac), tag.data(), tag.size());
  last_mac_ = tag;
}

std::uint8_t* Log::Appender::record(std::size_t bytes, bool payload) {
  const Block* const before = log_.open_;
  Block& block = log_.open_block(static_cast<std::uint32_t>(bytes), payload);
  began_block_ = began_block_ || &block != before;
  std::uint8_t* at = block.header.data() + sizeof(LogBlockRaw) + block.record_bytes;
  std::memset(at, 0, bytes);
  block.record_bytes += static_cast<std::uint32_t>(bytes);
  ++block.records;
  receipt_.last = block.sequence;
  return at;
}

void Log::Appender::w(Sector first, std::span<const Entry> entries, const CipherRef& cipher) {
  CipherShares ciphers(cipher, entries.size());
  std::size_t begin = 0;  // of those whose records lie in the open block
  const auto put = [&](std::size_t end, std::uint64_t sequence) {
    log_.overlay_.put_run({first.value + begin}, entries.subspan(begin, end - begin), ciphers,
                          sequence);
    begin = end;
  };
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::uint64_t before = receipt_.last;
    auto* r = reinterpret_cast<RecordW*>(record(sizeof(RecordW), false));
    if (i != begin && receipt_.last != before) put(i, before);
    r->type = static_cast<std::uint8_t>(RecordType::w);
    r->sector = first.value + i;
    r->entry = entries[i];
    ++log_.open_->pending_data;
    receipt_.count(receipt_.last);
  }
  put(entries.size(), receipt_.last);
}

void Log::Appender::wd(Sector s, const Entry& entry, CipherRef cipher) {
  auto* r = reinterpret_cast<RecordW*>(record(sizeof(RecordW), true));
  Block& block = *log_.open_;
  r->type = static_cast<std::uint8_t>(RecordType::wd);
  r->payload = static_cast<std::uint32_t>(block.payload.size());
  r->sector = s.value;
  r->entry = entry;
  const std::uint64_t place = log_.place_of(block.page + 1 + block.payload.size());
  block.payload.push_back(cipher);
  block.inline_sectors.emplace_back(s, entry);
  log_.overlay_.put(s, Version{entry, std::move(cipher), place, block.sequence});
}

void Log::Appender::z(Sector first, std::uint64_t count) {
  auto* r = reinterpret_cast<RecordZ*>(record(sizeof(RecordZ), false));
  r->type = static_cast<std::uint8_t>(RecordType::z);
  r->first = first.value;
  r->count = count;
  log_.overlay_.put_zero_range(first, count, log_.open_->sequence);
}

Log::Appender::~Appender() {
  for (const Mapped& m : mapped_) {
    log_.overlay_.put_slot(m.slot, m.new_entry, m.old_entry, m.sequence);
  }
}

void Log::Appender::map(MapKind kind, Slot slot, std::uint64_t new_entry, std::uint64_t old_entry,
                        bool with_data) {
  auto* r = reinterpret_cast<RecordMap*>(record(sizeof(RecordMap), false));
  r->type = static_cast<std::uint8_t>(RecordType::map);
  r->kind = static_cast<std::uint8_t>(kind);
  r->slot = slot.value;
  r->new_entry = new_entry;
  r->old_entry = old_entry;
  if (with_data) {
    ++log_.open_->pending_data;
    receipt_.count(log_.open_->sequence);
  }
  mapped_.push_back({slot, new_entry, old_entry, log_.open_->sequence});
}

void Log::launch(io::Queue& io) {
  std::vector<Block*> blocks;
  {
    std::lock_guard guard(mutex_);
    if (to_launch_.empty()) return;
    blocks.swap(to_launch_);
  }
  for (Block* block : blocks) spawn(write_block(io, block));
}

// The opener's queue writes a block. It first lets everyone else of this turn of the run loop add
// records: that is the group commit.
Task<void> Log::write_block(io::Queue& io, Block* block) {
  co_await yield();
  // And of the next one: by then completions were looked at once more, of writes in memory all, and
  // those who waited for them come along, as good as in lockstep. A larger block is fewer writes.
  co_await yield();
  if (failed()) co_return;  // writing has ended, and no mark says any more how far it came
  {
    std::lock_guard guard(mutex_);
    if (!block->sealed) seal(*block);
  }
  std::vector<iovec> iov;
  const std::uint64_t header_bytes = block->header_pages() * kPage;
  for (int attempt = 0;; ++attempt) {
    iov.clear();
    iov.push_back({block->header.data(), header_bytes});
    for (const CipherRef& c : block->payload) iov.push_back({c.data(), kPage});
    Error e = co_await io.writev(file_, place_of(block->page), iov);
    if (!e) break;
    if (attempt == 1) {  // retried byte for byte; now writing stops
      fail(std::move(e).at("write log block", place_of(block->page)));
      break;
    }
    if (planted(Fault::rewrite_block_same_sequence)) {
      std::lock_guard guard(mutex_);
      authenticate(*block);  // with a later `covered` in it
    }
  }
  bytes_written_.fetch_add(header_bytes + block->payload.size() * kPage, std::memory_order_relaxed);
  block_written(block);
}

// Ciphertext that has reached the log can be read back from there; memory keeps it up to a bound.
void Log::release_payload(Block& block) {
  if (pool_.live_bytes() > retain_max_) {
    for (const auto& [sector, entry] : block.inline_sectors) overlay_.landed(sector, {&entry, 1});
  }
  block.payload.clear();
  block.inline_sectors.clear();
}

void Log::block_written(Block* block) {
  if (failed()) return;
  release_payload(*block);
  std::uint64_t written = 0, complete = 0;
  {
    std::lock_guard guard(mutex_);
    block->written = true;
    block->header.reset();
    advance_marks(written, complete);
  }
  if (written != 0) {
    written_.advance(written);
    if (file_.non_volatile) durable_.advance(written);
  }
  if (complete != 0) complete_.advance(complete);
}

void Log::advance_marks(std::uint64_t& written, std::uint64_t& complete) {
  while (written_prefix_ < blocks_.size() && blocks_[written_prefix_]->written) {
    written = blocks_[written_prefix_++]->sequence;
  }
  while (!blocks_.empty() && blocks_.front()->written && blocks_.front()->pending_data == 0) {
    complete = blocks_.front()->sequence;
    blocks_.pop_front();
    --written_prefix_;
  }
}

void Log::one_done(std::uint64_t sequence, std::uint32_t count) {
  assert(!blocks_.empty() && sequence >= blocks_.front()->sequence);
  Block& block = *blocks_[sequence - blocks_.front()->sequence];
  assert(block.sequence == sequence && block.pending_data >= count);
  block.pending_data -= count;
}

void Log::data_done(const Receipt& receipt) {
  std::uint64_t written = 0, complete = 0;
  {
    std::lock_guard guard(mutex_);
    for (std::uint32_t i = 0; i < receipt.blocks; ++i) {
      one_done(receipt.pending[i].first, receipt.pending[i].second);
    }
    if (failed()) return;
    advance_marks(written, complete);
  }
  if (written != 0) written_.advance(written);
  if (complete != 0) complete_.advance(complete);
}

void Log::data_done(std::uint64_t sequence) {
  Receipt one;
  one.count(sequence);
  data_done(one);
}

// ---------------------------------------------------------------- space

void Log::unreserve(std::uint32_t pages) {
  bool wake = false;
  {
    std::lock_guard guard(mutex_);
    reserved_pages_ -= pages;
    wake = waiting_ != 0;
  }
  if (wake) freed_.advance(freed_.value() + 1);
}

std::uint64_t Log::used_pages_locked() const {
  return head_page_ + (open_ != nullptr ? open_->pages() : 0) - tail_page_;
}

std::uint64_t Log::used_pages() const {
  std::lock_guard guard(mutex_);
  return used_pages_locked();
}

bool Log::pressed() const {
  std::lock_guard guard(mutex_);
  const std::uint64_t used = used_pages_locked();
  return used > pressure_pages() || (used != 0 && waiting_ != 0);
}

Task<Result<Log::Room>> Log::reserve(std::uint32_t pages) {
  assert(pages <= ring_pages_ / 4);
  for (;;) {
    const std::uint64_t freed = freed_.value();
    if (failed()) co_return error();
    bool fits = false, pressure = false;
    {
      std::lock_guard guard(mutex_);
      fits = fits_locked(pages);
      pressure = used_pages_locked() + reserved_pages_ + pages > pressure_pages();
      (fits ? reserved_pages_ : waiting_) += fits ? pages : 1;
    }
    if (pressure && on_pressure) on_pressure();
    if (fits) co_return Room(this, pages);
    co_await freed_.reach(freed + 1);
    std::lock_guard guard(mutex_);
    --waiting_;
  }
}

// ---------------------------------------------------------------- waiting

Task<Error> Log::wait_written(std::uint64_t sequence) {
  if (planted(Fault::ack_across_hole)) {
    for (;;) {
      {
        std::lock_guard guard(mutex_);
        const bool gone = blocks_.empty() || sequence < blocks_.front()->sequence;
        if (gone || blocks_[sequence - blocks_.front()->sequence]->written) co_return error();
      }
      co_await yield();
    }
  }
  co_await written_.reach(sequence);
  co_return error();
}

Task<Error> Log::wait_complete(std::uint64_t sequence) {
  co_await complete_.reach(sequence);
  co_return error();
}

Task<Error> Log::wait_durable(io::Queue& io, std::uint64_t sequence) {
  if (Error e = co_await wait_written(sequence)) co_return e;
  while (durable_.value() < sequence && !failed()) {
    if (Error e = co_await flush(io)) co_return e;
  }
  co_return error();
}

Task<Error> Log::flush(io::Queue& io) {
  const std::uint64_t ticket = flush_asked_.fetch_add(1, std::memory_order_acq_rel) + 1;
  AsyncMutex::Guard lock = co_await flush_lock_.lock();
  if (flush_done_ >= ticket || failed()) co_return error();
  // Everything read here precedes the fdatasync: those are what it can make durable.
  std::uint64_t served = flush_asked_.load(std::memory_order_acquire);
  const std::uint64_t written = written_.value();
  const std::uint64_t complete = complete_.value();
  if (Error e = co_await io.fdatasync(file_)) {
    fail(std::move(e).at("fdatasync"));
    co_return error();
  }
  if (planted(Fault::join_issued_flush)) served = flush_asked_.load(std::memory_order_acquire);
  flush_done_ = served;
  if (!failed()) {
    durable_.advance(written);
    covered_.advance(complete);
  }
  co_return error();
}

Task<Error> Log::sync(io::Queue& io) {
  AsyncMutex::Guard lock = co_await flush_lock_.lock();
  if (failed()) co_return error();
  if (Error e = co_await io.fdatasync(file_)) fail(std::move(e).at("fdatasync"));
  co_return error();
}

std::uint64_t Log::last_sequence() const {
  std::lock_guard guard(mutex_);
  return next_sequence_ - 1;
}

Task<Error> Log::settle() {
  if (!active()) co_return error();
  const std::uint64_t last = last_sequence();
  co_return co_await wait_complete(last);
}

void Log::fail(const Error& error) {
  {
    std::lock_guard guard(mutex_);
    if (!error_) error_ = error;
    failed_.store(true, std::memory_order_release);
  }
  for (Watermark* mark : {&written_, &durable_, &complete_, &covered_, &freed_}) {
    mark->advance(kForever);
  }
}

Error Log::error() const {
  if (!failed()) return {};
  std::lock_guard guard(mutex_);
  return error_;
}

// ---------------------------------------------------------------- header and checkpoint

void build_log_header(const LogHeader& h, const MacKeys& mac, const Uuid& volume,
                      std::span<std::uint8_t, sizeof(LogHeaderRaw)> out) {
  LogHeaderRaw raw;
  std::memset(&raw, 0, sizeof raw);
  std::memcpy(raw.magic, kLogMagic, 8);
  raw.serial = h.serial;
  std::copy(h.log_uuid.begin(), h.log_uuid.end(), raw.log_uuid);
  raw.generation = h.generation;
  raw.session = h.session;
  raw.tail_page = h.tail_page;
  raw.tail_sequence = h.tail_sequence;
  std::copy(h.previous_mac.begin(), h.previous_mac.end(), raw.previous_mac);
  const Mac32 m =
      labelled_mac(mac.log_header, "", volume,
                   {reinterpret_cast<const std::uint8_t*>(&raw), offsetof(LogHeaderRaw, mac)});
  std::copy(m.begin(), m.end(), raw.mac);
  std::memcpy(out.data(), &raw, sizeof raw);
}

namespace {

// Both copies of the log's header. Where the medium does not give out one of them it is zeros, and
// `one_unreadable` is set.
Task<Error> read_log_head(io::Queue& io, const io::File& file, const Extension& extension,
                          AlignedBuffer& pages, bool& one_unreadable) {
  Error both = co_await io.read(file, extension.log_offset, pages.data(), pages.size());
  if (both.kind() != Kind::io_error) co_return both;
  for (std::uint64_t at = 0; at < kLogHeadBytes; at += kPage) {
    Error e = co_await io.read(file, extension.log_offset + at, pages.data() + at, kPage);
    if (!e) continue;
    if (e.kind() != Kind::io_error || one_unreadable) co_return e;
    one_unreadable = true;
    std::memset(pages.data() + at, 0, kPage);
  }
  co_return Error();
}

}  // namespace

Task<Result<LogHeader>> read_log_header(io::Queue& io, const io::File& file,
                                        const Extension& extension, const MacKeys& mac) {
  AlignedBuffer pages(kLogHeadBytes);
  LogHeader best;
  bool other_unreadable = false;
  if (Error e = co_await read_log_head(io, file, extension, pages, other_unreadable)) co_return e;
  int valid = 0;
  for (std::uint64_t copy = 0; copy < 2; ++copy) {
    LogHeaderRaw raw;
    std::memcpy(&raw, pages.data() + copy * kPage, sizeof raw);
    const Mac32 m = labelled_mac(mac.log_header, "", extension.uuid,
                                 {pages.data() + copy * kPage, offsetof(LogHeaderRaw, mac)});
    if (std::memcmp(raw.magic, kLogMagic, 8) != 0 || !crypto::equal_ct(m, raw.mac)) continue;
    if (++valid == 2 && raw.serial <= best.serial) continue;
    best.serial = raw.serial;
    std::copy(std::begin(raw.log_uuid), std::end(raw.log_uuid), best.log_uuid.begin());
    best.generation = raw.generation;
    best.session = raw.session;
    best.tail_page = raw.tail_page;
    best.tail_sequence = raw.tail_sequence;
    std::copy(std::begin(raw.previous_mac), std::end(raw.previous_mac), best.previous_mac.begin());
  }
  best.other_unreadable = other_unreadable;
  best.other_damaged = valid == 1 && !other_unreadable;
  if (valid != 0) co_return best;
  co_return Error(Kind::integrity, other_unreadable
                                       ? "of the copies of the log header one is damaged, and one "
                                         "cannot be read"
                                       : "both copies of the log header are damaged");
}

Task<Error> Log::write_header(io::Queue& io, const LogHeader& header) {
  AlignedBuffer page(kPage);
  build_log_header(
      header, mac_, extension_.uuid,
      std::span<std::uint8_t, sizeof(LogHeaderRaw)>(page.data(), sizeof(LogHeaderRaw)));
  const std::uint64_t at = extension_.log_offset + header.serial % 2 * kPage;
  if (Error e = co_await io.write(file_, at, page.data(), page.size())) co_return e;
  co_return co_await sync(io);
}

Task<Error> Log::begin_generation(io::Queue& io, const SessionKeys* session) {
  LogHeader next;
  next.serial = header_.serial + 1;
  if (Error e = crypto::random_bytes(next.log_uuid)) co_return e;
  next.generation = header_.generation + 1;
  next.session = session != nullptr ? session->id : 0;
  // Watermarks only grow, so a second session in this process counts on from the first.
  next.tail_sequence = next_sequence_;
  if (Error e = co_await write_header(io, next)) {
    // It may be on the medium all the same, and then the log as it was no longer counts.
    fail(std::move(e).at("write log header"));
    co_return error();
  }
  std::lock_guard guard(mutex_);
  assert(blocks_.empty() && overlay_.empty());
  header_ = next;
  session_.store(session, std::memory_order_release);
  head_page_ = tail_page_ = 0;
  last_mac_ = {};
  co_return Error();
}

Task<Error> Log::confirm_header(io::Queue& io) {
  Result<LogHeader> found = co_await read_log_header(io, file_, extension_, mac_);
  if (!found) {
    fail(found.error());
  } else if (found->other_unreadable && found->serial < header_.serial) {
    fail(Error(Kind::io_error, "the log header that was written last cannot be read back"));
  } else if (found->serial != header_.serial || found->log_uuid != header_.log_uuid) {
    fail(Error(Kind::locked,
               "another host has written this image since it was opened here; "
               "writing stops before it harms it"));
  }
  co_return error();
}

Log::Cut Log::freeze() {
  std::lock_guard guard(mutex_);
  if (open_ != nullptr) seal(*open_);
  overlay_.freeze();
  return Cut{next_sequence_ - 1, head_page_, last_mac_};
}

Task<Error> Log::advance_tail(io::Queue& io, const Cut& cut) {
  LogHeader next = header_;
  ++next.serial;
  next.tail_page = cut.page % ring_pages_;
  next.tail_sequence = cut.sequence + 1;
  next.previous_mac = cut.mac;
  if (planted(Fault::reuse_before_tail_durable)) {
    {
      std::lock_guard guard(mutex_);
      tail_page_ = cut.page;
    }
    freed_.advance(freed_.value() + 1);
  }
  if (Error e = co_await write_header(io, next)) {
    fail(std::move(e).at("write log header"));
    co_return error();
  }
  {
    std::lock_guard guard(mutex_);
    header_ = next;
    tail_page_ = cut.page;
  }
  freed_.advance(freed_.value() + 1);
  co_return error();
}

Task<Error> Log::repeat_header(io::Queue& io) {
  LogHeader next = header_;
  ++next.serial;
  if (Error e = co_await write_header(io, next)) {
    fail(std::move(e).at("write log header"));
    co_return error();
  }
  std::lock_guard guard(mutex_);
  header_ = next;
  co_return Error();
}

}  // namespace pqblk::sealed
