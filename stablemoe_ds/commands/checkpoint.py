"""``stablemoe checkpoint``: show, verify and convert."""

from __future__ import annotations

import argparse
from pathlib import Path

from stablemoe_ds.commands.parsing import Subparsers, add_command, add_group, json_argument, settle_libraries, tell


def add_to(commands: Subparsers) -> None:
    subs = add_group(commands, "checkpoint", "show, verify or convert a checkpoint", "show|verify|convert")
    for name, text, call in (
        ("show", "show the step, model and files of a checkpoint", _checkpoint_show),
        ("verify", "read every byte and check it against the manifest", _checkpoint_verify),
        (
            "convert",
            "start a run from another model: dense to experts, more or fewer experts, or a transformers folder",
            _checkpoint_convert,
        ),
    ):
        sub = add_command(subs, name, text, call)
        text = "checkpoint or run directory" + ("; or a transformers folder" if name == "convert" else "")
        sub.add_argument("checkpoint", help=text)
        if name == "convert":
            words, text = ("RUN.yaml", "key=value"), "the run to start from it, and settings that override the run's"
            sub.add_argument("--to", required=True, nargs="+", metavar=words, help=text)
        json_argument(sub)


def _checkpoint_show(arguments: argparse.Namespace) -> int:
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.checkpoint.summary import show

    tell(*show(arguments.checkpoint), arguments.json)
    return 0


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.checkpoint.summary import verify

    tell(*verify(arguments.checkpoint), arguments.json)
    return 0


def _checkpoint_convert(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run

    file, *overrides = arguments.to
    target = load_run(file, overrides)
    is_folder = Path(arguments.checkpoint).is_dir()  # which may be one of transformers
    settle_libraries(*([] if is_folder else [arguments.checkpoint]))
    from stablemoe_ds.checkpoint.convert.conversion import convert
    from stablemoe_ds.checkpoint.reader import Checkpoint
    from stablemoe_ds.distributed.groups import stop_world
    from stablemoe_ds.export.imported_folder import import_folder, is_folder_of_transformers

    if is_folder_of_transformers(arguments.checkpoint):
        source = arguments.checkpoint
        try:
            written, what = import_folder(source, target)
        finally:
            stop_world()
    else:
        checkpoint = Checkpoint.open(arguments.checkpoint)
        source = str(checkpoint.path)
        written, what = convert(checkpoint, target)
    facts = {"from": source, "to": str(written), "what": what}
    tell(facts, f"{what}; wrote {written}. 'stablemoe train' with the same run continues from it", arguments.json)
    return 0
