#!/usr/bin/env bash
# Whether an image works. Makes data in it and trains ten updates on two ranks, generates, starts a longer run, asks
# after its health, stops it with SIGTERM, and continues it on two ranks from what it has saved.
#
#   docker/smoke.sh           builds the image first
#   docker/smoke.sh IMAGE     takes one that is there
#
#   ENGINE         docker, podman or buildah; default: the first of these that answers
#   BUILD_OPTIONS  more options of the build: --build-arg CUDA=13, --secret id=pip,src=pip.conf, ...
#   RUN_OPTIONS    more options of each container: --gpus all, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME="stablemoe-smoke-$$"
CONFIG=/opt/stablemoe/ds_configs/demo.yaml
SMALL=(schedule.warmup_steps=2 logging.every=1 logging.eval_every=0 logging.probe_every=0)
PATIENCE=300 # seconds for the longer run to make its first updates, and to save
read -ra build_options <<<"${BUILD_OPTIONS-}"
read -ra run_options <<<"${RUN_OPTIONS-}"

main() {
  engine="${ENGINE:-$(find_engine)}"
  image="${1-}"
  [[ -n "$image" ]] || { image=stablemoe_ds:smoke && timed "build" build; }
  trap clean EXIT
  prepare
  timed "user, tools and imports" check_contents
  timed "demo: ten updates on two ranks" run demo schedule.steps=10 stages.at_step=5 "${SMALL[@]}"
  run cat runs/demo/checkpoints/latest | expect '^step-000010$'
  run routing table runs/demo | expect 'sha256'
  timed "generate" run generate runs/demo --prompt 'def main(' --tokens 8
  timed "stop and continue" stop_and_continue
  echo "smoke: $image of $(size) works, by $engine"
}

check_contents() {
  run bash -c 'test "$(id -u)" != 0 && ! type -P gcc cc c++ && ! test -s /etc/pip.conf'
  run python /opt/stablemoe/docker/health.py
}

stop_and_continue() {
  local settings=("$CONFIG" name=long "${SMALL[@]}") said stopped
  start train "${settings[@]}" parallel.expert=1 schedule.steps=100000 stages.at_step=50000
  wait_for 'grep -q "\"step\": 3, " runs/long/metrics.jsonl'
  look python /opt/stablemoe/docker/health.py | expect 'last sign of life'
  said="$(mktemp)"
  stop >"$said"
  expect 'asked to stop: saved at step' <"$said"
  rm "$said"
  stopped="$(run cat runs/long/checkpoints/latest)"
  run env NPROC_PER_NODE=2 /opt/stablemoe/docker/entrypoint.sh train "${settings[@]}" parallel.expert=2 \
    "schedule.steps=$((10#${stopped#step-} + 3))" stages.at_step=2 | expect "continuing after update"
}

# --- what the engines do in their own ways --------------------------------------------------------------------------

find_engine() {
  docker info &>/dev/null && echo docker && return
  podman info &>/dev/null && echo podman && return
  buildah version &>/dev/null && echo buildah && return
  fail "expected docker, podman or buildah"
}

build() {
  local how=(--tag "$image" --file docker/Dockerfile "${build_options[@]}" .)
  case "$engine" in
    docker) DOCKER_BUILDKIT=1 docker build "${how[@]}" ;;
    podman) podman build --format docker "${how[@]}" ;;
    buildah) buildah bud --isolation chroot --format docker "${how[@]}" ;;
  esac
}

# What containers leave in /workspace lies in a volume; buildah keeps it in its one container.
prepare() {
  if [[ "$engine" == buildah ]]; then
    buildah from --name "$NAME" "$image" >/dev/null
    entrypoint="$(buildah inspect --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$NAME")"
    read -ra entrypoint <<<"$entrypoint"
  else
    "$engine" volume create "$NAME" >/dev/null
    options=(--volume "$NAME:/workspace" "${run_options[@]}")
  fi
}

run() {
  if [[ "$engine" == buildah ]]; then
    buildah run --isolation chroot "${run_options[@]}" "$NAME" -- "${entrypoint[@]}" "$@"
  else
    "$engine" run --rm "${options[@]}" "$image" "$@"
  fi
}

start() {
  if [[ "$engine" == buildah ]]; then
    # It shares the process ids of this machine, so its init process can be told to stop from here.
    buildah run --isolation chroot "${run_options[@]}" "$NAME" -- \
      bash -c 'echo $$ >/workspace/pid; exec "$@" &>/workspace/log' - "${entrypoint[@]}" "$@" &
    started=$!
  else
    "$engine" run --detach --name "$NAME" "${options[@]}" "$image" "$@"
  fi
}

look() {
  if [[ "$engine" == buildah ]]; then run "$@"; else "$engine" exec "$NAME" "$@"; fi
}

# Stop what was started, print what it said, and fail unless it ended well.
stop() {
  local status=0
  if [[ "$engine" == buildah ]]; then
    kill -TERM "$(run cat pid)"
    wait "$started" || status=$?
    run cat log
  else
    "$engine" stop -t "$PATIENCE" "$NAME" >/dev/null
    status="$("$engine" wait "$NAME")"
    "$engine" logs "$NAME"
  fi
  [[ "$status" == 0 ]] || fail "the stopped run ended with status $status"
}

size() {
  case "$engine" in
    buildah) buildah images --format '{{.Size}}' "$image" ;;
    *) echo "$(($("$engine" image inspect --format '{{.Size}}' "$image") / 1000000)) MB" ;;
  esac
}

clean() {
  if [[ "$engine" == buildah ]]; then
    [[ -z "${started-}" ]] || kill "$started" 2>/dev/null || true
    buildah rm "$NAME" >/dev/null
  else
    "$engine" rm --force "$NAME" &>/dev/null || true
    "$engine" volume rm "$NAME" >/dev/null
  fi
}

# --- small change ---------------------------------------------------------------------------------------------------

timed() {
  local what="$1" began="$SECONDS"
  "${@:2}"
  echo "smoke: $what: $((SECONDS - began)) s"
}

wait_for() {
  local end=$((SECONDS + PATIENCE))
  until look bash -c "$1" &>/dev/null; do
    ((SECONDS < end)) || fail "waited $PATIENCE s for: $1"
    sleep 2
  done
}

expect() {
  local text
  text="$(cat)"
  grep -q -- "$1" <<<"$text" || fail "expected '$1' in: $text"
}

fail() {
  echo "smoke: error: $*" >&2
  exit 1
}

main "$@"
