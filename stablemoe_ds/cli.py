"""The ``stablemoe`` command: parse, load configuration, call one function. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stablemoe_ds.errors import RunError, UserError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input, 130 interrupted; 1 and 3 when a run breaks (launch/restart.py)."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = "; settings go right behind RUN.yaml, before any option" if any("=" in word for word in unknown) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter shows its code instead
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = arguments.call(arguments)
    except UserError as error:
        sys.stdout.flush()
        print(_error_text(error), file=sys.stderr, flush=True)
        code = 2
    except RunError as fault:
        sys.stdout.flush()
        print(f"stablemoe: error: {fault}", file=sys.stderr, flush=True)
        _leave_at_once(fault.exit_code)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.stdout.flush()
    sys.exit(code)


def _leave_at_once(code: int) -> NoReturn:
    """End the process and the readers it has started; threads and libraries might wait for ranks that are gone."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _error_text(error: UserError) -> str:
    from stablemoe_ds.launch.environment import read_launcher_environment

    rank, _, _ = read_launcher_environment()
    who = f" (rank {rank})" if rank else ""
    return f"stablemoe{who}: error: {error}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stablemoe",
        description="Train Mixture-of-Experts language models whose routing is learned first and never moves again.",
    )
    # The deepspeed launcher passes it, before everything else; LOCAL_RANK says it, too.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _add(commands, "demo", "the whole story on this machine, in minutes", _demo)
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="laid over ds_configs/demo.yaml")

    _data_commands(commands)

    train = _add(commands, "train", "train a run, under any launcher or alone", _train)
    _run_arguments(train)

    evaluation = _add(commands, "eval", "perplexity of a checkpoint, every token counted once", _eval)
    evaluation.add_argument("checkpoint", help="checkpoint or run directory")
    evaluation.add_argument("--data", help="prepared corpus (path without ending); default: the run's validation text")
    _json_argument(evaluation)

    generation = _add(commands, "generate", "continue a prompt", _generate)
    generation.add_argument("checkpoint", help="checkpoint or run directory")
    generation.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    generation.add_argument("--tokens", type=int, default=64, help="new tokens at most (default 64)")
    generation.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    generation.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that reach this")
    generation.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    generation.add_argument("--no-cache", action="store_true", help="read everything anew for each token")
    _json_argument(generation)

    routing = commands.add_parser("routing", help="what was learned about routing").add_subparsers(
        required=True, metavar="report|table"
    )
    report = _add(routing, "report", "load, fluctuation, agreement, what each expert serves", _routing_report)
    report.add_argument("checkpoint", help="checkpoint or run directory")
    _json_argument(report)
    report.add_argument("--png", type=Path, help="draw the report, too")
    table = _add(routing, "table", "the frozen routing table itself", _routing_table)
    table.add_argument("checkpoint", help="checkpoint or run directory, or a table file")
    table.add_argument("--output", type=Path, help="write the table as a safetensors file of its own")
    _json_argument(table)

    _checkpoint_commands(commands)

    config = commands.add_parser("config", help="what a run will do and what it costs").add_subparsers(
        required=True, metavar="check|show"
    )
    for name, text, call in (
        ("check", "hold a run against every rule and say what it costs", _config_check),
        ("show", "every setting of a run, defaults included", _config_show),
    ):
        sub = _add(config, name, text, call)
        _run_arguments(sub)
        sub.add_argument("--world-size", type=int, help="processes; default: the fewest the run can have")
        _json_argument(sub)

    _launch_commands(commands)

    compare = _add(
        commands, "compare", "train a suite of variants and seeds, and hold them against each other", _compare
    )
    compare.add_argument("suite", metavar="SUITE.yaml")
    compare.add_argument("--only", nargs="+", metavar="VARIANT", help="train these variants only")
    how = compare.add_mutually_exclusive_group()
    how.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, sharing the cores (default 1)")
    how.add_argument("--cluster", metavar="CLUSTER.yaml", help="train there, as `stablemoe launch` does")
    how.add_argument("--report", action="store_true", help="train nothing: tables and pictures of what is finished")
    compare.add_argument("--dry-run", action="store_true", help="print what would be run, one line a run")

    doctor = _add(commands, "doctor", "what this machine or a cluster has, and what would fail", _doctor)
    doctor.add_argument("--cluster", metavar="CLUSTER.yaml", help="start a probe on every rank, as launch would a run")
    doctor.add_argument(
        "--wait", type=float, default=10.0, metavar="MINUTES", help="time the probe may be queued (default 10; slurm)"
    )
    _json_argument(doctor)
    return parser


def _launch_commands(commands: Any) -> None:
    from stablemoe_ds.launch.commands import add_commands

    add_commands(commands, _add)


def _checkpoint_commands(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="what is in a checkpoint, and whether it is sound")
    subs = checkpoint.add_subparsers(required=True, metavar="show|verify|convert")
    for name, text, call in (
        ("show", "what a checkpoint is: step, model, files", _checkpoint_show),
        ("verify", "read every byte and hold it against the manifest", _checkpoint_verify),
        (
            "convert",
            "begin a run from another model's checkpoint: dense to experts, more or fewer",
            _checkpoint_convert,
        ),
    ):
        sub = _add(subs, name, text, call)
        sub.add_argument("checkpoint", help="checkpoint or run directory")
        if name == "convert":
            words, text = ("RUN.yaml", "key=value"), "the run that is to begin from it, and settings laid over it"
            sub.add_argument("--to", required=True, nargs="+", metavar=words, help=text)
        _json_argument(sub)


def _add(commands: Any, name: str, text: str, call: Command) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(call=call)
    return parser


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. schedule.steps=100")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="from text to training data").add_subparsers(
        required=True, metavar="tokenizer|prepare"
    )
    tokenizer = _add(data, "tokenizer", "learn a sentencepiece tokenizer from text files", _tokenizer)
    tokenizer.add_argument("files", nargs="+", type=Path, help="text, also .gz and .xz")
    tokenizer.add_argument("--output", type=Path, required=True, help="the .model file to write")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="how many ids there shall be")
    tokenizer.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="default unigram")
    tokenizer.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")
    prepare = _add(data, "prepare", "text files to Megatron's .bin/.idx", _prepare)
    prepare.add_argument("files", nargs="+", type=Path, help="text, also .gz and .xz")
    prepare.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    prepare.add_argument("--output", type=Path, required=True, help="path without ending")
    prepare.add_argument(
        "--documents", choices=("file", "line", "wiki"), default="file", help="what ends a document (default: the file)"
    )
    prepare.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


def _demo(arguments: argparse.Namespace) -> int:
    _settle()
    from stablemoe_ds.training.demo import demo

    return demo(arguments.overrides)


def _tokenizer(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.data.tokenizer import train_tokenizer

    made = train_tokenizer(
        arguments.files,
        arguments.output,
        arguments.vocab_size,
        arguments.kind,
        byte_fallback=not arguments.no_byte_fallback,
        threads=os.cpu_count() or 1,
    )
    print(f"wrote {made.path}: {made.vocab_size} ids, fingerprint {made.fingerprint[:12]}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.data.prepare import prepare
    from stablemoe_ds.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(arguments.tokenizer)
    _settle()
    info = prepare(arguments.files, tokenizer, arguments.output, arguments.workers, arguments.documents)
    print(f"wrote {info.prefix}.bin/.idx: {info.documents:,} documents, {info.tokens:,} tokens, {info.words:,} words")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.config.rules import check
    from stablemoe_ds.launch.signals import StopRequest

    run = load_run(arguments.run, arguments.overrides)
    check(run)
    stop = StopRequest()
    with stop.on(signal.SIGUSR1):  # schedulers send it when time is short, which may be while the libraries load
        _settle()
        from stablemoe_ds.training.groups import start_world, stop_world
        from stablemoe_ds.training.trainer import train

        world = start_world(run.parallel.timeout_minutes)
        try:
            train(run, world, stop)
        finally:
            if not isinstance(sys.exception(), RunError):  # the others may have gone without a word
                stop_world()
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    _settle()
    from stablemoe_ds.training.commands import evaluate_checkpoint

    facts, text = evaluate_checkpoint(arguments.checkpoint, arguments.data)
    _tell(facts, text, arguments.json)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    _settle()
    from stablemoe_ds.training.commands import continue_prompts

    texts = continue_prompts(
        arguments.checkpoint,
        arguments.prompt,
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        use_cache=not arguments.no_cache,
    )
    pairs = list(zip(arguments.prompt, texts, strict=True))
    facts = [{"prompt": prompt, "continuation": text} for prompt, text in pairs]
    _tell(facts, "\n---\n".join(prompt + text for prompt, text in pairs), arguments.json)
    return 0


def _routing_report(arguments: argparse.Namespace) -> int:
    _settle()
    from stablemoe_ds.evaluation.plots import draw
    from stablemoe_ds.evaluation.report_text import render_text
    from stablemoe_ds.training.checkpoint import Checkpoint
    from stablemoe_ds.training.session import run_report

    report = run_report(Checkpoint.open(arguments.checkpoint))
    _tell(report, render_text(report), arguments.json)
    if arguments.png:
        draw(report, arguments.png)
    return 0


def _routing_table(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.routing.table import RoutingTable

    path = Path(arguments.checkpoint)
    if path.is_file():
        table = RoutingTable.read(path)
    else:
        _settle()
        from stablemoe_ds.training.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(path)
        found = checkpoint.table()
        if found is None:
            raise UserError(
                f"checkpoint {checkpoint.path} has no routing table: it is of stage {checkpoint.progress.stage}"
            )
        table = found
    facts = {
        "layers": len(table.blocks),
        "blocks": list(table.blocks),
        "vocab_size": table.vocab_size,
        "top_k": table.top_k,
        "experts": table.experts,
        "tokenizer": table.tokenizer,
        "sha256": table.sha256,
    }
    if arguments.output:
        table.save(arguments.output)
    _tell(facts, "\n".join(f"{name:<12}{value}" for name, value in facts.items()), arguments.json)
    return 0


def _checkpoint_show(arguments: argparse.Namespace) -> int:
    _settle()
    from stablemoe_ds.training.checkpoint_commands import show

    _tell(*show(arguments.checkpoint), arguments.json)
    return 0


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    _settle()
    from stablemoe_ds.training.checkpoint_commands import verify

    _tell(*verify(arguments.checkpoint), arguments.json)
    return 0


def _checkpoint_convert(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run

    file, *overrides = arguments.to
    target = load_run(file, overrides)
    _settle()
    from stablemoe_ds.training.checkpoint_commands import convert_to

    _tell(*convert_to(arguments.checkpoint, target), arguments.json)
    return 0


def _config_check(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.config.report import render, report, smallest_world
    from stablemoe_ds.config.rules import check

    run = load_run(arguments.run, arguments.overrides)
    world = smallest_world(run) if arguments.world_size is None else arguments.world_size
    check(run, world)
    facts = report(run, world)
    _tell(facts, render(facts), arguments.json)
    return 0


def _config_show(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import dump_run, load_run
    from stablemoe_ds.config.report import report
    from stablemoe_ds.config.rules import check

    run = load_run(arguments.run, arguments.overrides)
    check(run, arguments.world_size)
    if arguments.json:
        _tell({**report(run, arguments.world_size), "run": run.model_dump(mode="json")}, "", True)
    else:
        print(dump_run(run), end="")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.comparison.suite import load_suite

    suite = load_suite(arguments.suite)
    runs = suite.runs if arguments.only is None else suite.only(arguments.only)
    if arguments.jobs < 1:
        raise UserError(f"--jobs: got {arguments.jobs}: expected at least 1")
    if arguments.cluster:
        from stablemoe_ds.comparison.cluster import launch_all

        return launch_all(runs, arguments.cluster, arguments.dry_run)
    if arguments.dry_run:
        print("\n".join(run.command for run in runs))
        return 0
    from stablemoe_ds.comparison.compare import compare, report

    return report(suite) if arguments.report else compare(suite, runs, arguments.jobs)


def _doctor(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.launch.findings import render

    if arguments.cluster:
        from stablemoe_ds.launch.cluster import load_cluster
        from stablemoe_ds.launch.cluster_doctor import examine_cluster

        findings = examine_cluster(load_cluster(arguments.cluster), arguments.wait)
    else:
        from stablemoe_ds.launch.doctor import examine

        findings = examine()
    _tell([finding.as_dict() for finding in findings], render(findings), arguments.json)
    return 0 if all(finding.verdict != "fail" for finding in findings) else 1


def _settle() -> None:
    from stablemoe_ds.libraries import settle_libraries

    settle_libraries()


def _tell(facts: Any, text: str, as_json: bool) -> None:
    """Print on the main rank only: JSON for a script, text for a person."""
    from stablemoe_ds.launch.environment import read_launcher_environment

    rank, _, _ = read_launcher_environment()
    if rank == 0:
        print(json.dumps(facts, indent=1) if as_json else text)


if __name__ == "__main__":
    main()
