#!/usr/bin/env bash
# Collect wheels for a GPU machine without a network: benchmarks/gpu/pack.sh [DIRECTORY [3.12]]
# Megatron-core first, then what stores and dumps need, Liger if it fits in 50 MB; for Linux on
# x86-64 and the Python given.
# There: python3 -m pip install --no-index --no-deps DIRECTORY/*.whl
set -euo pipefail
out=${1:-outputs/gpu/wheels}
python=${2:-3.12}
limit=$((50 * 1000 * 1000))
mkdir -p "$out"
for package in megatron-core msgspec rich pygments markdown-it-py mdurl packaging liger-kernel; do
  new=$(mktemp -d)
  if python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$python" \
      --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$new" "$package"; then
    if [ $(($(du -sb "$out" | cut -f1) + $(du -sb "$new" | cut -f1))) -le "$limit" ]; then
      mv "$new"/*.whl "$out"
    else
      echo "$package is left out: more than 50 MB" >&2
    fi
  else
    echo "$package is left out: no wheel for Python $python" >&2
  fi
  rm -rf "$new"
done
du -sh "$out"
