"""The same on several processes that share the experts: torchrun --nproc_per_node 2 examples/moe_layer_on_several.py"""

import torch
from torch import nn

from stablemoe_ds import MoELayer, average_gradients, join_processes


class Model(nn.Module):
    """Any torch model: here an embedding, one MoE layer and an output."""

    def __init__(self, groups) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 32), nn.Linear(32, 100)
        self.moe = MoELayer(32, ffn_hidden_size=64, vocab_size=100, experts=4, groups=groups, seed=1)

    def forward(self, ids):
        hidden, report = self.moe(self.embed(ids), ids)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), (ids.flatten() + 1) % 100) + report.loss


def train(groups, steps: int = 10) -> list[float]:
    """The loss of each step, over all processes; each process reads its own rows of a batch of eight."""
    torch.manual_seed(1)  # what is not an expert has to start alike everywhere
    model = Model(groups).to(groups.world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        if step == steps // 2:
            model.moe.freeze()
        batch = torch.randint(100, (8, 16), device=groups.world.device)
        loss = model(batch[groups.world.rank :: groups.world.size])
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, groups)
        optimizer.step()
        losses.append(float(groups.sum_over_world(loss.detach())) / groups.world.size)
    return losses


if __name__ == "__main__":
    groups = join_processes(expert_parallel=2)
    losses = train(groups)
    if groups.world.is_main:
        print(*(f"{loss:.6f}" for loss in losses))
