"""The same on two processes that share the experts: torchrun --nproc_per_node 2 examples/moe_layer_on_several.py 2"""

import sys

import torch
from torch import nn

from stablemoe_ds import MoELayer, average_gradients, join_processes

groups = join_processes(expert_parallel=int(sys.argv[1]))
rank, size, device = groups.world.rank, groups.world.size, groups.world.device
torch.manual_seed(1)  # all that is not an expert has to start equal on every process
embed, head = nn.Embedding(100, 32).to(device), nn.Linear(32, 100).to(device)
moe = MoELayer(32, ffn_hidden_size=64, vocab_size=100, experts=4, groups=groups, seed=1).to(device)
model = nn.ModuleList([embed, moe, head])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for step in range(10):
    if step == 5:
        table = moe.freeze()
    ids = torch.randint(100, (8, 16), device=device)[rank::size]  # this process's rows of a batch of eight
    hidden, report = moe(embed(ids), ids)
    loss = nn.functional.cross_entropy(head(hidden).flatten(0, 1), (ids.flatten() + 1) % 100) + report.loss
    optimizer.zero_grad()
    loss.backward()
    average_gradients(model, groups)
    optimizer.step()
    losses.append(float(groups.sum_over_world(loss.detach())) / size)
if groups.world.is_main:
    print(*(f"{loss:.6f}" for loss in losses))
