// The seeds of the fuzzers log_block and sealed_extension are real blocks and extensions. To write
// them anew after a change of the format:
//
//   PQBLK_WRITE_CORPUS=test/fuzz/corpus build/.../test_sealed -tc="seeds of the fuzzers"
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "sealed/log_scan.h"
#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

const char* corpus() { return std::getenv("PQBLK_WRITE_CORPUS"); }

void save(const std::string& fuzzer, const std::string& name, const sim::Pages& image,
          std::uint64_t at, std::size_t length) {
  std::vector<char> bytes(length);
  image.read(at, bytes.data(), length);
  while (length > 1 && bytes[length - 1] == 0 && fuzzer == "log_block") --length;
  const std::filesystem::path dir = std::filesystem::path(corpus()) / fuzzer;
  std::filesystem::create_directories(dir);
  std::ofstream(dir / name, std::ios::binary).write(bytes.data(), static_cast<long>(length));
}

std::vector<std::uint8_t> load(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void write_seeds(std::uint32_t bits) {
  const SealedShape shape{.sectors = 300,
                          .cluster_bits = bits,
                          .overlay_sectors_max = 1 << 20,
                          .session_sectors_max = 1 << 20};
  Lab lab(shape);
  REQUIRE(!lab.create());
  REQUIRE(!lab.open());
  REQUIRE(!lab.write(0, 1, 8));
  REQUIRE(!lab.write(1, 2, 2));
  REQUIRE(!lab.zero(3, 2));
  const sim::Pages& image = lab.image().cache();
  const Places at = places_of(image);
  const std::string name = "clusters" + std::to_string(bits);
  save("sealed_extension", name, image, sealed::kExtensionAt, sizeof(sealed::ExtensionRaw));
  for (std::uint64_t page = 0; page < 8; ++page) {
    const std::uint64_t from =
        at.extension.log_offset + sealed::kLogHeadBytes + page * sealed::kPage;
    if ((load64(image, from) >> 32) != 0x50514c42) continue;  // "PQLB"
    save("log_block", name + "-" + std::to_string(page), image, from, sealed::kPage);
  }
}

}  // namespace

TEST_CASE("seeds of the fuzzers are what they seem") {
  const std::filesystem::path root =
      corpus() != nullptr ? corpus() : PQBLK_SOURCE_DIR "/test/fuzz/corpus";
  std::size_t blocks = 0;
  for (const std::uint32_t bits : {12u, 16u, 21u}) {
    if (corpus() != nullptr) write_seeds(bits);
    const std::string name = "clusters" + std::to_string(bits);
    const auto extension = load(root / "sealed_extension" / name);
    CHECK(sealed::parse_extension(extension, std::uint64_t{1} << bits));
    for (const auto& file : std::filesystem::directory_iterator(root / "log_block")) {
      if (!file.path().filename().string().starts_with(name + "-")) continue;
      auto bytes = load(file.path());
      bytes.resize(sealed::kPage);
      const sealed::SealedGeometry g{bits, 300 * kSectorSize};
      CHECK(sealed::parse_block(bytes, 62, g));
      ++blocks;
    }
  }
  CHECK(blocks >= 9);
}
