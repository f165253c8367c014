// The NBD handshake as a state machine: bytes of the client in, bytes for the client out.
//
// Room export/. It owns no socket and no time: who feeds it sets the deadline and drops the client
// at the end. Every length is checked before it is used; memory is bounded by kOptionMax.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "export/nbd_protocol.h"

namespace pqblk::exports::nbd {

// What a client may learn of the disk.
struct ExportInfo {
  std::string name;         // "" is also accepted, as the default export
  std::string description;  // may be empty
  std::uint64_t size = 0;   // bytes
  bool read_only = false;
};

// What the client chose for its transmission phase.
struct Agreement {
  bool structured = false;  // structured replies
  bool allocation = false;  // block status with base:allocation
  std::uint64_t size = 0;
  bool read_only = false;
};

enum class TlsPolicy : std::uint8_t { none, required, active };

class Negotiation {
 public:
  enum class Step : std::uint8_t {
    more,          // send what is in output(), then feed more bytes
    start_tls,     // send output(), do the TLS handshake, then go on with tls_started()
    transmission,  // send output(); agreement() holds, later bytes are requests
    end,           // send output() as far as it goes, then close
  };

  // The greeting waits in output() from the start.
  Negotiation(ExportInfo info, TlsPolicy tls);

  // Takes bytes from the front of `in`; `used` says how many. It stops after the option that ends
  // a step, so that what follows stays with the caller.
  Step feed(std::span<const std::uint8_t> in, std::size_t& used);

  // After the TLS handshake: forgets what the client said in plain text.
  void tls_started();

  std::vector<std::uint8_t>& output() { return output_; }
  const Agreement& agreement() const { return agreement_; }
  std::uint16_t transmission_flags() const;

 private:
  enum class Phase : std::uint8_t { client_flags, option_header, option_data, skip_data };

  Step client_flags(std::span<const std::uint8_t> bytes);
  Step option_header(std::span<const std::uint8_t> bytes);
  Step option(std::span<const std::uint8_t> data);
  Step export_name(std::span<const std::uint8_t> data);
  Step info_or_go(std::span<const std::uint8_t> data);
  void list(std::span<const std::uint8_t> data);
  void structured_reply(std::span<const std::uint8_t> data);
  Step starttls(std::span<const std::uint8_t> data);
  void meta_context(std::span<const std::uint8_t> data, bool set);
  bool known(std::string_view name) const { return name.empty() || name == info_.name; }

  template <class T>
  void put(const T& value) {
    const std::size_t at = output_.size();
    output_.resize(at + sizeof value);
    std::memcpy(output_.data() + at, &value, sizeof value);
  }
  void put(std::string_view text);
  void reply(OptionReply type, std::uint32_t length);
  void refuse(OptionReply type, std::string_view why) {
    reply(type, static_cast<std::uint32_t>(why.size()));
    put(why);
  }

  const ExportInfo info_;
  TlsPolicy tls_;
  Agreement agreement_;
  std::vector<std::uint8_t> input_;  // the part of an item that has arrived
  std::vector<std::uint8_t> output_;
  Phase phase_ = Phase::client_flags;
  std::uint32_t wanted_ = 4;  // bytes of the item, or bytes still to skip
  Option option_ = Option::abort;
  std::uint32_t options_ = 0;
  bool no_zeroes_ = false;
};

}  // namespace pqblk::exports::nbd
