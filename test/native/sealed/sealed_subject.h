// The sealed disk as a subject of the simulator, and the keys that tests seal with.
//
// Room test/sealed.
#pragma once

#include <cstdint>
#include <vector>

#include "image/sealed_backend.h"
#include "sim/nonce_trace.h"
#include "sim/subject.h"

namespace pqblk::test {

struct SealedShape {
  std::uint64_t sectors = 40;
  std::uint32_t cluster_bits = 13;  // two sectors a cluster: every structure is soon crossed
  std::uint64_t log_bytes = 256 * 1024;
  crypto::Suite suite = crypto::Suite::aes_256_gcm;
  bool non_volatile = false;  // with atomic_4k: class O1
  std::uint64_t overlay_sectors_max = 24;
  std::uint64_t session_sectors_max = 64;
  std::uint64_t relocate_bytes_min = kSectorSize;  // whole clusters move whenever they may
  // Where it is not 0 the log may go home at any time. 0 shows who forgets to ask for a checkpoint.
  std::uint64_t rest_ns = 0;
  // The data key rotates: relocations write again, full checkpoints begin a rotation or finish it.
  bool rotates = false;
  // Before each open one copy of the log's header goes, if both are there; it comes back where the
  // log has gone round since the other one, and the disk stays shut for that.
  bool loses_log_header = false;
};

sealed::VolumeKeys test_keys();
// The key of an epoch; epoch 1 is that of test_keys().
sealed::DataKey test_data_key(std::uint32_t epoch);
sealed::Uuid test_uuid();
sealed::CreateOptions create_options(const SealedShape& shape);
image::SealedOptions open_options(const SealedShape& shape);

// Nonces of all lives of a run are traced; the subject's verdict names a duplicate.
sim::Subject sealed_subject(const SealedShape& shape);

}  // namespace pqblk::test
