// A sealed disk in a real file, opened as a program opens it; under the keys of the tests.
//
// Room test/sealed.
#pragma once

#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <utility>

#include "image/disk.h"
#include "image/disk_create.h"
#include "sealed/sealed_subject.h"

namespace pqblk::test {

// Of a new disk; replaces a file that is there.
inline image::CreateSpec sealed_file_spec(const std::string& path, std::uint64_t size,
                                          std::uint64_t log_bytes) {
  image::CreateSpec spec;
  spec.path = path;
  spec.size = size;
  spec.overwrite = true;
  spec.uuid = test_uuid();
  spec.log_bytes = log_bytes;
  spec.key_area.resize(sealed::kKeyAreaBytes);
  spec.keys = test_keys();
  return spec;
}

inline void make_sealed_file(const image::CreateSpec& spec) {
  const Error e = image::create_disk(spec);
  REQUIRE_MESSAGE(!e, e.to_string());
}

inline image::OpenOptions sealed_file_options(const std::string& path, bool non_volatile) {
  image::OpenOptions options;
  options.path = path;
  options.format = image::Format::sealed;
  options.keys = test_keys();
  options.expected_uuid = test_uuid();
  options.assume_non_volatile = non_volatile;
  return options;
}

inline std::unique_ptr<image::Disk> open_sealed_file(image::OpenOptions options) {
  auto disk = image::Disk::open(std::move(options));
  REQUIRE_MESSAGE(disk, disk.error().to_string());
  return std::move(*disk);
}

}  // namespace pqblk::test
