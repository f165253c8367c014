#include "crypto/vectors.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace pqblk::test {

Bytes from_hex(const std::string& hex) {
  Bytes bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<std::uint8_t>(std::stoul(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

std::optional<nlohmann::json> load_vectors(const std::string& name) {
  const char* named = std::getenv("PQBLK_VECTORS");
  const std::filesystem::path dir =
      named != nullptr ? std::filesystem::path(named)
                       : std::filesystem::path(PQBLK_SOURCE_DIR) / ".." / "shared" / "vectors";
  std::ifstream file(dir / name);
  if (!file) {
    std::printf("SKIP: no %s in %s; set PQBLK_VECTORS to where the vectors are\n", name.c_str(),
                dir.lexically_normal().c_str());
    return std::nullopt;
  }
  return nlohmann::json::parse(file);
}

}  // namespace pqblk::test
