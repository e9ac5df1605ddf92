#!/usr/bin/env bash
# Fetches, where there is a network, the packages that benchmarks/gpu.sh installs where there is none: about 8 MB.
#
#   benchmarks/wheels.sh FOLDER
#
#   PYTHON   an interpreter with pip and wheel (default: python3); the packages are for Python 3.12 whatever its own is
#
# DeepSpeed is published as source and built here without its compiled operators; torch has to be there, any version.
set -euo pipefail

(($# == 1)) || { echo "usage: benchmarks/wheels.sh FOLDER" >&2 && exit 2; }
python="${PYTHON:-python3}"
platforms=()
for version in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${version}_x86_64")
done
"$python" -m pip download -q -d "$1" --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" megatron-core==0.16.1 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection hjson \
  ruamel.yaml==0.19.1 backports.zstd==1.8.0
DS_BUILD_OPS=0 "$python" -m pip wheel -q -w "$1" --no-deps --no-build-isolation deepspeed==0.19.8
du -sh "$1"
