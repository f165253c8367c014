#include "export/nbd_negotiation.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace pqblk::exports::nbd {
namespace {

constexpr std::string_view kAllocationName = "base:allocation";
constexpr std::string_view kBaseNamespace = "base:";

// Reads fields from the front of an option's data; a field that is not there makes it bad for good.
class Reader {
 public:
  explicit Reader(std::span<const std::uint8_t> data) : data_(data) {}

  template <class T>
  T take() {
    T value{};
    if (const std::uint8_t* from = advance(sizeof value)) std::memcpy(&value, from, sizeof value);
    return value;
  }
  std::string_view text(std::size_t length) {
    const std::uint8_t* from = advance(length);
    return from == nullptr ? std::string_view()
                           : std::string_view(reinterpret_cast<const char*>(from), length);
  }
  bool bad() const { return bad_; }
  bool ended() const { return !bad_ && data_.empty(); }
  std::size_t left() const { return data_.size(); }

 private:
  const std::uint8_t* advance(std::size_t length) {
    if (bad_ || length > data_.size()) {
      bad_ = true;
      return nullptr;
    }
    const std::uint8_t* from = data_.data();
    data_ = data_.subspan(length);
    return from;
  }

  std::span<const std::uint8_t> data_;
  bool bad_ = false;
};

}  // namespace

Negotiation::Negotiation(ExportInfo info, TlsPolicy tls) : info_(std::move(info)), tls_(tls) {
  agreement_.size = info_.size;
  agreement_.read_only = info_.read_only;
  put(Greeting{kGreetingMagic, kOptionMagic,
               static_cast<std::uint16_t>(kFixedNewstyle | kNoZeroes)});
}

void Negotiation::tls_started() {
  tls_ = TlsPolicy::active;
  agreement_.structured = agreement_.allocation = false;
  input_.clear();
}

// "Transmission flags". DF, which every read honours, is defined for structured replies only.
std::uint16_t Negotiation::transmission_flags() const {
  std::uint16_t flags = kHasFlags | kSendFlush | kSendFua | kCanMultiConn | kSendCache;
  flags |= info_.read_only ? kReadOnly : kSendTrim | kSendWriteZeroes | kSendFastZero;
  if (agreement_.structured) flags |= kSendDf;
  return flags;
}

Negotiation::Step Negotiation::feed(std::span<const std::uint8_t> in, std::size_t& used) {
  used = 0;
  for (;;) {
    if (phase_ == Phase::skip_data) {
      const std::size_t n = std::min<std::size_t>(wanted_, in.size() - used);
      used += n;
      wanted_ -= static_cast<std::uint32_t>(n);
      if (wanted_ != 0) return Step::more;
      refuse(OptionReply::too_big, "the option is longer than 64 KiB");
    } else {
      const std::size_t n = std::min<std::size_t>(wanted_ - input_.size(), in.size() - used);
      input_.insert(input_.end(), in.begin() + static_cast<std::ptrdiff_t>(used),
                    in.begin() + static_cast<std::ptrdiff_t>(used + n));
      used += n;
      if (input_.size() < wanted_) return Step::more;
      const std::vector<std::uint8_t> item = std::exchange(input_, {});
      Step step = Step::more;
      if (phase_ == Phase::client_flags) step = client_flags(item);
      if (phase_ == Phase::option_header) {
        step = option_header(item);
        if (step != Step::more) return step;
        continue;
      }
      if (phase_ == Phase::option_data) step = option(item);
      phase_ = Phase::option_header;
      wanted_ = sizeof(OptionHeader);
      if (step != Step::more) return step;
      continue;
    }
    phase_ = Phase::option_header;
    wanted_ = sizeof(OptionHeader);
  }
}

// "Newstyle negotiation": flags that the server did not offer end the session.
Negotiation::Step Negotiation::client_flags(std::span<const std::uint8_t> bytes) {
  const std::uint32_t flags = Reader(bytes).take<Be32>();
  if ((flags & ~std::uint32_t{kFixedNewstyle | kNoZeroes}) != 0) return Step::end;
  no_zeroes_ = (flags & kNoZeroes) != 0;
  return Step::more;
}

Negotiation::Step Negotiation::option_header(std::span<const std::uint8_t> bytes) {
  const auto header = Reader(bytes).take<OptionHeader>();
  if (header.magic != kOptionMagic || ++options_ > kOptionsMax) return Step::end;
  option_ = static_cast<Option>(header.option.get());
  wanted_ = header.length;
  phase_ = wanted_ > kOptionMax ? Phase::skip_data : Phase::option_data;
  return Step::more;
}

Negotiation::Step Negotiation::option(std::span<const std::uint8_t> data) {
  const bool plain = tls_ == TlsPolicy::required;
  if (plain && option_ == Option::export_name) return Step::end;  // it has no way to say why
  if (plain && option_ != Option::starttls && option_ != Option::abort) {
    refuse(OptionReply::tls_required, "this server speaks TLS only");
    return Step::more;
  }
  switch (option_) {
    case Option::export_name:
      return export_name(data);
    case Option::abort:
      reply(OptionReply::ack, 0);
      return Step::end;
    case Option::list:
      list(data);
      return Step::more;
    case Option::starttls:
      return starttls(data);
    case Option::info:
    case Option::go:
      return info_or_go(data);
    case Option::structured_reply:
      structured_reply(data);
      return Step::more;
    case Option::list_meta_context:
    case Option::set_meta_context:
      meta_context(data, option_ == Option::set_meta_context);
      return Step::more;
  }
  refuse(OptionReply::unsupported, "this server does not know the option");
  return Step::more;
}

// NBD_OPT_EXPORT_NAME
Negotiation::Step Negotiation::export_name(std::span<const std::uint8_t> data) {
  if (!known(Reader(data).text(data.size()))) return Step::end;
  put(Be64(info_.size));
  put(Be16(transmission_flags()));
  if (!no_zeroes_) output_.insert(output_.end(), kExportNamePadding, 0);
  return Step::transmission;
}

// NBD_OPT_LIST
void Negotiation::list(std::span<const std::uint8_t> data) {
  if (!data.empty()) return refuse(OptionReply::invalid, "the option takes no data");
  const auto name = static_cast<std::uint32_t>(info_.name.size());
  reply(OptionReply::server,
        static_cast<std::uint32_t>(sizeof(Be32) + name + info_.description.size()));
  put(Be32(name));
  put(std::string_view(info_.name));
  put(std::string_view(info_.description));
  reply(OptionReply::ack, 0);
}

// NBD_OPT_STARTTLS
Negotiation::Step Negotiation::starttls(std::span<const std::uint8_t> data) {
  if (!data.empty()) {
    refuse(OptionReply::invalid, "the option takes no data");
  } else if (tls_ == TlsPolicy::active) {
    refuse(OptionReply::invalid, "TLS is in use already");
  } else if (tls_ == TlsPolicy::none) {
    refuse(OptionReply::policy, "this server has no keys for TLS");
  } else {
    reply(OptionReply::ack, 0);
    return Step::start_tls;
  }
  return Step::more;
}

// NBD_OPT_INFO, NBD_OPT_GO
Negotiation::Step Negotiation::info_or_go(std::span<const std::uint8_t> data) {
  Reader reader(data);
  const std::uint32_t length = reader.take<Be32>();
  const std::string_view name = reader.text(length);
  const std::uint16_t count = reader.take<Be16>();
  if (reader.bad() || reader.left() != count * sizeof(Be16) || length > kNameMax) {
    refuse(OptionReply::invalid, "the lengths in the option contradict each other");
    return Step::more;
  }
  if (!known(name)) {
    refuse(OptionReply::unknown, "there is no such export");
    return Step::more;
  }
  bool wants[4] = {};  // each answered once, however often it is asked for
  for (std::uint16_t i = 0; i < count; ++i) {
    const std::uint16_t type = reader.take<Be16>();
    if (type < std::size(wants)) wants[type] = true;
  }
  const auto wanted = [&](Info type) { return wants[static_cast<std::size_t>(type)]; };
  const auto info = [&](Info type, std::size_t bytes) {
    reply(OptionReply::info, static_cast<std::uint32_t>(sizeof(Be16) + bytes));
    put(Be16(static_cast<std::uint16_t>(type)));
  };
  info(Info::export_info, sizeof(Be64) + sizeof(Be16));
  put(Be64(info_.size));
  put(Be16(transmission_flags()));
  if (wanted(Info::name)) {
    info(Info::name, info_.name.size());
    put(std::string_view(info_.name));
  }
  if (wanted(Info::description)) {
    info(Info::description, info_.description.size());
    put(std::string_view(info_.description));
  }
  if (wanted(Info::block_size)) {
    info(Info::block_size, 3 * sizeof(Be32));
    put(Be32(kMinimumBlock));
    put(Be32(kPreferredBlock));
    put(Be32(kPayloadMax));
  }
  reply(OptionReply::ack, 0);
  return option_ == Option::go ? Step::transmission : Step::more;
}

// NBD_OPT_STRUCTURED_REPLY
void Negotiation::structured_reply(std::span<const std::uint8_t> data) {
  if (!data.empty()) return refuse(OptionReply::invalid, "the option takes no data");
  agreement_.structured = true;
  reply(OptionReply::ack, 0);
}

// NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT
void Negotiation::meta_context(std::span<const std::uint8_t> data, bool set) {
  if (set) agreement_.allocation = false;  // also when it fails
  if (!agreement_.structured) {
    return refuse(OptionReply::invalid, "negotiate structured replies first");
  }
  Reader reader(data);
  const std::uint32_t length = reader.take<Be32>();
  const std::string_view name = reader.text(length);
  const std::uint32_t count = reader.take<Be32>();
  if (reader.bad() || length > kNameMax) {
    return refuse(OptionReply::invalid, "the lengths in the option contradict each other");
  }
  if (count > kQueriesMax) return refuse(OptionReply::too_big, "more than 64 queries");
  bool found = !set && count == 0;  // a list without queries asks for all there is
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint32_t bytes = reader.take<Be32>();
    const std::string_view query = reader.text(bytes);
    if (query == kAllocationName || (!set && query == kBaseNamespace)) found = true;
  }
  if (!reader.ended()) {
    return refuse(OptionReply::invalid, "the lengths in the option contradict each other");
  }
  if (!known(name)) return refuse(OptionReply::unknown, "there is no such export");
  if (found) {
    reply(OptionReply::meta_context,
          static_cast<std::uint32_t>(sizeof(Be32) + kAllocationName.size()));
    put(Be32(set ? kBaseAllocation : 0));
    put(kAllocationName);
  }
  if (set) agreement_.allocation = found;
  reply(OptionReply::ack, 0);
}

void Negotiation::put(std::string_view text) {
  output_.insert(output_.end(), text.begin(), text.end());
}

void Negotiation::reply(OptionReply type, std::uint32_t length) {
  put(OptionReplyHeader{kOptionReplyMagic, static_cast<std::uint32_t>(option_),
                        static_cast<std::uint32_t>(type), length});
}

}  // namespace pqblk::exports::nbd
