#!/bin/bash
cd /shared/moe || exit
mkdir -p runs/paper-base/launch/20260101-120000-000-login runs/paper-base/launch/20260101-120000-000-login/logs
env STABLEMOE_LAUNCH=20260101-120000-000-login OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 \
    TTY_COMPATIBLE=0 STABLEMOE_WORLD_SIZE=8 /shared/moe/.venv/bin/python -m stablemoe_ds.launch.local \
    --processes 8 --port 29500 --logs runs/paper-base/launch/20260101-120000-000-login/logs docker run --rm \
    --init --network=host --ipc=host --user=1000:1000 --gpus=all --volume /shared/moe:/shared/moe --volume \
    /data/corpora:/data/corpora --env HOME=/tmp --env RANK --env WORLD_SIZE --env LOCAL_RANK --env MASTER_ADDR \
    --env MASTER_PORT --env STABLEMOE_LAUNCH --env OMP_NUM_THREADS --env PYTHONUNBUFFERED --env \
    PYTHONFAULTHANDLER --env TTY_COMPATIBLE --env STABLEMOE_WORLD_SIZE --workdir /shared/moe --entrypoint= \
    stablemoe_ds:cuda python -m stablemoe_ds train runs/paper-base/launch/20260101-120000-000-login/run.yaml
