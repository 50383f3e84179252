# %% [markdown]
# MEND beside fine-tuning on requests of your own, with a table and a page: `python examples/baseline.py --data zsre:FILE`.

# %% Requests, split by a hash of the prompt
import argparse
from pathlib import Path

import mendlm
from mendlm.report import find, table, write

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="starter")
parser.add_argument("--data", default="records:facts.jsonl")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
facts = mendlm.load_edits(options.data)
train, valid = facts.split(0.1) if len(facts.examples) > 100 else (facts, facts)

# %% Train MEND
model, tokenizer = mendlm.load(options.model)
specs = mendlm.default_layers(model)
mend = mendlm.Mend(specs, mendlm.MendConfig(rank=64))
config = mendlm.TrainConfig(steps=options.steps, batch_size=min(64, len(train.examples)), normalizer_examples=256)
mendlm.train(mend, model, tokenizer, train, config, "mend-run")

# %% Score both methods on the same requests
tuning = mendlm.FineTune(specs, mendlm.FineTuneConfig(steps=20))
for method in (mend, tuning):
    results = mendlm.evaluate(method, method.specs, model, tokenizer, valid, mendlm.EvaluationConfig(generate=False))
    results.save(f"scored/{method.name}")

# %% One table, and a page that needs nothing else
cells = find([Path("scored")])
write(cells, Path("report"))
print(table(cells))
