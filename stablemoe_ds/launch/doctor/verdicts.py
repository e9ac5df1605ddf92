"""From the reports of all ranks to findings: what differs, who is missing, what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from stablemoe_ds.launch.cluster import ClusterConfig
from stablemoe_ds.launch.doctor.findings import Finding
from stablemoe_ds.launch.doctor.rank_report import Report, Stage

Key = TypeVar("Key")
SKEW_SECONDS = 1.0
SLOW = {"nccl": 2.0, "gloo": 0.05}
"""GB/s between nodes below which something is likely to be wrong: the speed of a 16, and of a 0.4 gigabit wire."""
DOING: dict[Stage, str] = {
    "looking": "loading torch and looking around",
    "rendezvous": "waiting for the others",
    "joining": "connecting to all others",
    "measuring": "measuring",
}
REMEDIES: dict[Stage, str] = {
    "looking": "its log says more; a slow network disk? run it again",
    "rendezvous": "start what is missing; is network.port open on the first node, and do all nodes know its name?",
    "joining": "all ports between the nodes have to be open; name the interface that joins them: network.interface",
    "measuring": "does the network drop large packets (MTU)? NCCL_DEBUG=INFO in environment shows more",
}


@dataclass(frozen=True)
class Probed:
    """All that is known after a probe.

    hosts: names of the nodes, as far as the launcher has them. problem: what the launcher says if it did not end well.
    last_words: of each rank that has a log, the line that tells most. logs: where they are.
    """

    cluster: ClusterConfig
    reports: list[Report]
    hosts: list[str] = field(default_factory=list)
    problem: str = ""
    last_words: dict[int, str] = field(default_factory=dict)
    logs: str = ""

    @property
    def first(self) -> list[Report]:
        """The report that speaks for each node."""
        return [report for report in self.reports if report.leads]


def judge(probed: Probed) -> list[Finding]:
    """In the order in which a person would put things right."""
    return [finding for check in CHECKS for finding in check(probed)]


def launcher(probed: Probed) -> Iterator[Finding]:
    name = probed.cluster.launcher
    if probed.problem:
        yield Finding("launcher", "fail", f"{name}: {probed.problem}", f"read {probed.logs}")
    elif probed.reports:
        yield Finding("launcher", "ok", f"{name} has started {len(probed.reports)} ranks")


def ranks(probed: Probed) -> Iterator[Finding]:
    """Whether every rank has reported, and sees the same number of ranks."""
    cluster, reports = probed.cluster, probed.reports
    if miscounted := [report for report in reports if report.size != cluster.world_size]:
        found = f"{_names(miscounted)}: a rank counts {miscounted[0].size} ranks of {cluster.world_size}"
        yield Finding("ranks", "fail", found, "ranks do not learn their number: another MPI, or a container that "
                      "drops variables?")  # fmt: skip
        return
    nodes = list(_silent(probed)) if reports else [("all nodes", list(range(cluster.world_size)))]
    if not nodes:
        yield Finding("ranks", "ok", f"{len(reports)} on {_nodes(probed)} have reported")
    for node, silent in nodes:
        words = next((probed.last_words[rank] for rank in silent if rank in probed.last_words), "")
        found = f"{node}: no report of {_span(silent)}" + (f"; a log says: {words}" if words else "")
        yield Finding("ranks", "fail", found, _reach(probed))


def versions(probed: Probed) -> Iterator[Finding]:
    packages = dict.fromkeys(name for report in probed.first for name in report.versions)
    for package in packages:
        groups = _grouped((report.versions.get(package, "not installed"), report.host) for report in probed.first)
        usual = max(groups, key=lambda version: len(groups[version]))
        if len(groups) == 1:
            yield Finding(package, "ok", f"{usual} on {_nodes(probed)}")
            continue
        found = "; ".join(f"{version} on {', '.join(hosts)}" for version, hosts in groups.items())
        odd = [host for version, hosts in groups.items() if version != usual for host in hosts]
        yield Finding(package, "fail", found, f"one environment for all nodes: bring {', '.join(odd)} to {usual}")


def interface(probed: Probed) -> Iterator[Finding]:
    wanted = probed.cluster.network.interface
    if wanted is None or not probed.first:
        return
    names = wanted.split(",")
    without = [report for report in probed.first if not set(names) <= set(report.interfaces)]
    for report in without:
        remedy = "set network.interface to one that all nodes have, or null"
        found = f"{report.host} has no {wanted}, but {', '.join(report.interfaces)}"
        yield Finding("interface", "fail", found, remedy)
    if not without:
        yield Finding("interface", "ok", f"{wanted} on {_nodes(probed)}")


def rendezvous(probed: Probed) -> Iterator[Finding]:
    """How far the ranks got with each other, except those that see another number of ranks."""
    counted = [report for report in probed.reports if report.size == probed.cluster.world_size]
    stopped = [report for report in counted if report.stage != "done"]
    problems = _grouped(((report.stage, report.problem), report.host) for report in stopped)
    for (stage, problem), hosts in problems.items():
        found = problem or f"ended while {DOING[stage]}"
        yield Finding("rendezvous", "fail", f"{', '.join(hosts)}: {found}", REMEDIES[stage])
    if counted and not stopped:
        yield Finding("rendezvous", "ok", "all ranks have connected to the first node and to each other")


def run_directory(probed: Probed) -> Iterator[Finding]:
    remedy = "run_dir and working_directory have to be on a disk that all nodes share, at the same path"
    bad = False
    for report in probed.reports:
        if report.unwritable and report.leads:
            bad = True
            yield Finding("run directory", "fail", f"{report.host} cannot write {report.unwritable}", remedy)
        elif report.unseen:
            bad = True
            unseen = ", ".join(report.unseen)
            yield Finding("run directory", "fail", f"{report.host} does not see what {unseen} has written", remedy)
    if not bad and any(report.stage in ("joining", "measuring", "done") for report in probed.reports):
        yield Finding("run directory", "ok", f"shared by {_nodes(probed)}")


def gpus(probed: Probed) -> Iterator[Finding]:
    looked = [report for report in probed.reports if report.stage != "looking"]
    if probed.cluster.device == "cpu" or not looked:
        return
    without = _grouped((report.gpus, report.host) for report in looked if report.gpus <= report.local_rank)
    for seen, hosts in without.items():
        found = f"{', '.join(hosts)}: ranks see {seen} GPUs, processes_per_node is {probed.cluster.processes_per_node}"
        yield Finding("gpus", "fail", found, "nvidia-smi there; a CUDA build of torch? slurm.options, --gpus of the "
                      "container? or device: cpu")  # fmt: skip
    if not without:
        yield Finding("gpus", "ok", f"one for each of {len(looked)} ranks")


def clocks(probed: Probed) -> Iterator[Finding]:
    if len(measured := [report for report in probed.first if report.stage == "done"]) < 2:
        return
    low, high = (choose(measured, key=lambda report: report.clock) for choose in (min, max))
    apart = high.clock - low.clock
    found = f"{high.host} is {apart * 1000:.0f} ms ahead of {low.host}"
    if apart > SKEW_SECONDS:
        yield Finding("clocks", "warn", found, "start chrony or ntpd on all nodes: files and logs are dated by them")
    else:
        yield Finding("clocks", "ok", f"at most {apart * 1000:.0f} ms apart")


def bandwidth(probed: Probed) -> Iterator[Finding]:
    speeds = next((report.speeds for report in probed.reports if report.speeds), [])
    for collective in dict.fromkeys(speed["collective"] for speed in speeds):
        mine = [speed for speed in speeds if speed["collective"] == collective]
        each = ", ".join(f"{speed['gb_per_second']:.3g} GB/s with {speed['mib']} MiB" for speed in mine)
        backend, best = mine[0]["backend"], max(speed["gb_per_second"] for speed in mine)
        found = f"{each} a rank; {backend}, {len(probed.reports)} ranks on {_nodes(probed)}"
        slow = len(probed.first) > 1 and best < SLOW[backend]
        remedy = "network.interface, network.infiniband_hca: is it the fast network? NCCL_DEBUG=INFO shows it"
        yield Finding(collective, "warn" if slow else "ok", found, remedy if slow else "")


def by_itself(probed: Probed) -> Iterator[Finding]:
    """What ``stablemoe doctor`` says on each node: all that is not well, and one line for what is well everywhere."""
    findings = [(report, Finding(**finding)) for report in probed.first for finding in report.findings]
    for name in dict.fromkeys(finding.name for _, finding in findings):
        mine = [(report, finding) for report, finding in findings if finding.name == name]
        bad = [(report, finding) for report, finding in mine if finding.verdict != "ok"]
        for report, finding in bad:
            yield Finding(name, finding.verdict, f"{report.host}: {finding.found}", finding.remedy)
        report, finding = mine[0]
        if not bad and name not in report.versions:
            others = f"; also fine on {len(mine) - 1} more" if len(mine) > 1 else ""
            yield Finding(name, "ok", f"{report.host}: {finding.found}{others}")


CHECKS: tuple[Callable[[Probed], Iterator[Finding]], ...] = (
    launcher,
    ranks,
    versions,
    interface,
    rendezvous,
    run_directory,
    gpus,
    by_itself,
    clocks,
    bandwidth,
)


def _silent(probed: Probed) -> Iterator[tuple[str, list[int]]]:
    """Nodes with ranks that have not reported, each by its name if that is known."""
    each = probed.cluster.processes_per_node
    heard = {report.rank: report.host for report in probed.reports}
    blocks = [range(node * each, (node + 1) * each) for node in range(probed.cluster.nodes)]
    unheard = [host for host in probed.hosts if _short(host) not in map(_short, heard.values())]
    if len(unheard) != sum(heard.keys().isdisjoint(block) for block in blocks):
        unheard = []  # addresses, or names that the hosts do not call themselves by
    for number, block in enumerate(blocks, 1):
        if silent := [rank for rank in block if rank not in heard]:
            known = next((heard[rank] for rank in block if rank in heard), None)
            yield known or (unheard.pop(0) if unheard else f"node {number} of {len(blocks)}"), silent


def _reach(probed: Probed) -> str:
    """What to try where nothing has been heard."""
    how = {
        "torchrun": "was the command given on every machine? ",
        "slurm": "sinfo -R shows which nodes are down; ",
        "deepspeed": "does ssh let you in without a question? ",
        "mpi": "does ssh let you in without a question? ",
    }
    python = probed.cluster.python or "python"
    return f"{how.get(probed.cluster.launcher, '')}try there: {python} -c 'import stablemoe_ds'; logs in {probed.logs}"


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    """Hosts by what was found on them."""
    groups: dict[Key, list[str]] = {}
    for key, host in pairs:
        if host not in groups.setdefault(key, []):
            groups[key].append(host)
    return groups


def _nodes(probed: Probed) -> str:
    count = len(probed.first)
    return "all nodes" if count == probed.cluster.nodes > 1 else f"{count} node{'s' if count != 1 else ''}"


def _names(reports: Iterable[Report]) -> str:
    return ", ".join(dict.fromkeys(report.host for report in reports))


def _span(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {numbers[0]} to {numbers[-1]}"


def _short(host: str) -> str:
    return host.partition(".")[0]
