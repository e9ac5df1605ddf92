"""A small model learns a routing; one with experts four times as large follows the same table from the first step."""

import torch
from torch import nn

from stablemoe_ds import MoELayer

VOCAB = 100


class Model(nn.Module):
    def __init__(self, width: int, router: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB)
        self.moe = MoELayer(width, ffn_hidden_size=2 * width, vocab_size=VOCAB, experts=4, router=router)

    def train_on(self, steps: int) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        for _ in range(steps):
            ids = torch.randint(VOCAB, (8, 16))
            hidden, report = self.moe(self.embed(ids), ids)
            loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), (ids.flatten() + 1) % VOCAB)
            optimizer.zero_grad()
            (loss + report.loss).backward()
            optimizer.step()
        weights = sum(parameter.numel() for parameter in self.moe.layer.experts.parameters())
        print(f"{weights:,} weights in experts, loss {loss.item():.4f}")


torch.manual_seed(1)
small = Model(32, router="stablemoe")
small.train_on(steps=20)
table = small.moe.freeze()  # of a finished run: RoutingTable.read("runs/demo/routing_table.safetensors")

large = Model(64, router="hash")  # hash learns no routing; follow() gives it one
large.moe.follow(table)
large.train_on(steps=20)

ids = torch.arange(VOCAB)[None]
_, report = large.moe(large.embed(ids), ids)
same = report.expert_BSK[0, :, 0].numpy() == table.expert_LVK[0, :, 0]
print(f"table {table.sha256[:12]}: {same.mean():.0%} of the ids go to the expert that the small model chose")
