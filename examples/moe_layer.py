"""An MoE layer in a plain torch model, on one process. Both stages: learn a routing, freeze it, go on."""

import torch
from torch import nn

from stablemoe_ds import MoELayer

torch.manual_seed(1)
embed, head = nn.Embedding(100, 32), nn.Linear(32, 100)
moe = MoELayer(32, ffn_hidden_size=64, vocab_size=100, experts=4, top_k=1)
optimizer = torch.optim.AdamW([*embed.parameters(), *moe.parameters(), *head.parameters()], lr=1e-2)
for step in range(20):
    if step == 10:
        table = moe.freeze()  # from here on routes are a table of token ids
    ids = torch.randint(100, (8, 16))
    hidden, report = moe(embed(ids), ids)
    loss = nn.functional.cross_entropy(head(hidden).flatten(0, 1), (ids.flatten() + 1) % 100) + report.loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.4f}  tokens by expert {report.served_N.tolist()}")
print(f"table {table.sha256[:12]}: id 7 is served by expert {int(table.expert_LVK[0, 7, 0])}")
