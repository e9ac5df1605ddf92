"""``stablemoe doctor``: what this machine or a cluster has, and what would fail on it."""

from __future__ import annotations

import argparse

from stablemoe_ds.commands.parsing import Subparsers, add_command, json_argument, tell


def add_to(commands: Subparsers) -> None:
    doctor = add_command(commands, "doctor", "what this machine or a cluster has, and what would fail", _doctor)
    doctor.add_argument(
        "--cluster", metavar="CLUSTER.yaml", help="probe all nodes, started as launch would start a run"
    )
    doctor.add_argument(
        "--wait", type=float, default=10.0, metavar="MINUTES", help="time the probe may be queued (default 10; slurm)"
    )
    json_argument(doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.launch.doctor.findings import render

    if arguments.cluster:
        from stablemoe_ds.launch.cluster import load_cluster
        from stablemoe_ds.launch.doctor.examine_cluster import examine_cluster

        findings = examine_cluster(load_cluster(arguments.cluster), arguments.wait)
    else:
        from stablemoe_ds.launch.doctor.examine import examine

        findings = examine()
    tell([finding.as_dict() for finding in findings], render(findings), arguments.json)
    return 0 if all(finding.verdict != "fail" for finding in findings) else 1
