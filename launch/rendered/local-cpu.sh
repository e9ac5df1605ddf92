#!/bin/bash
mkdir -p runs/demo/launch/20260101-120000-000-login runs/demo/launch/20260101-120000-000-login/logs
env STABLEMOE_LAUNCH=20260101-120000-000-login OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 \
    TTY_COMPATIBLE=0 STABLEMOE_WORLD_SIZE=2 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= \
    /shared/moe/.venv/bin/python -m stablemoe_ds.launch.local --processes 2 --port 29500 --logs \
    runs/demo/launch/20260101-120000-000-login/logs /shared/moe/.venv/bin/python -m stablemoe_ds train \
    runs/demo/launch/20260101-120000-000-login/run.yaml
