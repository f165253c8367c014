// Answers requests with the help of one module: its tokens, one session, its objects.
//
// Room pkcs11/. A thin hand that calls PKCS#11 functions and checks what comes back for size; what
// to call, with which numbers and templates, is decided at the other end of the wire. Nothing is
// retried, least of all a PIN.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "pkcs11/locked_buffer.h"
#include "pkcs11/module.h"
#include "pkcs11/protocol.h"

namespace pqblk::pkcs11 {

class Server {
 public:
  // `values` is scratch memory for what goes into templates, `kMessageBytesMax` bytes or more.
  explicit Server(LockedBuffer values) : values_(std::move(values)) {}
  Server(LockedBuffer values, Module module, Style style)
      : values_(std::move(values)), module_(module), style_(style) {}
  ~Server() { close(); }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // The reply to one request, in `out`. It may hold a secret: the caller wipes it.
  std::span<const std::uint8_t> answer(Bytes request, std::span<std::uint8_t> out);

  bool closed() const { return closed_; }  // after Close: there is nothing more to ask

 private:
  Done handle(Load& request, ReplyWriter& reply);
  Done handle(DescribeSlot& request, ReplyWriter& reply);
  Done handle(DescribeMechanism& request, ReplyWriter& reply);
  Done handle(Open& request, ReplyWriter& reply);
  Done handle(Login& request, ReplyWriter& reply);
  Done handle(InitPin& request, ReplyWriter& reply);
  Done handle(Find& request, ReplyWriter& reply);
  Done handle(GetAttributes& request, ReplyWriter& reply);
  Done handle(Generate& request, ReplyWriter& reply);
  Done handle(Decapsulate& request, ReplyWriter& reply);
  Done handle(Create& request, ReplyWriter& reply);
  Done handle(Destroy& request, ReplyWriter& reply);
  Done handle(Close& request, ReplyWriter& reply);

  Done describe(ReplyWriter& reply);
  Done get_attribute(Handle object, std::uint64_t type, ReplyWriter& reply);
  Done decrypt(Mechanism& mechanism, const Decapsulate& request, ReplyWriter& reply);
  Done take_secret(Handle object, Bytes mask, ReplyWriter& reply);
  void close();

  const Functions& functions() const { return module_->functions(); }
  // Aligned copies for the module, valid until the next request.
  std::span<std::uint8_t> keep(Bytes value);
  std::vector<Attribute> keep(const Template& list);

  LockedBuffer values_;
  std::size_t values_used_ = 0;
  std::optional<Module> module_;
  Style style_ = Style::encapsulate;
  std::optional<Handle> session_;
  bool logged_in_ = false;
  bool closed_ = false;
};

}  // namespace pqblk::pkcs11
