#include "pkcs11/server.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

namespace pqblk::pkcs11 {
namespace {

// Calls a function of the module unless its place is empty, and turns what it says into a Failure.
template <typename... Parameters, typename... Arguments>
Done call(std::string_view name, Rv (*function)(Parameters...), Arguments&&... arguments) {
  if (function == nullptr) {
    return Failure::of(Complaint::unsupported, "the module has no " + std::string(name));
  }
  const Rv rv = function(std::forward<Arguments>(arguments)...);
  if (rv != kOk) return Failure::of(rv, name);
  return Nothing{};
}

// Fixed fields of the standard are padded with blanks; some modules pad with NUL.
template <std::size_t N>
void padded_text(ReplyWriter& reply, const Byte (&field)[N]) {
  std::size_t length = static_cast<std::size_t>(std::find(field, field + N, 0) - field);
  while (length > 0 && field[length - 1] == ' ') --length;
  reply.bytes({field, length});
}

// `secret` is no longer than the mask, and is masked where it lies.
void reply_masked(ReplyWriter& reply, std::span<std::uint8_t> secret, Bytes mask) {
  assert(secret.size() <= mask.size());
  for (std::size_t i = 0; i < secret.size(); ++i) {
    secret[i] = static_cast<std::uint8_t>(secret[i] ^ mask[i]);
  }
  reply.bytes(secret);
}

Failure too_many(std::string_view what, std::size_t max) {
  return Failure::of(Complaint::limit,
                     "more than " + std::to_string(max) + " " + std::string(what));
}

}  // namespace

std::span<const std::uint8_t> Server::answer(Bytes message, std::span<std::uint8_t> out) {
  ReplyWriter reply(out);
  values_used_ = 0;
  Result<Request> request = parse_request(message);
  Done done = !request
                  ? Done(Failure::of(Complaint::protocol, request.error().message()))
                  : std::visit(
                        [&](auto& which) -> Done {
                          const bool loads = std::is_same_v<decltype(which), Load&>;
                          const bool ends = std::is_same_v<decltype(which), Close&>;
                          if (!ends && loads == module_.has_value()) {
                            return Failure::of(Complaint::protocol, "not now: load once, first");
                          }
                          return handle(which, reply);
                        },
                        *request);
  values_.wipe();
  if (done && !reply.overflowed()) return reply.reply();
  Failure failure = done ? Failure::of(Complaint::limit, "the answer is too long for a message")
                         : done.take_failure();
  reply.restart(failure.rv == kOk ? Status::local : Status::cryptoki);
  if (failure.rv != kOk) {
    reply.u64(failure.rv);
    reply.text(failure.function);
  } else {
    reply.u8(static_cast<std::uint8_t>(failure.complaint));
    reply.text(std::string_view(failure.message).substr(0, kTextBytesMax));
  }
  return reply.reply();
}

Done Server::handle(Load& request, ReplyWriter& reply) {
  Outcome<Module> module = Module::load(request);
  if (!module) return module.take_failure();
  module_ = *module;
  style_ = request.style;
  return describe(reply);
}

Done Server::describe(ReplyWriter& reply) {
  Info info{};
  if (Done done = call("C_GetInfo", functions().get_info, &info); !done) return done;
  reply.u8(info.cryptoki.major);
  reply.u8(info.cryptoki.minor);
  padded_text(reply, info.manufacturer);
  padded_text(reply, info.library);
  reply.u8(info.library_version.major);
  reply.u8(info.library_version.minor);
  reply.u8(module_->interface_version().major);
  reply.u8(module_->interface_version().minor);
  Ulong count = 0;
  if (Done done = call("C_GetSlotList", functions().get_slot_list, Byte{1}, nullptr, &count); !done)
    return done;
  if (count > kSlotsMax) return too_many("slots", kSlotsMax);
  std::array<SlotId, kSlotsMax> slots{};
  if (count > 0) {
    count = kSlotsMax;  // a token may be plugged in between the two calls
    if (Done done = call("C_GetSlotList", functions().get_slot_list, Byte{1}, slots.data(), &count);
        !done) {
      return done;
    }
    if (count > kSlotsMax) return Failure::of(Complaint::answer, "C_GetSlotList overruns its list");
  }
  reply.u32(static_cast<std::uint32_t>(count));
  for (Ulong i = 0; i < count; ++i) reply.u64(slots[i]);
  return Nothing{};
}

Done Server::handle(DescribeSlot& request, ReplyWriter& reply) {
  SlotInfo slot{};
  if (Done done = call("C_GetSlotInfo", functions().get_slot_info, request.slot, &slot); !done)
    return done;
  TokenInfo token{};
  if (Done done = call("C_GetTokenInfo", functions().get_token_info, request.slot, &token); !done)
    return done;
  padded_text(reply, slot.description);
  padded_text(reply, token.label);
  padded_text(reply, token.manufacturer);
  padded_text(reply, token.model);
  padded_text(reply, token.serial);
  reply.u64(token.flags);
  return Nothing{};
}

Done Server::handle(DescribeMechanism& request, ReplyWriter& reply) {
  if (functions().get_mechanism_info == nullptr) {
    return Failure::of(Complaint::unsupported, "the module has no C_GetMechanismInfo");
  }
  MechanismInfo info{};
  const Rv rv = functions().get_mechanism_info(request.slot, request.mechanism, &info);
  if (rv != kOk && rv != kMechanismInvalid) return Failure::of(rv, "C_GetMechanismInfo");
  reply.u8(rv == kOk ? 1 : 0);
  reply.u64(info.flags);
  return Nothing{};
}

Done Server::handle(Open& request, ReplyWriter&) {
  if (session_) return Failure::of(Complaint::protocol, "a session is open already");
  Handle session = 0;
  const Ulong flags = kSerialSession | (request.read_write ? kReadWriteSession : 0);
  if (Done done = call("C_OpenSession", functions().open_session, request.slot, flags, nullptr,
                       nullptr, &session);
      !done) {
    return done;
  }
  session_ = session;
  return Nothing{};
}

Done Server::handle(Login& request, ReplyWriter&) {
  const Ulong user = request.security_officer ? kSecurityOfficer : kUser;
  const std::span<std::uint8_t> pin = keep(request.pin);
  // An empty PIN is a PIN; only "no PIN" lets the token's own PIN pad ask.
  Byte* at = request.has_pin ? pin.data() : nullptr;
  Done done = call("C_Login", functions().login, session_.value_or(0), user, at, pin.size());
  if (!done) {
    Failure failure = done.take_failure();
    if (failure.rv != kAlreadyLoggedIn) return failure;
  }
  logged_in_ = true;
  return Nothing{};
}

Done Server::handle(InitPin& request, ReplyWriter&) {
  const std::span<std::uint8_t> pin = keep(request.pin);
  return call("C_InitPIN", functions().init_pin, session_.value_or(0), pin.data(), pin.size());
}

Done Server::handle(Find& request, ReplyWriter& reply) {
  const Handle session = session_.value_or(0);
  std::vector<Attribute> criteria = keep(request.criteria);
  if (Done done = call("C_FindObjectsInit", functions().find_objects_init, session, criteria.data(),
                       criteria.size());
      !done) {
    return done;
  }
  std::vector<Handle> found;
  Done done = Nothing{};
  while (found.size() <= kObjectsMax) {
    std::array<Handle, 64> some{};
    Ulong count = 0;
    done =
        call("C_FindObjects", functions().find_objects, session, some.data(), some.size(), &count);
    if (!done || count == 0) break;
    if (count > some.size()) {
      done = Failure::of(Complaint::answer, "C_FindObjects overruns its list");
      break;
    }
    found.insert(found.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(count));
  }
  Done ended = call("C_FindObjectsFinal", functions().find_objects_final, session);
  if (!done) return done;
  if (!ended) return ended;
  if (found.size() > kObjectsMax) return too_many("objects", kObjectsMax);
  reply.u32(static_cast<std::uint32_t>(found.size()));
  for (const Handle handle : found) reply.u64(handle);
  return Nothing{};
}

Done Server::handle(GetAttributes& request, ReplyWriter& reply) {
  for (const std::uint64_t type : request.types) {
    if (Done done = get_attribute(request.object, type, reply); !done) return done;
  }
  return Nothing{};
}

// One at a time: with several, modules disagree about what a missing one does to the others.
Done Server::get_attribute(Handle object, std::uint64_t type, ReplyWriter& reply) {
  constexpr std::string_view name = "C_GetAttributeValue";
  const auto get = functions().get_attribute_value;
  const Handle session = session_.value_or(0);
  Attribute attribute{type, nullptr, 0};
  Done sized = call(name, get, session, object, &attribute, Ulong{1});
  if (!sized) {
    Failure failure = sized.take_failure();
    if (failure.rv != kAttributeTypeInvalid && failure.rv != kAttributeSensitive) return failure;
    reply.u8(0);
    return Nothing{};
  }
  if (attribute.bytes == kUnavailable) {
    reply.u8(0);
    return Nothing{};
  }
  if (attribute.bytes > kAttributeBytesMax)
    return too_many("bytes in an attribute", kAttributeBytesMax);
  reply.u8(1);
  const std::size_t room = attribute.bytes;
  const std::span<std::uint8_t> value = reply.reserve(room);
  if (room == 0 || reply.overflowed()) return Nothing{};
  attribute.value = value.data();
  if (Done done = call(name, get, session, object, &attribute, Ulong{1}); !done) return done;
  if (attribute.bytes == room) return Nothing{};
  return Failure::of(Complaint::answer, "an attribute changes its length between two calls");
}

Done Server::handle(Generate& request, ReplyWriter& reply) {
  Mechanism mechanism{request.mechanism, nullptr, 0};
  std::vector<Attribute> pub = keep(request.public_key);
  std::vector<Attribute> priv = keep(request.private_key);
  Handle public_key = 0;
  Handle private_key = 0;
  if (Done done =
          call("C_GenerateKeyPair", functions().generate_key_pair, session_.value_or(0), &mechanism,
               pub.data(), pub.size(), priv.data(), priv.size(), &public_key, &private_key);
      !done) {
    return done;
  }
  reply.u64(public_key);
  reply.u64(private_key);
  return Nothing{};
}

Done Server::handle(Decapsulate& request, ReplyWriter& reply) {
  Mechanism mechanism{request.mechanism, nullptr, 0};
  if (style_ == Style::decrypt) return decrypt(mechanism, request, reply);
  const std::span<std::uint8_t> ciphertext = keep(request.ciphertext);
  std::vector<Attribute> secret = keep(request.secret);
  const Handle session = session_.value_or(0);
  Handle made = 0;
  if (style_ == Style::derive) {
    mechanism.parameter = ciphertext.data();
    mechanism.parameter_bytes = ciphertext.size();
    if (Done done = call("C_DeriveKey", functions().derive_key, session, &mechanism, request.key,
                         secret.data(), secret.size(), &made);
        !done) {
      return done;
    }
  } else if (Done done = call("C_DecapsulateKey", functions().decapsulate_key, session, &mechanism,
                              request.key, secret.data(), secret.size(), ciphertext.data(),
                              ciphertext.size(), &made);
             !done) {
    return done;
  }
  Done taken = take_secret(made, request.mask, reply);
  Done destroyed = call("C_DestroyObject", functions().destroy_object, session, made);
  return taken ? std::move(destroyed) : std::move(taken);
}

// The length is asked for by offering room: size queries have more dialects than answers.
Done Server::take_secret(Handle object, Bytes mask, ReplyWriter& reply) {
  const std::span<std::uint8_t> value = keep(Bytes(std::array<std::uint8_t, kSecretBytesMax>{}));
  Attribute attribute{kAttributeValue, value.data(), value.size()};
  if (Done done = call("C_GetAttributeValue", functions().get_attribute_value, session_.value_or(0),
                       object, &attribute, Ulong{1});
      !done) {
    return done;
  }
  if (attribute.bytes > value.size()) {
    return Failure::of(Complaint::answer, "the shared secret is longer than any of ML-KEM");
  }
  reply_masked(reply, value.first(attribute.bytes), mask);
  return Nothing{};
}

Done Server::decrypt(Mechanism& mechanism, const Decapsulate& request, ReplyWriter& reply) {
  const Handle session = session_.value_or(0);
  const std::span<std::uint8_t> ciphertext = keep(request.ciphertext);
  const std::span<std::uint8_t> value = keep(Bytes(std::array<std::uint8_t, kSecretBytesMax>{}));
  if (Done done = call("C_DecryptInit", functions().decrypt_init, session, &mechanism, request.key);
      !done) {
    return done;
  }
  Ulong length = value.size();
  if (Done done = call("C_Decrypt", functions().decrypt, session, ciphertext.data(),
                       ciphertext.size(), value.data(), &length);
      !done) {
    return done;
  }
  if (length > value.size()) {
    return Failure::of(Complaint::answer, "the shared secret is longer than any of ML-KEM");
  }
  reply_masked(reply, value.first(length), request.mask);
  return Nothing{};
}

Done Server::handle(Create& request, ReplyWriter& reply) {
  std::vector<Attribute> object = keep(request.object);
  Handle made = 0;
  if (Done done = call("C_CreateObject", functions().create_object, session_.value_or(0),
                       object.data(), object.size(), &made);
      !done) {
    return done;
  }
  reply.u64(made);
  return Nothing{};
}

Done Server::handle(Destroy& request, ReplyWriter&) {
  return call("C_DestroyObject", functions().destroy_object, session_.value_or(0), request.object);
}

Done Server::handle(Close&, ReplyWriter&) {
  close();
  return Nothing{};
}

// Best effort: a token that was pulled out cannot be logged out of.
void Server::close() {
  closed_ = true;
  if (!module_) return;
  const Functions& f = functions();
  if (session_ && logged_in_ && f.logout != nullptr) (void)f.logout(*session_);
  if (session_ && f.close_session != nullptr) (void)f.close_session(*session_);
  if (f.finalize != nullptr) (void)f.finalize(nullptr);
  session_.reset();
  module_.reset();
}

std::span<std::uint8_t> Server::keep(Bytes value) {
  constexpr std::size_t align = alignof(std::max_align_t);
  const std::size_t at = (values_used_ + align - 1) / align * align;
  // A message is no longer than half of the buffer, and its values lose less than it to alignment.
  assert(at + value.size() <= values_.bytes().size());
  const std::span<std::uint8_t> copy = values_.bytes().subspan(at, value.size());
  std::copy(value.begin(), value.end(), copy.begin());
  values_used_ = at + value.size();
  return copy;
}

std::vector<Attribute> Server::keep(const Template& list) {
  std::vector<Attribute> attributes;
  for (const AttributeValue& attribute : list) {
    const std::span<std::uint8_t> value = keep(attribute.value);
    attributes.push_back({attribute.type, value.data(), value.size()});
  }
  return attributes;
}

}  // namespace pqblk::pkcs11
