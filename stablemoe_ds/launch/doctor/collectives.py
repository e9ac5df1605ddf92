"""Two processes that speak gloo over the loopback: the least a run with several processes needs.

``python -m stablemoe_ds.launch.doctor.collectives RANK PORT`` is one of them; :func:`talk` starts both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from stablemoe_ds.distributed.environment import free_port

RANKS = 2


def talk(seconds: float) -> str:
    """Let two processes add a tensor up and exchange uneven rows; "" if they could, else what went wrong.

    Takes as long as two imports of torch, and at most ``seconds``.
    """
    port = str(free_port())
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), port],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    end = time.monotonic() + seconds
    try:
        for rank, process in enumerate(ranks):
            _, said = process.communicate(timeout=max(0.1, end - time.monotonic()))
            if process.returncode:
                last = said.strip().splitlines()[-1:] or ["no message"]
                return f"rank {rank} ended with status {process.returncode}: {last[0]}"
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:g} s"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return ""


def _take_part(rank: int, port: int) -> None:
    """One rank's part. Raises RuntimeError if what arrives is not what was sent."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    total = torch.full((4,), float(rank + 1))
    dist.all_reduce(total)
    # Rank 0 keeps nothing and sends 3 rows, rank 1 keeps 2 and sends none: what expert parallelism looks like.
    send, receive = ([0, 3], [0, 0]) if rank == 0 else ([0, 2], [3, 2])
    rows = torch.full((sum(send), 2), float(rank))
    arrived = torch.empty(sum(receive), 2)
    dist.all_to_all_single(arrived, rows, receive, send)
    if total.tolist() != [3.0] * 4 or arrived[:, 0].tolist() != [0.0] * receive[0] + [1.0] * receive[1]:
        raise RuntimeError(f"rank {rank} got {total.tolist()} and {arrived.tolist()}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _take_part(int(sys.argv[1]), int(sys.argv[2]))
