"""``stablemoe eval`` and ``stablemoe generate``: what needs a trained model."""

from __future__ import annotations

import argparse
import sys

from stablemoe_ds.commands.parsing import (
    Subparsers,
    add_command,
    json_argument,
    settle_libraries,
    tell,
    tokenizer_argument,
)


def add_to(commands: Subparsers) -> None:
    evaluation = add_command(commands, "eval", "perplexity of a checkpoint, every token counted once", _eval)
    evaluation.add_argument("checkpoint", help="checkpoint or run directory")
    evaluation.add_argument("--data", help="prepared corpus (path without ending); default: the run's validation text")
    json_argument(evaluation)

    generation = add_command(commands, "generate", "continue a prompt", _generate)
    generation.add_argument("checkpoint", help="checkpoint or run directory")
    tokenizer_argument(generation)
    generation.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    generation.add_argument("--tokens", type=int, default=64, help="new tokens at most (default 64)")
    generation.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    generation.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that reach this")
    generation.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the draw (default 0); it gives a prompt the same continuation, whatever other prompts there are",
    )
    generation.add_argument(
        "--resident-experts",
        type=float,
        default=1.0,
        metavar="F",
        help="keep this fraction of each MoE layer's experts in memory, and fetch the others from the checkpoint when "
        "tokens are about to need them (default 1: all in memory)",
    )
    generation.add_argument("--no-cache", action="store_true", help="read everything again for each token")
    json_argument(generation)


def _eval(arguments: argparse.Namespace) -> int:
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.evaluation.on_checkpoint import evaluate_checkpoint

    facts, text = evaluate_checkpoint(arguments.checkpoint, arguments.data)
    tell(facts, text, arguments.json)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    settle_libraries(arguments.checkpoint)
    from stablemoe_ds.evaluation.on_checkpoint import continue_prompts

    texts = continue_prompts(
        arguments.checkpoint,
        arguments.prompt,
        arguments.tokenizer,
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        use_cache=not arguments.no_cache,
        resident_experts=arguments.resident_experts,
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )
    pairs = list(zip(arguments.prompt, texts, strict=True))
    facts = [{"prompt": prompt, "continuation": text} for prompt, text in pairs]
    tell(facts, "\n---\n".join(prompt + text for prompt, text in pairs), arguments.json)
    return 0
