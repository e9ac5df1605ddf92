#!/bin/bash
mkdir -p runs/paper-base/launch/20260101-120000-000-login runs/paper-base/launch/20260101-120000-000-login/logs
env STABLEMOE_LAUNCH=20260101-120000-000-login OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 \
    TTY_COMPATIBLE=0 STABLEMOE_WORLD_SIZE=8 /shared/moe/.venv/bin/python -m stablemoe_ds.launch.local \
    --processes 8 --port 29500 --logs runs/paper-base/launch/20260101-120000-000-login/logs \
    /shared/moe/.venv/bin/python -m stablemoe_ds train \
    runs/paper-base/launch/20260101-120000-000-login/run.yaml
