#!/usr/bin/env bash
# Collect wheels for a GPU machine without a network: benchmarks/gpu/pack.sh [DIRECTORY [3.12]]
# The newest Megatron-core and Liger, and what stores, dumps and the tests need, in the tested
# versions; those that fit in 50 MB, for Linux on x86-64 and the Python given.
# There: python3 -m pip install --no-index --no-deps DIRECTORY/*.whl
set -euo pipefail
out=${1:-outputs/gpu/wheels}
python=${2:-3.12}
here=$(cd "$(dirname "$0")" && pwd)
limit=$((50 * 1000 * 1000))
newest="megatron-core liger-kernel"
tested="msgspec rich markdown-it-py mdurl pyyaml omegaconf hypothesis sortedcontainers
  transformers tokenizers safetensors huggingface-hub regex tqdm requests urllib3 idna certifi
  charset-normalizer"
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
mkdir -p "$out"

keep() {
  if [ $(($(du -sb "$out" | cut -f1) + $(du -sb "$new" | cut -f1))) -le "$limit" ]; then
    mv "$new"/*.whl "$out"
  else
    echo "$1 is left out: more than 50 MB" >&2
    rm "$new"/*
  fi
}

fetch() {  # PACKAGE [OPTION...]
  if python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$python" \
      --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
      --dest "$new" "$@"; then
    keep "$1"
  else
    echo "$1 is left out: no wheel for Python $python" >&2
  fi
}

for package in $newest; do fetch "$package"; done
for package in $tested; do fetch "$package" -c "$here/../../constraints.txt"; done
# Omegaconf's parser has no wheel; it is Python for any version.
python3 -m pip wheel --quiet --no-deps --wheel-dir "$new" -c "$here/../../constraints.txt" \
  antlr4-python3-runtime && keep antlr4-python3-runtime
du -sh "$out"
