"""What goes before a command so that it runs in a container."""

from __future__ import annotations

from collections.abc import Iterable

from stablemoe_ds.launch.cluster import ClusterConfig


def contained(cluster: ClusterConfig, names: Iterable[str], user: str) -> list[str]:
    """Words before a rank's command; none without a container, and under pyxis, which is an option of srun.

    names: variables that have to reach the inside; apptainer passes on all. user: ``UID:GID`` of what is written.
    """
    container = cluster.container
    if container is None or container.kind == "pyxis":
        return []
    mounts, inside = _mounts(cluster), _inside(cluster)
    if container.kind == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        gpu = ["--nv"] if cluster.device == "gpu" else []
        return ["apptainer", "exec", *gpu, *binds, "--pwd", inside, container.image]
    gpu = ["--gpus=all"] if cluster.device == "gpu" else []
    words = ["docker", "run", "--rm", "--init", "--network=host", "--ipc=host", f"--user={user}", *gpu]
    words += [word for mount in mounts for word in ("--volume", mount)]
    words += [word for name in ("HOME=/tmp", *names) for word in ("--env", name)]
    return [*words, "--workdir", inside, "--entrypoint=", container.image]


def pyxis_options(cluster: ClusterConfig) -> list[str]:
    """Options of srun that start its tasks in a container."""
    container = cluster.container
    if container is None or container.kind != "pyxis":
        return []
    mounts = ",".join(_mounts(cluster))
    return [f"--container-image={container.image}", f"--container-mounts={mounts}",
            f"--container-workdir={_inside(cluster)}"]  # fmt: skip


def _inside(cluster: ClusterConfig) -> str:
    assert cluster.container is not None
    assert cluster.working_directory is not None
    return cluster.container.workdir or cluster.working_directory


def _mounts(cluster: ClusterConfig) -> list[str]:
    assert cluster.container is not None
    return [f"{cluster.working_directory}:{_inside(cluster)}", *cluster.container.mounts]
