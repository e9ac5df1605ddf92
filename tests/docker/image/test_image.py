"""Builds the image, as far as this machine can, and lets docker/smoke.sh work in it: without a daemon or a registry.

Needs root, ``buildah`` and ``mmdebstrap``. The base image is Debian with its own Python, in place of the one named in
docker/Dockerfile. STABLEMOE_BASE_IMAGE names another for machines that can pull one. Takes minutes.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BASE = os.environ.get("STABLEMOE_BASE_IMAGE")
TOOLS = ["buildah"] if BASE else ["buildah", "mmdebstrap"]
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: apt-get install {' '.join(MISSING)}"),
]


class Builder:
    """buildah with a store of its own, the base image, and this machine's way to its package index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = folder / "storage.conf"
        storage.write_text(f'[storage]\ndriver="overlay"\ngraphroot="{folder}/graph"\nrunroot="{folder}/run"\n')
        self.environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage), "ENGINE": "buildah"}
        self.base = BASE or self._debian()
        self.options = ["--layers", "--build-arg", f"BASE_IMAGE={self.base}", *pip_options(folder / "pip.conf")]

    def _debian(self) -> str:
        tar = self.folder / "base.tar"
        packages = "--include=ca-certificates,python3,python3-venv"
        self.call(["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(tar)])
        (self.folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        self.call(["buildah", "bud", "--isolation", "chroot", "--tag", "base", str(self.folder)])
        tar.unlink()
        return "localhost/base"

    def call(self, command: list[str], **more: str) -> str:
        """Run to a good end; returns what was printed."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout


def pip_options(secret: Path) -> list[str]:
    """Options of a build that hand this machine's pip configuration in as a secret, and mount the files it names."""
    lines = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True).splitlines()
    values = {name.split(".")[-1]: ast.literal_eval(text) for name, text in (line.split("=", 1) for line in lines)}
    # An index that cannot be reached is asked once, not five times for each package.
    secret.write_text("\n".join(["[global]", *(f"{key} = {text}" for key, text in values.items()), "retries = 0\n"]))
    words = {word for text in values.values() for word in text.split()}
    # Pages of an index on disk link to files beside it.
    paths = [Path(word) for word in words if word.startswith("/")]
    paths += [Path(word.removeprefix("file://")).parent for word in words if word.startswith("file://")]
    mounts = [option for path in sorted(paths) if path.exists() for option in ("--volume", f"{path}:{path}:ro")]
    return ["--secret", f"id=pip,src={secret}", *mounts]


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    folder = Path(tempfile.mkdtemp(prefix="stablemoe-image-"))
    built = None
    try:
        built = Builder(folder)
        yield built
    finally:
        if built:
            built.call(["buildah", "rm", "--all"])
            built.call(["buildah", "rmi", "--all", "--force"])
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def smoke(builder: Builder) -> str:
    """What docker/smoke.sh said; it leaves the image ``stablemoe_ds:smoke``."""
    return builder.call(["docker/smoke.sh"], BUILD_OPTIONS=" ".join(builder.options))


def test_image_trains_generates_stops_and_continues(smoke: str) -> None:
    assert smoke.splitlines()[-1].startswith("smoke: stablemoe_ds:smoke of")


def test_image_holds_what_is_pinned_and_nothing_of_this_machine(builder: Builder, smoke: str) -> None:
    container = builder.call(["buildah", "from", "stablemoe_ds:smoke"]).strip()
    inside = ["buildah", "run", "--isolation", "chroot", container, "--", "python", "-m", "pip"]
    frozen = builder.call([*inside, "freeze", "--exclude-editable", "--exclude", "torch"])
    assert frozen == (ROOT / "docker" / "constraints.txt").read_text()
    assert builder.call([*inside, "config", "list"]) == ""


def test_cuda_image_tells_the_driver_what_it_wants(builder: Builder) -> None:
    """With the small build of torch: nothing here depends on what is in the wheel."""
    torch = ["--volume", f"{ROOT}/docker/torch-cpu.txt:/opt/stablemoe/torch-cuda13.txt:ro"]
    arguments = ["--isolation", "chroot", "--format", "docker", "--build-arg", "CUDA=13", *torch, *builder.options]
    builder.call(["buildah", "bud", *arguments, "--tag", "cuda", "--file", "docker/Dockerfile", "."])
    variables = builder.call(["buildah", "inspect", "--type", "image", "--format", "{{.OCIv1.Config.Env}}", "cuda"])
    assert "NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility" in variables
