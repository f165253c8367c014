#include "sim/io_stage.h"

#include <cstdio>

#include "sim/world.h"

namespace pqblk::sim {
namespace {

class SimStage final : public io::test::Stage {
 public:
  SimStage() : choices_(1), world_(choices_, options()) { world_.add_queue(); }

  io::Queue& queue() override { return world_.queue(0); }

  io::File& make_file(std::uint64_t size, bool direct) override {
    Device device;
    device.set_size(size);
    return world_.add_file("simulated", std::move(device), {.direct = direct});
  }

  Error run(const std::function<Task<Error>()>& body) override {
    Error hung(Kind::canceled, "the simulated world has nothing left to do");
    Error error = world_.run(body(), std::move(hung));
    if (!world_.violation().empty()) return Error(Kind::corrupt, world_.violation());
    return error;
  }

  io::test::Bytes peek(const io::File& file, std::uint64_t offset, std::size_t size) override {
    io::test::Bytes bytes(size);
    world_.device(file).cache().read(offset, bytes.data(), size);
    return bytes;
  }

  void poke(io::File& file, std::uint64_t offset, std::span<const std::uint8_t> data) override {
    world_.device(file).overwrite(offset, data.data(), data.size());
  }

  std::uint64_t size_of(const io::File& file) override { return world_.device(file).size(); }

 private:
  static WorldOptions options() {
    return {.steps_max = ~std::uint64_t{0}, .faults = {.short_transfer = 3, .interrupted = 10}};
  }
  RandomChoices choices_;
  World world_;
};

}  // namespace

io::test::StageType simulator_stage() {
  return {"simulator", false, [](std::uint32_t) { return std::make_unique<SimStage>(); }};
}

}  // namespace pqblk::sim
