// The overwrite of one sector, nearly every small write of a busy disk: what sealed_write.cc does
// in general, in one pass without a suspension from the look-up to the record. See
// sealed_backend.h.

#include "image/sealed_backend.h"
#include "sealed/planted_faults.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT

// Class O1 or O2, and where home is; false when that is not known at once, or it is another class.
bool SealedBackend::plan_overwrite(const QueueContext& q, Sector s, Overwrite& w) {
  overlay_.prefetch(s);
  std::uint64_t raw = 0, entries = 0;
  if (!mapping_now(q, geometry_.data_slot(geometry_.cluster_of(s)), raw)) return false;
  if (l2_host(raw) == 0 || (raw & kL2Copied) == 0) return false;  // I9
  w.host = l2_host(raw) + geometry_.offset_in_cluster(s);
  if (writes_in_place()) {
    // O1 is right over whatever home holds, a sector never written too, so its entry is not looked
    // at: in a large working set that is a wait for memory. So is the overlay, which is asked once
    // the sector is sealed and what was fetched ahead has come.
    w.cls = WriteClass::o1;
    return mapping_now(q, geometry_.entry_slot(s), entries) && l2_host(entries) != 0;
  }
  if (ask_overlay(s, w)) return w.old == State::data;
  Resolved home;
  w.cls = WriteClass::o2;
  return resolve_one_now(s, home) && home.version.entry.state() == State::data;
}

// The class of a sector that has a version in the overlay; false when it has none.
bool SealedBackend::ask_overlay(Sector s, Overwrite& w) {
  Version now;
  if (!overlay_.find(s, now, Overlay::Cipher::leave)) return false;
  w.cls = class_of(s, now);
  w.old = now.entry.state();
  return true;
}

// Inside writers_ on true, with the record in the log and in the overlay. False: nothing has
// happened but that a nonce may be lost.
bool SealedBackend::begin_overwrite(QueueContext& q, Sector s, const GuestBuffers& data,
                                    Overwrite& w) {
  if (planted(Fault::data_before_record) || planted(Fault::ack_across_hole)) return false;
  const std::uint8_t* const plain = data.contiguous(0, kSectorSize);
  if (plain == nullptr || options_.read_only || beyond_end_ != 0 || session_id() == kNoSession ||
      log_->failed() || !writers_.enter()) {
    return false;
  }
  if (!lane_ready(q) && lane(q).claim(1) && plan_overwrite(q, s, w)) {
    w.cipher = take_cipher(pool_, kSectorSize);
    const bool sealed = !seal_sector(q, s, plain, w.cipher.data(), w.entry);
    // In place: what the overlay has may say otherwise.
    const bool planned = w.cls != WriteClass::o1 || !ask_overlay(s, w) || w.old == State::data;
    if (sealed && planned && append_overwrite(q, s, w)) return true;
  }
  writers_.leave();
  return false;
}

bool SealedBackend::append_overwrite(QueueContext& q, Sector s, Overwrite& w) {
  const std::uint32_t inlined = w.cls == WriteClass::o2 ? 1 : 0;
  bool pressed = false, began = false;
  {
    Log::Appender appender(*log_);
    if (!appender.fits(Log::pages_for(1, inlined, 1))) return false;  // I8
    if (w.cls == WriteClass::o2) {
      appender.wd(s, w.entry, w.cipher);
    } else {
      appender.w(s, {&w.entry, 1}, w.cipher);
    }
    w.sequence = appender.receipt().last;
    pressed = appender.pressed();
    began = appender.began_block();
  }
  if (began) launch_log(q);
  if (pressed) ask_checkpoint();
  return true;
}

// I1: the record is durable before data is written in place. I6: it is written before anybody is
// told.
Task<Error> SealedBackend::write_one(QueueContext& q, Sector s, GuestBuffers data, bool fua) {
  Overwrite w;
  if (!begin_overwrite(q, s, data, w)) co_return co_await write_any(q, s, data, fua);
  co_await log_->reach_written(w.sequence);
  Error e = log_->error();
  if (!e && w.cls == WriteClass::o1) {
    if (log_->durable() < w.sequence) e = co_await log_->wait_durable(q.io, w.sequence);
    overlay_.prefetch(s);  // for landed(): the write takes longer
    if (!e && (e = co_await q.io.write(file_, w.host, w.cipher.data(), kSectorSize))) {
      log_->fail(e);  // a record without its data: nothing more may be acknowledged
    }
    if (!e) {
      overlay_.landed(s, {&w.entry, 1});
      log_->data_done(w.sequence);
    }
  }
  writers_.leave();
  if (!e && must_flush_after(fua)) co_return co_await log_->flush(q.io);
  co_return e;
}

}  // namespace pqblk::image
