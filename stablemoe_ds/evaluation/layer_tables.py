"""Which layers of a trained model may become tables: how much of their routing ids explain, and what freezing costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stablemoe_ds.checkpoint.attached import check_corpora, find_corpora
from stablemoe_ds.checkpoint.reader import Checkpoint
from stablemoe_ds.config.schema import Source
from stablemoe_ds.config.text_table import aligned
from stablemoe_ds.data.run_data import EvalSet
from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.observed_routes import origin_of, served_by_id
from stablemoe_ds.evaluation.on_checkpoint import eval_text, loaded
from stablemoe_ds.evaluation.perplexity import Evaluation, evaluate
from stablemoe_ds.evaluation.trained_model import TrainedModel
from stablemoe_ds.progress_bar import progress_bar
from stablemoe_ds.routing.fixed import TableRouting
from stablemoe_ds.routing.source import RouteSource
from stablemoe_ds.tables.builders import how_made
from stablemoe_ds.tables.observed import explained, observed_table
from stablemoe_ds.tables.table import RoutingTable


def distil_layers(
    path: str, text: Sequence[str], held_out: Sequence[str], max_load: float | None
) -> tuple[dict[str, Any], RoutingTable]:
    """What each layer that learns would be as a table: (facts, the tables of these layers).

    A layer's table sends an id where the layer sends it most often in ``text`` (the run's training text if none is
    named; max_load: see :func:`observed_table`). On ``held_out`` (the run's validation text) the model is measured with
    no layer frozen, with each one alone frozen to its table, and with all of them.
    Raises UserError for a model in which no layer learns, and for a corpus that is missing or of another tokenizer.
    """
    checkpoint = Checkpoint.open(path)
    moe = checkpoint.run.moe
    if not moe.facts.routed or not moe.learned_layers or checkpoint.progress.stage == 2:
        raise UserError(
            f"checkpoint {checkpoint.path} (moe.router {moe.router}, stage {checkpoint.progress.stage}) has no MoE "
            "layer that chooses by a learned router: there is nothing to distil"
        )
    watched, measured = _corpora(checkpoint, text, held_out)
    with loaded(checkpoint) as trained:
        validation = eval_text(trained, measured)
        served_LVN, held_out_LVN = (served_by_id(trained, text) for text in (eval_text(trained, watched), validation))
        made = how_made("observed", options={"max_load": max_load}, **origin_of(checkpoint, watched))
        expert_LVK = observed_table(served_LVN, moe.top_k, max_load)
        table = RoutingTable(expert_LVK, moe.experts, tuple(moe.layers), checkpoint.tokenizer, made)
        none, *alone, everything = _perplexities(trained, table.only(moe.learned_layers), validation)
    shares, held_out_shares = explained(served_LVN, expert_LVK), explained(held_out_LVN, expert_LVK)
    loads = [
        table.only([b]).expert_load(served_VN.sum(1)).max() for b, served_VN in zip(moe.layers, served_LVN, strict=True)
    ]
    facts = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.progress.step,
        "watched": [source.path for source in watched],
        "held_out": [source.path for source in measured],
        "tokens": none.tokens,
        "perplexity": none.perplexity,
        "layers": [
            {
                "block": block,
                "explained": shares[row],
                "explained_held_out": held_out_shares[row],
                "max_load": float(loads[row]),
                "perplexity": outcome.perplexity,
            }
            for block, outcome in zip(moe.learned_layers, alone, strict=True)
            for row in [moe.layers.index(block)]
        ],
        "perplexity_all_frozen": everything.perplexity,
    }
    return facts, table.only(moe.learned_layers)


def _corpora(checkpoint: Checkpoint, text: Sequence[str], held_out: Sequence[str]) -> tuple[list[Source], list[Source]]:
    """The named ones, or those of the run. Raises UserError if one is missing or of another tokenizer."""
    data = checkpoint.run.data
    watched, measured = (
        [Source(path=name) for name in named] or find_corpora(checkpoint, of_run)
        for named, of_run in ((text, data.train), (held_out, data.valid))
    )
    if not measured:
        raise UserError("the run names no validation text: name a prepared corpus with --heldout")
    check_corpora(checkpoint, [*watched, *measured])
    return watched, measured


def _perplexities(trained: TrainedModel, table: RoutingTable, text: EvalSet) -> list[Evaluation]:
    """With no layer of the table frozen, with each one alone, and with all; others do what they did in training."""
    groups, followed, outcomes = trained.groups, trained.trained_with.table, []
    with progress_bar("models", len(table.blocks) + 2) as done:
        for blocks in ((), *((block,) for block in table.blocks), table.blocks):
            routes: RouteSource = trained.trained_with
            if blocks:
                frozen = table.only(blocks) if followed is None else table.only(blocks).joined_to(followed)
                routes = TableRouting(frozen, groups.world.device)
            sums = groups.sum_over_data_ranks
            outcomes.append(evaluate(trained.model, text.loader, routes, sums, groups.world.device))
            done(1)
    return outcomes


def layers_text(facts: dict[str, Any]) -> str:
    """The facts for a person."""

    def cost(perplexity: float) -> list[str]:
        return [f"{perplexity:.3f}", f"{perplexity / facts['perplexity'] - 1:+.2%}"]

    rows = [["frozen to a table", "ids explain", "held out", "max/mean load", "perplexity", ""]]
    rows.append(["none", "", "", "", f"{facts['perplexity']:.3f}", ""])
    for layer in facts["layers"]:
        shares = [f"{layer[name]:.1%}" for name in ("explained", "explained_held_out")]
        rows.append([f"block {layer['block']}", *shares, f"{layer['max_load']:.2f}", *cost(layer["perplexity"])])
    if len(facts["layers"]) > 1:
        rows.append(["all of these", "", "", "", *cost(facts["perplexity_all_frozen"])])
    return "\n".join(
        [
            f"{facts['checkpoint']} (step {facts['step']}), watched on {', '.join(facts['watched'])};",
            f"perplexity over {facts['tokens']:,} tokens of {', '.join(facts['held_out'])}",
            aligned(rows, right=(1, 2, 3, 4, 5)),
        ]
    )
