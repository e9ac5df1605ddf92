"""Look into a routing table: python examples/routing_table.py runs/demo/routing_table.safetensors"""

import sys

from stablemoe_ds import RoutingTable

table = RoutingTable.read(sys.argv[1])
layers, vocab, top_k = table.expert_LVK.shape
print(f"{layers} MoE layers, {vocab} ids, {top_k} of {table.experts} experts each; sha256 {table.sha256[:12]}")
for block, rows in zip(table.blocks, table.expert_LVK, strict=True):
    served = int((rows == 0).any(axis=1).sum())
    print(f"block {block}: expert 0 serves {served} ids; id 7 goes to {rows[7].tolist()}")
