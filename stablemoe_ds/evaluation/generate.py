"""Continue prompts, greedily or by nucleus sampling, along frozen routes and with a key-value cache."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.inference import inference
from stablemoe_ds.model.gpt import StableMoEGPT
from stablemoe_ds.routing.source import RouteSource


def generate(
    model: StableMoEGPT,
    prompts: Sequence[Sequence[int]],
    routes: RouteSource,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """New ids for each prompt, without the prompt and without the eos that ends it.

    A continuation ends at eos, after ``max_new_tokens``, or when prompt and continuation fill the model's
    ``sequence_length``. Prompts of unequal length go through the model together: what all of them have is read in
    one call, then one position at a time, where longer prompts still supply their own next id.

    temperature: 0 takes the best id; otherwise logits are divided by it. top_p: draw among the likeliest ids that
    together reach this probability. use_cache: False reads everything again for each id, which is slow and gives the
    same.
    seed: what is drawn for a prompt follows from it and from the prompt's own ids, whichever other prompts there are
    and in whichever order. Equal prompts have equal continuations; another seed gives another one. Scores of one prompt
    among several are those of it alone up to rounding.
    Under expert parallelism all ranks must call it together, with the same arguments.
    Raises UserError for a prompt or an option that cannot be used, and if the model computes NaN.
    """
    room = model.run_config.data.sequence_length
    _check(prompts, room, model.vocab_size, max_new_tokens, temperature, top_p, seed)
    if not prompts:
        return []
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    ends = [min(length + max_new_tokens, room) for length in lengths]
    length_B, end_B = torch.tensor(lengths, device=device), torch.tensor(ends, device=device)
    ids_BS = torch.zeros(len(prompts), max(ends), dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids_BS[row, : len(prompt)] = torch.tensor(prompt, device=device)

    # Ranks that exchange tokens must make as many calls: rounding may let one of them meet eos before another.
    alone = all(layer.ep_size == 1 for layer in model.moe_layers)
    done_B = length_B >= end_B
    reader = Reader(model, routes, cache_size=ids_BS.shape if use_cache else None)
    draws = [_random_of(prompt, seed) for prompt in prompts]
    with inference(model):
        for position in range(min(lengths), max(ends)):
            if alone and done_B.all():
                break
            free_B = position >= length_B
            drawing = [draw if free else None for draw, free in zip(draws, free_B.tolist(), strict=True)]
            chosen_B = choose(reader.next_logits(ids_BS[:, :position]), temperature, top_p, drawing)
            ids_BS[:, position] = torch.where(free_B, chosen_B, ids_BS[:, position])
            done_B |= free_B & ((chosen_B == eos_id) if eos_id is not None else False)
            done_B |= position + 1 >= end_B
    rows = [row[length:end] for row, length, end in zip(ids_BS.tolist(), lengths, ends, strict=True)]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


class Reader:
    """Feeds a growing batch of ids to the model, only what is new if there is a cache.

    cache_size: sequences and positions the key-value cache has room for; None: no cache.
    """

    def __init__(self, model: StableMoEGPT, routes: RouteSource, cache_size: Sequence[int] | None) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        self.model, self.routes = model, routes
        self.cache = StaticInferenceContext(*cache_size) if cache_size is not None else None

    def next_logits(self, ids_BS: Tensor) -> Tensor:
        """fp32 [B, V]: scores of the id that follows ``ids_BS``, which holds all ids from the first on.

        Raises UserError if a score is NaN or infinite.
        """
        sequences, length = ids_BS.shape
        read = self.cache.sequence_len_offset if self.cache is not None else 0
        # A frozen router may look back, so routes come from the whole history; then those of what is new are kept.
        new = {block: expert_TK[read * sequences :] for block, expert_TK in self.routes(ids_BS).items()}
        logits_BV = self.model.logits(ids_BS[:, read:], new, self.cache)[:, -1]
        if self.cache is not None:
            self.cache.sequence_len_offset = length
        if not torch.isfinite(logits_BV).all():
            row = int((~torch.isfinite(logits_BV)).any(dim=1).nonzero()[0])
            raise UserError(
                f"the model's scores after id {length} of prompt {row + 1} hold NaN or infinity: its weights are "
                "damaged or its precision overflows; use an earlier checkpoint, or precision.dtype=fp32"
            )
        return logits_BV


def _random_of(prompt: Sequence[int], seed: int) -> torch.Generator:
    """Random numbers for one prompt; they follow from its ids and the seed."""
    digest = hashlib.sha256(struct.pack(f"<{1 + len(prompt)}q", seed, *prompt)).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def choose(logits_BV: Tensor, temperature: float, top_p: float, draws: Sequence[torch.Generator | None]) -> Tensor:
    """int64 [B]: the best id at temperature 0 (the lowest of equals), otherwise a draw from the nucleus.

    draws: B sources of random numbers; None for a row in which nothing is to be drawn, so that no number is used up
    where a prompt still supplies the next id. The draw is made on the CPU in float64, so that a seed means the same on
    every device.
    """
    best_B = logits_BV.argmax(dim=-1)
    if temperature == 0:
        return best_B
    logits_BV = logits_BV.double()
    below_BV = logits_BV - logits_BV.max(dim=-1, keepdim=True).values  # a tiny temperature must not overflow
    share_BV = nucleus(torch.softmax(below_BV.cpu() / temperature, dim=-1), top_p)
    for row, draw in enumerate(draws):
        if draw is not None:
            best_B[row] = torch.multinomial(share_BV[row], 1, generator=draw)[0]
    return best_B


def nucleus(share_BV: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, V] cut to the fewest likeliest ids that together reach ``top_p``, and summing to 1 again.

    The likeliest id always stays; of equally likely ones the lower id goes first.
    """
    sorted_BV, order_BV = share_BV.sort(dim=-1, descending=True, stable=True)
    likelier_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    kept_BV = torch.where(likelier_BV < top_p, sorted_BV, 0.0)
    return torch.zeros_like(share_BV).scatter(-1, order_BV, kept_BV / kept_BV.sum(dim=-1, keepdim=True))


def _check(
    prompts: Sequence[Sequence[int]],
    room: int,
    vocab: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Raise UserError for what :func:`generate` cannot work with."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: expected 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}: expected 0 (always the best id) or more, such as 0.8")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: expected more than 0 and at most 1, such as 0.95")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: expected 0 to {2**63 - 1}")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"prompt {number} is empty: give at least one id, such as eos, which starts a new document")
        if len(prompt) > room:
            raise UserError(
                f"prompt {number} has {len(prompt)} ids, the model has {room} positions (data.sequence_length): "
                "shorten it"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(f"prompt {number} holds an id outside 0..{vocab - 1}: was it made by another tokenizer?")
