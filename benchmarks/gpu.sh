#!/usr/bin/env bash
# All tests and benchmarks that need a GPU, in two calls, on a machine that need have no network.
#
#   benchmarks/gpu.sh correct WHEELS OUTPUT       at most four minutes: the tests, who waits for the GPU first
#   benchmarks/gpu.sh fast WHEELS OUTPUT [DATA]   at most six: layer, step, generation, routers on the text in DATA
#   benchmarks/gpu.sh --cpu correct ...           the same with --quick on the CPU, ten times as patient, to try it out
#
#   WHEELS   a folder that benchmarks/wheels.sh has filled; an empty one if everything is installed
#   DATA     a folder that benchmarks.carry has filled; without it the routers read Python's standard library
#   PYTHON   the interpreter to use (default: python3)
#
# The most precious comes first, and every part writes down what it knows as it goes: a call that is cut off leaves
# something. In OUTPUT, whatever fails: summary.txt (begin there), logs.txt, results.json, results.md, profile.txt, PNGs.
# The exit status is 0 if all parts succeeded, 1 if one failed or was cut off, 2 if there is no GPU, the call is wrong or
# the package cannot be imported.
#
# The machine is expected to have Python 3.12 with torch 2.11 for CUDA 13, and with it numpy, matplotlib, tensorboard,
# sentencepiece, tokenizers, safetensors, scipy, jinja2, mpi4py, pyyaml, rich, tqdm, pytest, pytest-timeout, and einops,
# msgpack, ninja, psutil and py-cpuinfo for DeepSpeed.
set -uo pipefail

USAGE="usage: benchmarks/gpu.sh [--cpu] correct|fast WHEELS OUTPUT [DATA], and WHEELS has to be a folder"
NEEDED=(torch deepspeed megatron.core pydantic ruamel.yaml sentencepiece tokenizers scipy safetensors matplotlib)
NEEDED+=(tensorboard pytest pytest_timeout)
PYTHON="${PYTHON:-python3}"

main() {
  cpu=
  [[ "${1-}" != --cpu ]] || { cpu=1 && shift; }
  (($# == 3 || $# == 4)) && [[ "$1" == correct || "$1" == fast ]] && [[ -d "$2" ]] || stop "$USAGE"
  mkdir -p "$3" || stop "cannot write to $3"
  local call="$1" wheels output data=()
  wheels="$(realpath "$2")" output="$(realpath "$3")"
  [[ -z "${4-}" ]] || data=(--data "$(realpath "$4")")
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
  work="$(mktemp -d)"
  trap 'collect "$output"; rm -rf "$work"' EXIT
  mkdir "$work/logs" "$work/results"
  prepare "$wheels"
  failed=0 quick=() patience=1
  [[ -z "$cpu" ]] || { quick=(--quick --rounds 1) && patience=10; }
  if [[ "$call" == correct ]]; then correct; else fast; fi
  cat "$work/parts.txt"
  exit "$failed"
}

# Tests. Those of the first part are the ones that a GPU alone can answer.
correct() {
  TOTAL=$((225 * patience))
  tests sync 50 tests/gpu/test_sync.py
  tests model 75 tests/gpu/test_gradients.py tests/gpu/test_layer.py tests/gpu/test_model.py
  tests run 75 tests/gpu/test_run.py
  tests kernels 60 tests/ops
}

# Figures; the comparison of routers has the time that is left.
fast() {
  TOTAL=$((350 * patience))
  part moe_layer 80 -m benchmarks.moe_layer --output "$work/results/moe_layer.json" "${quick[@]}"
  part step 110 -m benchmarks.step --output "$work/results/step.json" --profile "$work/results/profile.txt" "${quick[@]}"
  part generation 30 -m benchmarks.generation --output "$work/results/generation.json" "${quick[@]}"
  part routers 330 -m benchmarks.routers --output "$work/results/routers.json" --seconds $((75 * patience)) "${data[@]}" "${quick[@]}"
  TOTAL=$((358 * patience))
  part pictures 20 -m benchmarks.pictures "$work/results"
}

# tests NAME SECONDS FILES...: they end by themselves before they are killed, so that they say what they know.
tests() {
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" -m pytest "$@" -v --tb=short -rfE -p no:cacheprovider --durations 5 \
    --timeout $((45 * patience)) --session-timeout $((limit * patience - 10))
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
  local name="$1" limit=$(($2 * patience)) began=$SECONDS status=0 what
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
# shellcheck disable=SC2329 # the trap calls it
collect() {
  local file
  [[ -e "$work/parts.txt" ]] || return
  cp "$work"/results/*.png "$work"/results/profile.txt "$1/" 2>/dev/null
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
    grep -hE '^(FAILED|ERROR)|(passed|failed|skipped|error).* in [0-9.]+s' "$work"/logs/*.txt
  } >"$1/summary.txt"
}

stop() {
  echo "gpu.sh: $1" >&2
  exit 2
}

main "$@"
