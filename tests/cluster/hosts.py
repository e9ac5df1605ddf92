"""Hosts made of namespaces: each has its own network, processes, name, /etc and /run; all share the file system.

Everything that a host runs ends with its process 1, and that ends with the process that made it: nothing is left
behind, however a test ends. Their network is a bridge in a namespace of its own, unseen by the machine around them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.waiting import wait_until

NETWORK = "10.77.0"
BOOT_SECONDS, COMMAND_SECONDS = 120.0, 120.0
"""Patience on a machine that is short of time; a quiet one needs a hundredth."""
BOOT = Path(__file__).with_name("boot.sh")
NAMESPACES = ["--net", "--pid", "--uts", "--ipc", "--mount", "--mount-proc", "--propagation", "private"]
WITH_ITS_PARENT = ["setpriv", "--pdeathsig", "KILL"]
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RANK_NAMES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")

SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
"""
SSH = """
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
  ConnectTimeout 5
"""


@dataclass
class Host:
    """One host; powered on and connected by :func:`hosts`."""

    name: str
    address: str
    folder: Path
    switch: int
    pid: int = 0
    _holder: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def power_on(self) -> None:
        """Boot, connect to the switch, and wait until ssh answers."""
        log = self.folder / f"{self.name}.log"
        command = [*WITH_ITS_PARENT, "unshare", *NAMESPACES, "--fork", "--kill-child"]
        command += ["sh", str(BOOT), self.name, str(self.folder / "etc")]
        with log.open("wb") as out:
            self._holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        wait_until(f"{self.name} starts", lambda: children.read_text() != "", BOOT_SECONDS, log.read_text)
        self.pid = int(children.read_text())
        peer = ("peer", "name", "eth0", "netns", str(self.pid))
        in_network(self.switch, "link", "add", self.name, "type", "veth", *peer)
        in_network(self.switch, "link", "set", "dev", self.name, "master", "bridge", "up")
        in_network(self.pid, "address", "add", f"{self.address}/24", "dev", "eth0")
        in_network(self.pid, "link", "set", "eth0", "up")
        wait_until(f"{self.name} answers", lambda: "Server listening" in log.read_text(), BOOT_SECONDS, log.read_text)

    def power_off(self) -> None:
        """Everything on the host ends at once, and says nothing to anybody: the network goes first."""
        in_network(self.switch, "link", "delete", "dev", self.name)
        self.end()

    def end(self) -> None:
        """Kill process 1, and with it all others."""
        if self._holder is not None and self._holder.poll() is None:
            os.kill(self.pid or self._holder.pid, signal.SIGKILL)
            self._holder.wait()
        self.pid = 0

    def unplug(self) -> None:
        """Pull the network cable: packets are lost silently."""
        in_network(self.switch, "link", "set", "dev", self.name, "down")

    def plug(self) -> None:
        in_network(self.switch, "link", "set", "dev", self.name, "up")

    def start(self, *command: str, log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command on this host; what it prints goes to ``log``."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self._entering(command), env=_environment(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command on this host and return what it printed; raises AssertionError with that if it fails."""
        done = self.attempt(*command, environment=environment)
        assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on this host, however it ends."""
        return subprocess.run(
            self._entering(command),
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    def _entering(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--all", f"--wd={self.folder}", *command]

    def ranks(self) -> dict[int, int]:
        """Process id, as the machine around sees it, by rank of every `stablemoe train` on this host."""
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns/pid") != mine:
                    continue
                program, *arguments = (entry / "cmdline").read_bytes().decode().split("\0")
                pairs = (entry / "environ").read_bytes().decode().split("\0")
            except OSError:  # it has ended meanwhile
                continue
            environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            rank = next((environment[name] for name in RANK_NAMES if name in environment), None)
            if rank is not None and "python" in program and {"stablemoe_ds", "train"} <= set(arguments):
                found[int(rank)] = int(entry.name)
        return found

    def kill_rank(self, rank: int) -> None:
        os.kill(self.ranks()[rank], signal.SIGKILL)


def in_network(pid: int, *command: str) -> None:
    """`ip COMMAND` in the network of a process."""
    entering = ["nsenter", "--target", str(pid), "--net", "ip", *command]
    done = subprocess.run(entering, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(entering)}: {done.stderr}"


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """What somebody has who logs in, not what the test session has gathered."""
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "USER", "LANG", "TERM")}
    return {**kept, "PATH": PATH, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(more or {})}


@contextmanager
def hosts(
    folder: Path, names: Sequence[str], etc: Mapping[str, str] | None = None, also: Mapping[str, str] | None = None
) -> Iterator[dict[str, Host]]:
    """Hosts by name, up and connected; the first is where people log in.

    ``etc`` are texts to lie over files of /etc on all of them, ``also`` further names that stand for one of the hosts.
    ``folder`` takes logs and keys, and is where commands start.
    """
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=10)}
    known = {**addresses, **{alias: addresses[name] for alias, name in (also or {}).items()}}
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    files = {
        "hosts": "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in known.items()),
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",  # no name server to wait for
        "ssh/sshd_config": SSHD.format(folder=folder),
        "ssh/ssh_config": SSH.format(folder=folder),
        **(etc or {}),
    }
    for name, text in files.items():
        path = folder / "etc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600 if path.suffix == ".key" else 0o644)
    with ExitStack() as closing:
        switch = subprocess.Popen([*WITH_ITS_PARENT, "unshare", "--net", "sleep", "infinity"])
        closing.callback(switch.wait)
        closing.callback(switch.kill)
        mine = os.readlink("/proc/self/ns/net")
        wait_until("a network of its own", lambda: os.readlink(f"/proc/{switch.pid}/ns/net") != mine, BOOT_SECONDS)
        in_network(switch.pid, "link", "add", "bridge", "type", "bridge")
        in_network(switch.pid, "link", "set", "bridge", "up")
        made = {name: Host(name, address, folder, switch.pid) for name, address in addresses.items()}
        for host in made.values():
            closing.callback(host.end)
            host.power_on()
        yield made
