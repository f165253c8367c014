// What a sealed disk cannot be opened without, taken aside and put back: header and session table.
//
// Room image/. The key area is replaced by other means (disk_info.h); whether a backup is the right
// one is the key layer's decision. docs/keys.md, "Header backup".
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "sealed/backend_api.h"
#include "sealed/keys.h"

namespace pqblk::image {

struct HeaderBackup {
  sealed::Uuid uuid{};
  std::vector<std::uint8_t> header;    // the first cluster, without the zeros at its end
  std::vector<std::uint8_t> sessions;  // one copy of the session table, likewise
};

// Blocking, takes no lock: a served disk can be backed up, as of some moment.
Result<HeaderBackup> read_header_backup(const std::string& path);

struct HeaderLook {
  bool readable = false;       // the disk's own header: its MAC holds, and it is not marked
  bool lacks_newest = false;   // the keys are without the data key that was written under last
  sealed::KeyArea key_area{};  // where that header has it, or else the backup's
};

// What a restore would find: the copies of the key area in the places that an authentic header
// names, though nobody can read the one on the disk. Blocking, takes no lock, writes nothing.
// Errors: those of restore_header but locked.
Result<HeaderLook> look_at_header(const std::string& path, const HeaderBackup& backup,
                                  sealed::VolumeKeys keys);

struct HeaderRestored {
  bool header = false;         // it was unreadable and is the backup's now, marked corrupt
  std::uint32_t sessions = 0;  // that the backup gives back
  bool sessions_lost = false;  // nothing on the disk told how many there were
  bool by_log_alone = false;   // of what the header names only the log shows that it is there
};

// Blocking, under the disk's lock. The header first, then, `with_sessions`, the session table:
// where a header that was put back has the table may be live space of others, a check must tell
// before anything is written there. A header that is readable, and not marked, is left alone. Of
// the session table, entries that the disk has lost come back, and nothing goes. A header that was
// put back is marked corrupt until clear_corrupt: whether its table positions are still true, a
// check must tell. Errors: wrong_key (another volume), integrity (the backup's MACs do not hold, or
// neither session table nor log is where the backup's header has it), locked.
Result<HeaderRestored> restore_header(const std::string& path, const HeaderBackup& backup,
                                      bool with_sessions, sealed::VolumeKeys keys);

// Takes the mark off again, of the header that begins with `checked` (empty: of any). Blocking,
// under the disk's lock. Kind::locked when another one has come since.
Error clear_corrupt(const std::string& path, std::span<const std::uint8_t> checked);

}  // namespace pqblk::image
