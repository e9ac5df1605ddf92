"""The ``stablemoe`` command: parse, load configuration, call one function. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stablemoe_ds.errors import UserError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 bad input, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.call(arguments)
    except UserError as error:
        sys.stdout.flush()
        print(_error_text(error), file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.stdout.flush()
    sys.exit(code)


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
    evaluation.add_argument("--json", action="store_true")

    generation = _add(commands, "generate", "continue a prompt", _generate)
    generation.add_argument("checkpoint", help="checkpoint or run directory")
    generation.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    generation.add_argument("--tokens", type=int, default=64, help="new tokens at most (default 64)")
    generation.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    generation.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that reach this")
    generation.add_argument("--seed", type=int, default=0)
    generation.add_argument("--no-cache", action="store_true", help="read everything anew for each token")
    generation.add_argument("--json", action="store_true")

    routing = commands.add_parser("routing", help="what was learned about routing").add_subparsers(
        required=True, metavar="report|table"
    )
    report = _add(routing, "report", "load, fluctuation, agreement, what each expert serves", _routing_report)
    report.add_argument("checkpoint", help="checkpoint or run directory")
    report.add_argument("--json", action="store_true")
    report.add_argument("--png", type=Path, help="draw the report, too")
    table = _add(routing, "table", "the frozen routing table itself", _routing_table)
    table.add_argument("checkpoint", help="checkpoint or run directory, or a table file")
    table.add_argument("--output", type=Path, help="write the table as a safetensors file of its own")
    table.add_argument("--json", action="store_true")

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
        sub.add_argument("--json", action="store_true")

    doctor = _add(commands, "doctor", "what this machine has, and what would fail", _doctor)
    doctor.add_argument("--json", action="store_true")
    return parser


def _add(commands: Any, name: str, text: str, call: Command) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(call=call)
    return parser


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. schedule.steps=100")


def _data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="from text to training data").add_subparsers(
        required=True, metavar="tokenizer|prepare"
    )
    tokenizer = _add(data, "tokenizer", "learn a sentencepiece tokenizer from text files", _tokenizer)
    tokenizer.add_argument("files", nargs="+", type=Path)
    tokenizer.add_argument("--output", type=Path, required=True, help="the .model file to write")
    tokenizer.add_argument("--vocab-size", type=int, required=True)
    tokenizer.add_argument("--kind", choices=("unigram", "bpe"), default="unigram")
    tokenizer.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk>")
    prepare = _add(data, "prepare", "text files to Megatron's .bin/.idx", _prepare)
    prepare.add_argument("files", nargs="+", type=Path)
    prepare.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    prepare.add_argument("--output", type=Path, required=True, help="path without ending")
    prepare.add_argument(
        "--documents", choices=("file", "line", "wiki"), default="file", help="what ends a document (default: the file)"
    )
    prepare.add_argument("--workers", type=int, default=os.cpu_count() or 1)


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
    info = prepare(arguments.files, tokenizer, arguments.output, arguments.workers, arguments.documents)
    print(f"wrote {info.prefix}.bin/.idx: {info.documents:,} documents, {info.tokens:,} tokens, {info.words:,} words")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.config.rules import check

    run = load_run(arguments.run, arguments.overrides)
    check(run)
    _settle()
    from stablemoe_ds.training.groups import start_world, stop_world
    from stablemoe_ds.training.trainer import train

    world = start_world(run.parallel.timeout_minutes)
    try:
        train(run, world)
    finally:
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


def _config_check(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.config.load import load_run
    from stablemoe_ds.config.report import render, report, smallest_world
    from stablemoe_ds.config.rules import check

    run = load_run(arguments.run, arguments.overrides)
    world = arguments.world_size or smallest_world(run)
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


def _doctor(arguments: argparse.Namespace) -> int:
    from stablemoe_ds.launch.doctor import examine, render

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
