"""Every test runs offline, on one thread, with the core's shape annotations checked at each call."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("brief", max_examples=40, deadline=None, database=None)
settings.load_profile("brief")
# Not methods.base: beartype cannot check its protocol `Intervention`.
CORE = ("lowrank", "layers", "losses", "recording", "apply", "replay", "text", "methods.mend", "methods.finetune")
jaxtyping.install_import_hook([f"mendlm.{module}" for module in CORE], "beartype.beartype")
