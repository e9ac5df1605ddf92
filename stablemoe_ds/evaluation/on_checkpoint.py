"""What a checkpoint's model does: how well it predicts a text, and how it continues one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stablemoe_ds.checkpoint.attached import check_corpora, find_corpora, open_tokenizer
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.batch_plan import batch_plan
from stablemoe_ds.config.rules import two_stages
from stablemoe_ds.config.schema import Source
from stablemoe_ds.data.run_data import EvalSet, eval_set
from stablemoe_ds.data.tokenizer import Tokenizer
from stablemoe_ds.distributed.groups import start_world, stop_world
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.generate import generate
from stablemoe_ds.evaluation.perplexity import Evaluation, evaluate, word_perplexity
from stablemoe_ds.evaluation.trained_model import TrainedModel
from stablemoe_ds.routing.source import RouteSource


@contextmanager
def loaded(checkpoint: Checkpoint, resident_experts: float = 1.0) -> Iterator[TrainedModel]:
    """The model of a checkpoint, alone or under a launcher. resident_experts: see :class:`TrainedModel`."""
    world = start_world(checkpoint.run.parallel.timeout_minutes)
    try:
        yield TrainedModel(checkpoint, world, resident_experts)
    finally:
        stop_world()


def eval_text(trained: TrainedModel, sources: Sequence[Source], max_tokens: int | None = None) -> EvalSet:
    """Prepared corpora in batches of this model. max_tokens: of them, from the start; None: all."""
    groups, length = trained.groups, trained.run.data.sequence_length
    return eval_set(sources, length, batch_plan(trained.run, groups.world.size).micro_batch, groups, max_tokens)


def evaluate_checkpoint(path: str, corpus: str | None) -> tuple[dict[str, Any], str]:
    """Perplexity of a checkpoint on a prepared corpus, or on its run's validation text: (facts, text).

    In stage 1 with the learned router and with the distilled one; in stage 2 along the frozen routes.
    Raises UserError if the corpus is not there or of another tokenizer.
    """
    checkpoint = Checkpoint.open(path)
    sources = [Source(path=corpus)] if corpus else find_corpora(checkpoint, checkpoint.run.data.valid)
    if not sources:
        raise UserError("the run names no validation text: name a prepared corpus with --data")
    check_corpora(checkpoint, sources)  # before anything slow begins
    with loaded(checkpoint) as trained:
        data = eval_text(trained, sources)

        def measure(routes: RouteSource) -> Evaluation:
            device = trained.groups.world.device
            return evaluate(trained.model, data.loader, routes, trained.groups.sum_over_data_ranks, device)

        routes, progress = trained.routes, trained.checkpoint.progress
        fixed = measure(routes)
        learned = measure(trained.learned) if progress.stage == 1 and two_stages(trained.run) else None
    shown = learned or fixed
    facts: dict[str, Any] = {
        "checkpoint": str(trained.checkpoint.path),
        "step": progress.step,
        "stage": progress.stage,
        "corpus": [source.path for source in sources],
        "tokens": shown.tokens,
        "loss": shown.loss,
        "perplexity": shown.perplexity,
        "perplexity_distilled": fixed.perplexity if learned else None,
        "word_perplexity": word_perplexity(shown, data.words) if data.words else None,
        "agreement": shown.agreement,
        "load": shown.load,
    }
    lines = [
        f"{facts['checkpoint']} (step {progress.step}, stage {progress.stage}) on {', '.join(facts['corpus'])}",
        f"perplexity      {shown.perplexity:.4f} a token, over {shown.tokens:,} tokens",
    ]
    if facts["word_perplexity"] is not None:
        lines.append(f"                {facts['word_perplexity']:.4f} a word, over {data.words:,} words")
    if learned:
        lines.append(f"distilled       {fixed.perplexity:.4f} a token; the routers agree on {shown.agreement or 0:.1%}")
    if shown.load:
        lines.append("max/mean load   " + ", ".join(f"{load:.2f}" for load in shown.load))
    return facts, "\n".join(lines)


def continue_prompts(
    path: str,
    prompts: Sequence[str],
    tokenizer_file: str | None = None,
    *,
    resident_experts: float = 1.0,
    note: Callable[[str], object] = lambda _: None,
    **options: Any,
) -> list[str]:
    """Continuations of prompts, as text; ``options`` go to ``generate``. An empty prompt starts a new document.

    tokenizer_file: instead of the one that the checkpoint carries. resident_experts: see :class:`TrainedModel`.
    note: is given a line on the experts that were fetched, where not all are in memory.
    Raises UserError for a prompt that is no text or longer than the model.
    """
    checkpoint = Checkpoint.open(path)
    tokenizer = open_tokenizer(checkpoint, tokenizer_file)
    ids = [_ids(tokenizer, number, prompt) for number, prompt in enumerate(prompts, 1)]
    with loaded(checkpoint, resident_experts) as trained:
        new = generate(trained.model, ids, trained.routes, eos_id=tokenizer.eos_id, **options)
        if trained.residency and trained.groups.world.is_main:
            note(str(trained.residency))
    # A model may have more ids than its tokenizer; those spell nothing.
    return [tokenizer.decode([i for i in part if i < tokenizer.vocab_size]) for part in new]


def _ids(tokenizer: Tokenizer, number: int, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt) or [tokenizer.eos_id]
    except UserError as error:
        raise UserError(f"prompt {number}: {error}") from error
