// Interop with qemu-img, both ways: it makes images that we read and write, and checks and reads
// what we wrote. The oracle is a flat model of the guest's bytes, and qemu-img.

#include <doctest/doctest.h>

#include <cstring>

#include "effort.h"
#include "image/qcow2_lab.h"

namespace pqblk::image::test {
namespace {

struct Shape {
  const char* name;
  const char* options;  // for qemu-img -o
  std::uint64_t size;
  bool compressed = false;
};

// Sizes are no multiples of the cluster: the last cluster is partial.
const Shape kShapes[] = {
    {"512", "cluster_size=512", 1 * kMiB + 512 * 3},
    {"512, 1 bit", "cluster_size=512,refcount_bits=1", 1 * kMiB},
    {"512, 64 bits", "cluster_size=512,refcount_bits=64", 1 * kMiB + 512 * 5},
    {"4K, 2 bits", "cluster_size=4096,refcount_bits=2", 4 * kMiB + 512 * 3},
    {"64K", "", 12 * kMiB + 512 * 3},
    {"64K, 8 bits", "refcount_bits=8", 12 * kMiB + 4096},
    {"64K, version 2", "compat=0.10", 12 * kMiB + 512},
    {"4K, version 2", "compat=0.10,cluster_size=4096", 4 * kMiB},
    {"2M", "cluster_size=2M", 24 * kMiB + 512 * 7},
    {"64K, zlib", "", 12 * kMiB + 512, true},
    {"64K, zstd", "compression_type=zstd", 12 * kMiB + 512, true},
    {"4K, zlib, version 2", "compat=0.10,cluster_size=4096", 4 * kMiB, true},
    {"512, zlib", "cluster_size=512", 1 * kMiB, true},
    {"2M, zstd", "cluster_size=2M,compression_type=zstd", 24 * kMiB, true},
    {"64K, extended", "extended_l2=on", 12 * kMiB + 512 * 3},
    {"16K, extended", "extended_l2=on,cluster_size=16k", 6 * kMiB + 512},
    {"128K, extended, zstd", "extended_l2=on,cluster_size=128k,compression_type=zstd", 12 * kMiB,
     true},
};

std::string with(const Shape& shape, const std::string& more = {}) {
  std::string options = shape.options;
  if (!more.empty()) options += (options.empty() ? "" : ",") + more;
  return options.empty() ? "" : "-o " + options + " ";
}

// A qcow2 image with mixed content, made by qemu-img.
Bytes make_image(Lab& lab, const Shape& shape, Random& random) {
  Bytes model = mixed_content(random, shape.size);
  lab.save("source.raw", model);
  lab.qemu_img("convert -f raw -O qcow2 " + std::string(shape.compressed ? "-c " : "") +
               with(shape) + "source.raw disk.qcow2");
  return model;
}

void expect_disk(Lab& lab, const Bytes& model) {
  const std::string what = difference(lab.read(0, model.size()), model);
  CHECK_MESSAGE(what.empty(), what);
}

void expect_file(Lab& lab, const std::string& name, const Bytes& model) {
  const std::string complaint = lab.qemu_check(name);
  CHECK_MESSAGE(complaint.empty(), complaint);
  const std::string what = difference(lab.qemu_read(name), model);
  CHECK_MESSAGE(what.empty(), "as qemu-img reads it: " << what);
}

// A sanitizer sees every path in a part of the shapes.
template <class Body>
void each_shape(Body body) {
  const std::size_t step = pqblk::test::effort(std::size(kShapes)) < std::size(kShapes) ? 4 : 1;
  for (std::size_t i = 0; i < std::size(kShapes); i += step) {
    CAPTURE(kShapes[i].name);
    body(kShapes[i]);
  }
}

void expect_ok(const Error& error) { REQUIRE_MESSAGE(error.ok(), error.to_string()); }

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("qcow2: what qemu-img made reads the same, and survives our writes") {
  each_shape([](const Shape& shape) {
    Random random(11);
    Lab lab;
    Bytes model = make_image(lab, shape, random);
    expect_ok(lab.open("disk.qcow2"));
    REQUIRE(lab.size() == model.size());
    expect_disk(lab, model);
    exercise(lab, model, random);
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
    expect_ok(lab.open("disk.qcow2"));
    expect_disk(lab, model);
    exercise(lab, model, random, {.rounds = 10});
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
  });
}

TEST_CASE("qcow2: internal snapshots keep their content under our writes") {
  each_shape([](const Shape& shape) {
    if (std::strstr(shape.options, "refcount_bits=1") != nullptr &&
        std::strstr(shape.options, "refcount_bits=16") == nullptr) {
      return;  // a count of two does not fit one bit
    }
    Random random(12);
    Lab lab;
    Bytes model = make_image(lab, shape, random);
    const Bytes first = model;
    lab.qemu_img("snapshot -c first disk.qcow2");
    expect_ok(lab.open("disk.qcow2"));
    exercise(lab, model, random, {.rounds = 12});
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
    const Bytes second = model;
    lab.qemu_img("snapshot -c second disk.qcow2");
    expect_ok(lab.open("disk.qcow2"));
    exercise(lab, model, random, {.rounds = 12});
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
    CHECK(difference(lab.qemu_read("disk.qcow2", "first"), first) == "");
    CHECK(difference(lab.qemu_read("disk.qcow2", "second"), second) == "");
    // And qemu can drop one and go on.
    lab.qemu_img("snapshot -d first disk.qcow2");
    CHECK(lab.qemu_check("disk.qcow2") == "");
    expect_ok(lab.open("disk.qcow2"));
    exercise(lab, model, random, {.rounds = 6});
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
    CHECK(difference(lab.qemu_read("disk.qcow2", "second"), second) == "");
  });
}

TEST_CASE("qcow2: overlays over a chain of backing files") {
  each_shape([](const Shape& shape) {
    if (shape.compressed) return;
    Random random(13);
    Lab lab;
    // A raw base shorter than the disk and of odd size, a qcow2 in the middle, the overlay on top.
    Bytes base = mixed_content(random, shape.size / 2 + 700);
    lab.save("base.raw", base);
    lab.qemu_img("create -f qcow2 -b base.raw -F raw " + with(shape) + "middle.qcow2 " +
                 std::to_string(shape.size));
    Bytes model(shape.size);
    std::memcpy(model.data(), base.data(), base.size());
    expect_ok(lab.open("middle.qcow2"));
    expect_disk(lab, model);
    exercise(lab, model, random, {.rounds = 10});
    expect_ok(lab.close());
    expect_file(lab, "middle.qcow2", model);
    const Bytes middle = model;
    lab.qemu_img("create -f qcow2 -b middle.qcow2 -F qcow2 " + with(shape) + "top.qcow2");
    expect_ok(lab.open("top.qcow2"));
    expect_disk(lab, model);
    exercise(lab, model, random, {.rounds = 20});
    expect_ok(lab.close());
    expect_file(lab, "top.qcow2", model);
    CHECK(difference(lab.qemu_read("middle.qcow2"), middle) == "");
    CHECK(lab.load("base.raw") == base);
  });
}

TEST_SUITE_END();

}  // namespace pqblk::image::test
