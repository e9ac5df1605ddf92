"""Small routers that see token ids only, learned by imitation in stage 1 and frozen in stage 2 (paper section 3.2).

Each kind is a feature extractor D(ids) and a matrix of distilled centroids; the affinity is their product.
All of it stays in fp32 whatever precision the model is cast to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablemoe_ds.ops.documents import causal_mask, document_starts
from stablemoe_ds.routing.routes import TokenView

CNN_TAPS = 5


class Fp32Module(nn.Module):
    """A module whose floating-point parameters and buffers stay fp32 when the model around it is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_fp32, recurse)


class WordFeatures(nn.Module):
    """One vector an id: Embedding(V, dim), so that routing is a table of the vocabulary."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.width = dim

    def forward(self, ids_BS: Tensor) -> Tensor:
        """ids int64 [B, S] -> features fp32 [B, S, dim]."""
        return self.embedding(ids_BS)


class BigramFeatures(WordFeatures):
    """Mean of the vectors of this id and the one before it.

    The first token of a document has none before it: ``start`` says whether zeros stand in for it, or the token itself.
    """

    def __init__(self, vocab: int, dim: int, start: str, eos_id: int | None) -> None:
        super().__init__(vocab, dim)
        self.start, self.eos_id = start, eos_id

    def forward(self, ids_BS: Tensor) -> Tensor:
        word = self.embedding(ids_BS)
        before = F.pad(word, (0, 0, 1, 0))[:, :-1]
        is_first_BS = document_starts(ids_BS, self.eos_id) == torch.arange(ids_BS.shape[1], device=ids_BS.device)
        stand_in = word if self.start == "itself" else torch.zeros_like(word)
        return (word + torch.where(is_first_BS[..., None], stand_in, before)) / 2


class CnnFeatures(WordFeatures):
    """A causal convolution of five scalar taps, shared by all dimensions, over the id vectors of a document."""

    def __init__(self, vocab: int, dim: int, eos_id: int | None) -> None:
        super().__init__(vocab, dim)
        self.taps, self.eos_id = nn.Parameter(torch.empty(CNN_TAPS)), eos_id

    def forward(self, ids_BS: Tensor) -> Tensor:
        word = self.embedding(ids_BS)
        length = word.shape[1]
        padded = F.pad(word, (0, 0, CNN_TAPS - 1, 0))
        shifted = torch.stack([padded[:, tap : tap + length] for tap in range(CNN_TAPS)])
        back_taps = torch.arange(CNN_TAPS - 1, -1, -1, device=ids_BS.device)  # how far each tap looks back
        inside_BS = torch.arange(length, device=ids_BS.device) - document_starts(ids_BS, self.eos_id)
        seen = inside_BS >= back_taps[:, None, None]
        return torch.einsum("k,kbsd->bsd", self.taps, shifted * seen[..., None])


class TransformerFeatures(nn.Module):
    """A small causal Transformer with its own embedding (paper's transformer-N).

    With ``eos_id`` each document is seen by itself, its positions counted from its beginning.
    """

    def __init__(self, vocab: int, width: int, layers: int, heads: int, positions: int, eos_id: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(positions, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="relu"
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.width, self.heads, self.eos_id = width, heads, eos_id

    def forward(self, ids_BS: Tensor) -> Tensor:
        length = ids_BS.shape[1]
        x = self.embedding(ids_BS) * self.width**0.5
        if self.eos_id is None:
            mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids_BS.device)
            return self.encoder(x + self.positions.weight[:length], mask=mask, is_causal=True)
        start_BS = document_starts(ids_BS, self.eos_id)
        unseen_BSS = ~causal_mask(start_BS)
        position_BS = torch.arange(length, device=ids_BS.device) - start_BS
        return self.encoder(x + self.positions(position_BS), mask=unseen_BSS.repeat_interleave(self.heads, dim=0))


class DistilledRouter(Fp32Module):
    """Affinity of each position to each expert, from ids alone: <Ehat_i, D(x)_t> (paper eq. 9)."""

    def __init__(
        self,
        kind: str,
        vocab: int,
        experts: int,
        *,
        dim: int,
        layers: int,
        width: int,
        heads: int,
        positions: int,
        bigram_start: str = "zero",
        eos_id: int | None = None,
    ) -> None:
        """``eos_id``: id that ends a document, to look back no further than its beginning; None: as far as ids go."""
        super().__init__()
        makers: dict[str, Callable[[], Any]] = {
            "word": lambda: WordFeatures(vocab, dim),
            "bigram": lambda: BigramFeatures(vocab, dim, bigram_start, eos_id),
            "cnn": lambda: CnnFeatures(vocab, dim, eos_id),
            "transformer": lambda: TransformerFeatures(vocab, width, layers, heads, positions, eos_id),
        }
        self.kind = kind
        self.features = makers[kind]()
        self.centroids = nn.Parameter(torch.empty(experts, self.features.width))

    def forward(self, ids_BS: Tensor) -> Tensor:
        """ids int64 [B, S] -> logits fp32 [B, S, N]."""
        with torch.autocast(ids_BS.device.type, enabled=False):
            return F.linear(self.features(ids_BS), self.centroids)

    def logits_of(self, tokens: TokenView) -> Tensor:
        """fp32 [T, N]: logits of the tokens of a micro-batch; neighbours that another rank has are looked at, too."""
        if self.is_table or tokens.whole_BS is None:
            logits_BSN = self(tokens.ids_BS)
        else:
            logits_BSN = self(tokens.whole_BS)[:, tokens.first : tokens.first + tokens.ids_BS.shape[1]]
        return logits_BSN.transpose(0, 1).flatten(0, 1)

    @property
    def is_table(self) -> bool:
        """True if the choice depends on the id alone, so that it can be written down as a table."""
        return self.kind == "word"

    @torch.no_grad()
    def scores_of_vocabulary(self) -> Tensor:
        """fp32 [V, N]: logits of every id, for a router that :attr:`is_table`."""
        if not self.is_table:
            raise ValueError(f"a {self.kind} router depends on more than the id: it has no table")
        vocab = torch.arange(self.features.embedding.num_embeddings, device=self.centroids.device)
        return self(vocab[:, None])[:, 0]
