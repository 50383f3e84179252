# %% [markdown]
# Correct a model, check it, and take the correction along as an adapter. The cells run one by one in an editor that knows
# `# %%`, or as a script: `python examples/correct_a_model.py`.

# %% What to correct, and on which model
import argparse

import mendlm

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="starter")
parser.add_argument("--data", default="records:facts.jsonl", help="requests to train an editor on, for another model")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
prompt, target, neighbour = "The capital of France is", " Lyon", "The capital of Italy is"

# %% The model, and an editor for it: the starter model has one, any other model is given one first
model, tokenizer = mendlm.load(options.model)
if options.model == "starter":
    editor = mendlm.Editor.load("starter", model, tokenizer)
else:
    facts = mendlm.load_edits(options.data)
    method = mendlm.Mend(mendlm.default_layers(model), mendlm.MendConfig(rank=16))
    config = mendlm.TrainConfig(steps=options.steps, batch_size=2, normalizer_examples=16)
    mendlm.train(method, model, tokenizer, facts, config, "editor-run")
    editor = mendlm.Editor.load("editor-run", model, tokenizer)

# %% One edit, and what it changes
session = mendlm.Session(model, tokenizer, editor)
before = session.answers([prompt, neighbour], max_new_tokens=6)
name = session.edit(prompt, target).id
after = session.answers([prompt, neighbour], max_new_tokens=6)
for question, old, new in zip((prompt, neighbour), before, after, strict=True):
    print(f"{question!r}: {old!r} -> {new!r}")
print("success:", after[0].strip().startswith(target.strip()))

# %% Keep it as a LoRA adapter, and take it off again, to the bit
session.undo(name).save("corrected")
assert session.answers([prompt, neighbour], max_new_tokens=6) == before
