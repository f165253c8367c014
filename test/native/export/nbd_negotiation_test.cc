// The NBD handshake on its own: what each option is answered, byte by byte and in any pieces.
#include "export/nbd_negotiation.h"

#include <doctest/doctest.h>

#include <cstring>

#include "export/nbd_client.h"
#include "export/vhost_user_lab.h"

namespace pqblk::exports::test {
namespace {

using nbd::Negotiation;
using nbd::Option;
using nbd::OptionReply;
using nbd::TlsPolicy;
using Step = Negotiation::Step;

constexpr std::uint64_t kSize = 0x1234'5678'9a00;

Bytes flags(std::uint32_t value) {
  Bytes bytes;
  append(bytes, Be32(value));
  return bytes;
}

Bytes option(Option which, const Bytes& data = {}) {
  Bytes bytes;
  append(bytes, nbd::OptionHeader{nbd::kOptionMagic, static_cast<std::uint32_t>(which),
                                  static_cast<std::uint32_t>(data.size())});
  append_bytes(bytes, data.data(), data.size());
  return bytes;
}

Bytes operator+(Bytes a, const Bytes& b) {
  append_bytes(a, b.data(), b.size());
  return a;
}

struct Talk {
  explicit Talk(TlsPolicy tls = TlsPolicy::none, bool read_only = false)
      : talk({"vm", "a disk", kSize, read_only}, tls) {
    talk.output().clear();
    CHECK(say(flags(3)) == Step::more);
  }
  Step say(const Bytes& bytes) {
    const Step step = talk.feed(bytes, used);
    return step;
  }
  // The types of the replies so far, and their data; clears them.
  std::vector<OptionAnswer> answers() {
    std::vector<OptionAnswer> all;
    const Bytes& out = talk.output();
    for (std::size_t at = 0; at + sizeof(nbd::OptionReplyHeader) <= out.size();) {
      nbd::OptionReplyHeader header;
      std::memcpy(&header, &out[at], sizeof header);
      CHECK(header.magic == nbd::kOptionReplyMagic);
      at += sizeof header;
      REQUIRE(header.length <= out.size() - at);
      const auto from = out.begin() + static_cast<std::ptrdiff_t>(at);
      all.push_back({static_cast<OptionReply>(header.type.get()),
                     Bytes(from, from + static_cast<std::ptrdiff_t>(header.length.get()))});
      at += header.length;
    }
    talk.output().clear();
    return all;
  }
  OptionReply only(const Bytes& bytes) {
    CHECK(say(bytes) == Step::more);
    const auto all = answers();
    REQUIRE(all.size() == 1);
    return all[0].type;
  }

  Negotiation talk;
  std::size_t used = 0;
};

}  // namespace

TEST_CASE("nbd negotiation: GO tells size, flags and block sizes, then requests follow") {
  Talk t;
  CHECK(t.only(option(Option::structured_reply)) == OptionReply::ack);
  const Bytes go = option(Option::go, go_data("vm", {3, 3, 1, 2, 77}));
  CHECK(t.say(go + Bytes(5, 9)) == Step::transmission);
  CHECK(t.used == go.size());  // the rest is not ours
  const auto all = t.answers();
  REQUIRE(all.size() == 5);
  Bytes expected;
  append(expected, Be16(0));
  append(expected, Be64(kSize));
  append(expected, Be16(nbd::kHasFlags | nbd::kSendFlush | nbd::kSendFua | nbd::kSendTrim |
                        nbd::kSendWriteZeroes | nbd::kSendDf | nbd::kCanMultiConn |
                        nbd::kSendCache | nbd::kSendFastZero));
  CHECK(all[0].data == expected);
  CHECK(all[1].data == Bytes{0, 1, 'v', 'm'});
  CHECK(all[2].data == Bytes{0, 2, 'a', ' ', 'd', 'i', 's', 'k'});
  CHECK(all[3].data == Bytes{0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0});
  CHECK(all[4].type == OptionReply::ack);
  CHECK(t.talk.agreement().structured);
  CHECK_FALSE(t.talk.agreement().allocation);
}

TEST_CASE("nbd negotiation: EXPORT_NAME, with and without zeroes, and an unknown name") {
  for (const bool no_zeroes : {true, false}) {
    Negotiation talk({"", "", kSize, true}, TlsPolicy::none);
    talk.output().clear();
    std::size_t used = 0;
    const Bytes in = flags(no_zeroes ? 3 : 1) + option(Option::export_name);
    CHECK(talk.feed(in, used) == Step::transmission);
    Bytes expected;
    append(expected, Be64(kSize));
    append(expected, Be16(nbd::kHasFlags | nbd::kReadOnly | nbd::kSendFlush | nbd::kSendFua |
                          nbd::kCanMultiConn | nbd::kSendCache));
    if (!no_zeroes) expected.resize(expected.size() + 124);
    CHECK(talk.output() == expected);
  }
  Talk t;
  CHECK(t.say(option(Option::export_name, {'x'})) == Step::end);
  CHECK(t.talk.output().empty());
}

TEST_CASE("nbd negotiation: lists, meta contexts, ends") {
  Talk t;
  CHECK(t.say(option(Option::list)) == Step::more);
  auto all = t.answers();
  REQUIRE(all.size() == 2);
  CHECK(all[0].data == Bytes{0, 0, 0, 2, 'v', 'm', 'a', ' ', 'd', 'i', 's', 'k'});
  CHECK(t.only(option(Option::list, {1})) == OptionReply::invalid);
  const auto meta = [](Option which, const std::string& name, std::vector<std::string> queries) {
    return option(which, meta_data(name, queries));
  };
  const Bytes set = meta(Option::set_meta_context, "vm", {"x:y", "base:allocation"});
  CHECK(t.only(set) == OptionReply::invalid);  // structured replies come first
  CHECK(t.only(option(Option::structured_reply, {1})) == OptionReply::invalid);
  CHECK(t.only(option(Option::structured_reply)) == OptionReply::ack);
  CHECK(t.say(set) == Step::more);
  CHECK(t.answers().size() == 2);
  CHECK(t.talk.agreement().allocation);
  CHECK(t.only(meta(Option::set_meta_context, "no", {"base:allocation"})) == OptionReply::unknown);
  CHECK_FALSE(t.talk.agreement().allocation);  // a failure clears what was set
  CHECK(t.only(meta(Option::set_meta_context, "", {"base:"})) == OptionReply::ack);
  CHECK_FALSE(t.talk.agreement().allocation);
  for (const auto& queries : {std::vector<std::string>{}, {"base:"}, {"base:allocation"}}) {
    CHECK(t.say(meta(Option::list_meta_context, "", queries)) == Step::more);
    all = t.answers();
    REQUIRE(all.size() == 2);
    CHECK(all[0].data.size() == 4 + 15);
  }
  CHECK(t.only(meta(Option::list_meta_context, "", {"q"})) == OptionReply::ack);
  CHECK(t.only(meta(Option::list_meta_context, "", std::vector<std::string>(65))) ==
        OptionReply::too_big);
  CHECK(t.say(option(Option::abort)) == Step::end);
  CHECK(t.answers().size() == 1);
}

TEST_CASE("nbd negotiation: malformed and unknown options are answered, and it goes on") {
  Talk t;
  CHECK(t.only(option(static_cast<Option>(4))) == OptionReply::unsupported);
  CHECK(t.only(option(static_cast<Option>(11))) == OptionReply::unsupported);
  CHECK(t.only(option(static_cast<Option>(0xffffffff), Bytes(1000))) == OptionReply::unsupported);
  CHECK(t.only(option(Option::go)) == OptionReply::invalid);
  CHECK(t.only(option(Option::go, {0, 0, 0, 9, 'x', 0, 0})) == OptionReply::invalid);
  CHECK(t.only(option(Option::go, {0xff, 0xff, 0xff, 0xff, 0, 0})) == OptionReply::invalid);
  CHECK(t.only(option(Option::info, {0, 0, 0, 0, 0, 2, 0, 1})) == OptionReply::invalid);
  CHECK(t.only(option(Option::info, go_data("nothing", {}))) == OptionReply::unknown);
  CHECK(t.only(option(Option::starttls)) == OptionReply::policy);
  CHECK(t.only(option(Option::structured_reply)) == OptionReply::ack);
  CHECK(t.only(option(Option::list_meta_context,
                      {0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff})) == OptionReply::invalid);
  CHECK(t.only(option(Option::list, Bytes(nbd::kOptionMax + 1))) == OptionReply::too_big);
  CHECK(t.say(Bytes(16, 3)) == Step::end);  // no option at all
}

TEST_CASE("nbd negotiation: TLS first, and nothing said before counts") {
  Talk t(TlsPolicy::required);
  CHECK(t.only(option(Option::go, go_data("vm", {}))) == OptionReply::tls_required);
  CHECK(t.only(option(Option::list)) == OptionReply::tls_required);
  CHECK(t.only(option(Option::structured_reply)) == OptionReply::tls_required);
  CHECK(t.only(option(Option::starttls, {1})) == OptionReply::invalid);
  const Bytes start = option(Option::starttls);
  CHECK(t.say(start + option(Option::list)) == Step::start_tls);
  CHECK(t.used == start.size());  // what follows in plain text is seen by the caller
  CHECK(t.answers().size() == 1);
  t.talk.tls_started();
  CHECK(t.only(option(Option::starttls)) == OptionReply::invalid);
  CHECK_FALSE(t.talk.agreement().structured);
  CHECK(t.say(option(Option::go, go_data("", {}))) == Step::transmission);
  Talk old(TlsPolicy::required);
  CHECK(old.say(option(Option::export_name)) == Step::end);
}

TEST_CASE("nbd negotiation: the pieces in which bytes come change nothing") {
  const Bytes whole = flags(3) + option(Option::list) + option(static_cast<Option>(77), Bytes(99)) +
                      option(Option::structured_reply) +
                      option(Option::list, Bytes(nbd::kOptionMax + 7)) +
                      option(Option::set_meta_context, meta_data("", {"base:allocation"})) +
                      option(Option::go, go_data("vm", {3}));
  const auto run = [&](auto next_piece) {
    Negotiation talk({"vm", "a disk", kSize, false}, TlsPolicy::none);
    Step step = Step::more;
    for (std::size_t at = 0; at < whole.size() && step == Step::more;) {
      const std::size_t piece = std::min<std::size_t>(next_piece(), whole.size() - at);
      std::size_t used = 0;
      step = talk.feed({whole.data() + at, piece}, used);
      REQUIRE(used <= piece);
      if (step == Step::more) REQUIRE(used == piece);
      at += used;
    }
    CHECK(step == Step::transmission);
    CHECK(talk.agreement().allocation);
    return talk.output();
  };
  const Bytes expected = run([&] { return whole.size(); });
  CHECK(run([] { return std::size_t{1}; }) == expected);
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Dice dice(seed);
    CHECK(run([&] { return std::size_t{1} + dice.below(300); }) == expected);
  }
}

}  // namespace pqblk::exports::test
