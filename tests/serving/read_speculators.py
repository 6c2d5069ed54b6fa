"""Runs in the engine's environment: the logits of a head in speculators' format, as that package computes them.

    python read_speculators.py HEAD TARGET GIVEN OUT

GIVEN holds ``features [T, F*H]``, ``next_ids [T]`` and the target's ``embedding [V, H]``; OUT gets ``[T, D]`` per step.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

STEPS = 3

head, target, given, out = sys.argv[1:]
states = load_file(given)
config = Eagle3SpeculatorConfig.from_pretrained(head)
config.transformer_layer_config._attn_implementation = "eager"
config.speculators_config.verifier.name_or_path = target
model = Eagle3DraftModel.from_pretrained(head, config=config).float().eval()
with torch.no_grad():
    # What the package leaves there is not initialised: the head's file has no embedding, as it is the target's.
    model.embed_tokens.weight.copy_(states["embedding"])
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: logits.append(output[0].clone()))
    ids = states["next_ids"][None]
    model(states["features"][None], ids, torch.zeros_like(ids), ttt_steps=STEPS)
save_file({"d2t": model.d2t, **{str(step): rows for step, rows in enumerate(logits)}}, out)
