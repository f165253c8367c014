#!/bin/sh
# Makes the seeds of the qcow2 fuzzers: tiny images of every kind that the engine reads, from
# qemu-img and a repeatable content. Run it in test/fuzz after a change of the format's coverage.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p corpus/qcow2_open corpus/qcow2_header
# 24 KiB: text that compresses, zeros, and text again.
{ seq 1 2200 | head -c 8192; head -c 8192 /dev/zero; seq 5000 7000 | head -c 8192; } > "$work/raw"
make() {
  name=$1
  shift
  qemu-img convert -q -f raw -O qcow2 "$@" "$work/raw" "$work/$name"
}
make plain -o cluster_size=512
make narrow -o cluster_size=512,refcount_bits=1
make wide -o cluster_size=512,refcount_bits=64
make old -o cluster_size=512,compat=0.10
make zlib -c -o cluster_size=4096
make zstd -c -o cluster_size=4096,compression_type=zstd
make extended -o cluster_size=16k,extended_l2=on
make snapshot -o cluster_size=512
qemu-img snapshot -q -c one "$work/snapshot"
make bitmap -o cluster_size=4096
qemu-img bitmap --add "$work/bitmap" b0
qemu-img create -q -f qcow2 -u -b base.raw -F raw -o cluster_size=512 "$work/overlay" 64k
qemu-img create -q -f qcow2 -o cluster_size=512,lazy_refcounts=on "$work/lazy" 64k
for image in plain narrow wide old zlib zstd extended snapshot bitmap overlay lazy; do
  cp "$work/$image" "corpus/qcow2_open/$image"
  head -c 512 "$work/$image" > "corpus/qcow2_header/$image"
done
