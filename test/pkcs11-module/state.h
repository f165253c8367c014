// What the token of the tests keeps: PIN, tries, keys, and the way it shall misbehave.
//
// Text files in the directory that the module was loaded from, so that each test has a token of
// its own by copying the module: `state`, written by the module, and `mode`, one word, written by
// the test at any time.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ml_kem.h"

namespace test_token {

struct Key {
  unsigned long kem;  // 768 or 1024
  Bytes label;
  Bytes id;
  Bytes dk;
  Bytes ek;
  bool extractable;
};

struct State {
  std::optional<Bytes> pin;
  int tries_left = 3;
  std::vector<Key> keys;

  static State read();
  void write() const;
};

std::string mode();

void tell_environment();  // to the file `environment`
void fork_and_stay();
void tell_end();          // to the file `ended`

}  // namespace test_token
