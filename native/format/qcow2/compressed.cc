#include "format/qcow2/compressed.h"

#include <zlib.h>
#include <zstd.h>

#include <memory>

namespace pqblk::format::qcow2 {
namespace {

// QEMU writes raw deflate with a window of 4 KiB; a larger window reads that as well.
constexpr int kRawDeflateWindow = -15;

Error damaged(const char* what) {
  return Error(Kind::corrupt, std::string("compressed cluster: ") + what);
}

Error inflate_cluster(std::span<const std::uint8_t> stored, std::span<std::uint8_t> cluster) {
  z_stream stream{};
  if (inflateInit2(&stream, kRawDeflateWindow) != Z_OK) {
    return Error(Kind::no_memory, "zlib could not start");
  }
  stream.next_in = const_cast<Bytef*>(stored.data());  // zlib's pointer is not const; it only reads
  stream.avail_in = static_cast<uInt>(stored.size());
  stream.next_out = cluster.data();
  stream.avail_out = static_cast<uInt>(cluster.size());
  const int status = inflate(&stream, Z_FINISH);
  const bool whole = stream.avail_out == 0;
  inflateEnd(&stream);
  // Z_BUF_ERROR with a full output: the stream's end mark lies beyond, which does not matter.
  if (!whole || (status != Z_STREAM_END && status != Z_BUF_ERROR)) return damaged("deflate data");
  return Error();
}

Error unzstd_cluster(std::span<const std::uint8_t> stored, std::span<std::uint8_t> cluster) {
  std::unique_ptr<ZSTD_DStream, decltype(&ZSTD_freeDStream)> stream(ZSTD_createDStream(),
                                                                    &ZSTD_freeDStream);
  if (!stream) return Error(Kind::no_memory, "zstd could not start");
  ZSTD_inBuffer in{stored.data(), stored.size(), 0};
  ZSTD_outBuffer out{cluster.data(), cluster.size(), 0};
  // A cluster may be several frames, and the stored bytes are longer than the data.
  while (out.pos < out.size) {
    const std::size_t in_before = in.pos;
    const std::size_t out_before = out.pos;
    const std::size_t status = ZSTD_decompressStream(stream.get(), &out, &in);
    if (ZSTD_isError(status) != 0) return damaged("zstd data");
    if (in.pos == in_before && out.pos == out_before) return damaged("zstd data ends early");
  }
  return Error();
}

}  // namespace

Error decompress(Compression type, std::span<const std::uint8_t> stored,
                 std::span<std::uint8_t> cluster) {
  return type == Compression::zlib ? inflate_cluster(stored, cluster)
                                   : unzstd_cluster(stored, cluster);
}

}  // namespace pqblk::format::qcow2
