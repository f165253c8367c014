#include "state.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

namespace test_token {
namespace {

std::string directory() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&directory), &info) == 0) return ".";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/'));
}

std::string hex(const Bytes& bytes) {
  static constexpr char digits[] = "0123456789abcdef";
  std::string text = "x";  // so that nothing is a word, too
  for (const std::uint8_t byte : bytes) {
    text += digits[byte >> 4];
    text += digits[byte & 15];
  }
  return text;
}

Bytes unhex(const std::string& text) {
  Bytes bytes;
  for (std::size_t at = 1; at + 1 < text.size(); at += 2) {
    bytes.push_back(static_cast<std::uint8_t>(std::stoi(text.substr(at, 2), nullptr, 16)));
  }
  return bytes;
}

}  // namespace

State State::read() {
  State state;
  std::ifstream file(directory() + "/state");
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string what;
    words >> what;
    if (what == "pin") {
      std::string pin;
      words >> pin >> state.tries_left;
      state.pin = unhex(pin);
    } else if (what == "key") {
      Key key{};
      std::string label, id, dk, ek;
      words >> key.kem >> label >> id >> dk >> ek >> key.extractable;
      key.label = unhex(label);
      key.id = unhex(id);
      key.dk = unhex(dk);
      key.ek = unhex(ek);
      state.keys.push_back(key);
    }
  }
  return state;
}

void State::write() const {
  std::ofstream file(directory() + "/state", std::ios::trunc);
  if (pin) file << "pin " << hex(*pin) << ' ' << tries_left << '\n';
  for (const Key& key : keys) {
    file << "key " << key.kem << ' ' << hex(key.label) << ' ' << hex(key.id) << ' ' << hex(key.dk)
         << ' ' << hex(key.ek) << ' ' << key.extractable << '\n';
  }
}

std::string mode() {
  std::ifstream file(directory() + "/mode");
  std::string word;
  file >> word;
  return word;
}

void tell_environment() {
  std::ofstream file(directory() + "/environment", std::ios::trunc);
  for (char** variable = environ; *variable != nullptr; ++variable) file << *variable << '\n';
}

// As a module does that starts a daemon: a session of its own, and every descriptor that it inherited.
void fork_and_stay() {
  const pid_t child = ::fork();
  if (child == 0) {
    ::setsid();
    for (;;) ::pause();
  }
  std::ofstream(directory() + "/forked") << child << '\n';
}

void tell_end() { std::ofstream(directory() + "/ended") << "in order\n"; }

}  // namespace test_token
