#!/usr/bin/env bash
# All tests and benchmarks that need a GPU, in one call of at most nine minutes, on a machine that need have no network.
#
#   benchmarks/gpu.sh WHEELS OUTPUT         WHEELS: a folder of wheels; an empty one if everything is installed
#   benchmarks/gpu.sh --cpu WHEELS OUTPUT   everything with --quick on the CPU, to try this script out
#
#   PYTHON   the interpreter to use (default: python3)
#
# It leaves in OUTPUT, whatever fails: summary.txt (begin there), tests.txt, logs.txt, results.json, results.md,
# moe_layer.png, step.png. The exit status is 0 if all parts succeeded, 1 if one failed or was cut off, 2 if there is no
# GPU, the call is wrong or the package cannot be imported.
#
# The machine is expected to have Python 3.12 with torch 2.11 for CUDA 13, and beside it numpy, matplotlib, tensorboard,
# sentencepiece, safetensors, mpi4py, pyyaml, rich, tqdm, pytest, pytest-timeout, and einops, msgpack, ninja, psutil and
# py-cpuinfo for DeepSpeed. The rest comes as wheels, fetched where there is a network (8 MB; DeepSpeed is published as
# source and built without its compiled operators):
#
#   python3 -m pip download -d WHEELS --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
#     --platform manylinux2014_x86_64 megatron-core==0.16.1 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types \
#     typing-inspection hjson
#   DS_BUILD_OPS=0 python3 -m pip wheel -w WHEELS --no-deps deepspeed==0.19.8
set -uo pipefail

TOTAL=515 # seconds for all that is measured
NEEDED=(torch deepspeed megatron.core pydantic sentencepiece safetensors matplotlib tensorboard pytest pytest_timeout)
PYTHON="${PYTHON:-python3}"

main() {
  cpu=
  [[ "${1-}" != --cpu ]] || { cpu=1 && shift; }
  (($# == 2)) && [[ -d "$1" ]] || stop "usage: benchmarks/gpu.sh [--cpu] WHEELS OUTPUT, and WHEELS has to be a folder"
  mkdir -p "$2" || stop "cannot write to $2"
  local wheels output
  wheels="$(realpath "$1")" output="$(realpath "$2")"
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/logs" "$work/results"
  prepare "$wheels"

  # By worth: if time runs out, it is the last ones that are cut.
  failed=0 quick=()
  [[ -z "$cpu" ]] || quick=(--quick --rounds 1)
  part tests 210 -m pytest tests/gpu tests/ops -p no:cacheprovider --timeout 120 --durations 5 -rfE
  part moe_layer 130 -m benchmarks.moe_layer --output "$work/results/moe_layer.json" "${quick[@]}"
  part step 150 -m benchmarks.step --output "$work/results/step.json" "${quick[@]}"
  part generation 60 -m benchmarks.generation --output "$work/results/generation.json" "${quick[@]}"
  part checkpoint 60 -m benchmarks.checkpoint --output "$work/results/checkpoint.json" "${quick[@]}"
  TOTAL=535
  part pictures 20 -m benchmarks.pictures "$work/results"
  collect "$output"
  cat "$output/summary.txt"
  exit "$failed"
}

# Wheels on the path, libraries that can be imported, a GPU.
prepare() {
  local found=("$1"/*.whl)
  if [[ -e "${found[0]}" ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "${found[@]}" >&2 ||
      stop "the wheels in $1 cannot be installed into $("$PYTHON" --version)"
  fi
  export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLCONFIGDIR="$work" MPLBACKEND=Agg
  export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton" TMPDIR="$work"
  if [[ -n "$cpu" ]]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
  else
    export DS_ACCELERATOR=cuda
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
      stop "torch sees no GPU here; with --cpu as the first argument everything runs on the CPU"
  fi
  local name missing=()
  for name in "${NEEDED[@]}"; do
    "$PYTHON" -W ignore -c "import $name" >/dev/null 2>&1 || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || stop "cannot be imported, so a wheel is missing: ${missing[*]}; $(why "${missing[0]}")"
  "$PYTHON" -W ignore -c 'import stablemoe_ds.training.trainer' >/dev/null 2>&1 ||
    stop "the package cannot be imported: $(why stablemoe_ds.training.trainer)"
}

# The last line of what Python says when it is to import this.
why() {
  "$PYTHON" -W ignore -c "import $1" 2>&1 | tail -n 1
}

# part NAME SECONDS ARGUMENTS...: run Python with these, as long as it may and there is time; one line for the summary.
part() {
  local name="$1" limit="$2" began=$SECONDS status=0 what
  shift 2
  ((limit <= TOTAL - SECONDS)) || limit=$((TOTAL - SECONDS))
  if ((limit < 10)); then
    what="left out: no time" status=1
  else
    echo "$name: at most $limit s" >&2
    timeout --kill-after=5 "$limit" "$PYTHON" -W ignore "$@" >"$work/logs/$name.txt" 2>&1 || status=$?
    case $status in
      0) what=ok ;;
      124 | 137) what="CUT OFF after $limit s" ;;
      *) what="FAILED with status $status" ;;
    esac
  fi
  ((status == 0)) || failed=1
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - began)) "$what" >>"$work/parts.txt"
}

# Few files, whatever there is.
collect() {
  local file
  mv "$work/logs/tests.txt" "$1/tests.txt"
  cp "$work"/results/*.png "$1/" 2>/dev/null
  (cd "$work/logs" && tail -n +1 -- *.txt) >"$1/logs.txt"
  for file in "$work"/results/*.md; do
    [[ ! -e "$file" ]] || { cat "$file" && echo; }
  done >"$1/results.md"
  "$PYTHON" - "$work/results" >"$1/results.json" <<'END'
import json, pathlib, sys
files = sorted(pathlib.Path(sys.argv[1]).glob("*.json"))
print(json.dumps({file.stem: json.loads(file.read_text()) for file in files}, indent=1))
END
  {
    "$PYTHON" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)'
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"
    echo
    cat "$work/parts.txt"
    echo
    grep -E '^(FAILED|ERROR)|(passed|failed|skipped|error).* in [0-9.]+s' "$1/tests.txt"
  } >"$1/summary.txt"
}

stop() {
  echo "gpu.sh: $1" >&2
  exit 2
}

main "$@"
