"""Variables that every rank gets, whatever starts it."""

from __future__ import annotations

from stablemoe_ds.distributed.environment import MEANT_SIZE
from stablemoe_ds.launch.cluster import ClusterConfig

DEFAULT_PORT = 29500


def variables(cluster: ClusterConfig) -> dict[str, str]:
    """Names and values; what the cluster's ``environment`` says comes last and wins.

    Secrets are not among them: they travel by name, as ``forward`` lists them.
    """
    network = cluster.network
    found = {
        "OMP_NUM_THREADS": str(cluster.threads_per_process),
        "PYTHONUNBUFFERED": "1",  # so that a log holds what was said before a rank was killed
        "PYTHONFAULTHANDLER": "1",
        "TTY_COMPATIBLE": "0",  # mpirun gives ranks a terminal, and their logs would hold colour codes
    }
    if len(cluster.world_sizes) == 1:
        found[MEANT_SIZE] = str(cluster.world_size)
    if cluster.device == "cpu":
        found |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if network.interface:
        found |= {"NCCL_SOCKET_IFNAME": network.interface, "GLOO_SOCKET_IFNAME": network.interface}
    if network.infiniband_hca:
        found["NCCL_IB_HCA"] = network.infiniband_hca
    return found | cluster.environment
