// The vector files of other projects (Wycheproof), where they exist. Test support for room crypto/.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace pqblk::test {

using Bytes = std::vector<std::uint8_t>;

Bytes from_hex(const std::string& hex);

// The file `name` from $PQBLK_VECTORS or from shared/vectors beside the checkout. Without it prints
// `SKIP: ...`, which the test runner counts and shows, and returns nothing.
std::optional<nlohmann::json> load_vectors(const std::string& name);

}  // namespace pqblk::test
