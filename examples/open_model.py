"""Open a trained model and ask it: python examples/open_model.py runs/demo"""

import sys

import stablemoe_ds

model = stablemoe_ds.open_model(sys.argv[1])
print(model.generate("def wrap(", max_new_tokens=20)[0])

ids = model.tokenizer.encode("def wrap(")
best = model.logits(ids)[0, -1].argmax()
print("the likeliest id after it:", int(best), repr(model.tokenizer.decode([int(best)])))
for layer, experts in enumerate(model.routes(ids)):
    print("layer", layer, "sends its ids to experts", experts.flatten().tolist())
