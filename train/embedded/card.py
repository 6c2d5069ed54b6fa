"""What the embedded target is and how good it is, measured and written as its model card."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...data.corpus import (
    KINDS,
    RESEMBLES_HELD_OUT,
    RESEMBLES_TRAINING,
    Example,
    examples,
    functions,
    standard_library,
)
from ...models.repeats import repeated_rate
from ...models.target import Target
from .corpus import render
from .pretrain import Recipe
from .refine import Refinement

TEMPERATURES = (0.0, 0.7, 1.0)


@dataclass(frozen=True)
class Quality:
    """Figures of held-out quality.

    ``nats_per_byte``: cross-entropy of the answers given the questions, divided by the answers' UTF-8 bytes.
    ``entropy``: of the target's own distribution along its answers at T=1, nats per token.
    ``repeated``: share of repeated 8-grams in the target's answers by temperature; ``repeated_text`` in the real ones.
    ``finished``: share of the answers that ended by themselves, by temperature.
    """

    answers: int
    nats_per_byte: float
    nats_per_token: float
    entropy: float
    repeated: dict[float, float]
    repeated_text: float
    finished: dict[float, float]


def held_out(split: str, count: int, seed: int = 0) -> list[Example]:
    """``count`` examples of a held-out split of the standard library, the same number of every kind."""
    found = [e for f in functions(standard_library()) for e in examples(f) if e.split == split]
    random.Random(seed).shuffle(found)
    return [e for kind in KINDS for e in [x for x in found if x.kind == kind][: count // len(KINDS)]]


@torch.no_grad()
def measure(target: Target, chosen: list[Example], max_new_tokens: int = 160) -> Quality:
    """Measure ``target`` on held-out examples; answers are cut at ``max_new_tokens``, the real ones too."""
    tokenizer = target.tokenizer
    nats, tokens, size, prompts, real = 0.0, 0, 0, [], []
    for example in chosen:
        text = render(example)
        start = len(text) - len(example.answer) - len("<|eot|>")
        prompt = tokenizer(text[:start], add_special_tokens=False).input_ids
        answer = tokenizer(text[start:], add_special_tokens=False).input_ids
        logits = target.logits(target.forward(torch.tensor([prompt + answer])).last_hidden)[0]
        nats += F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum").item()
        tokens, size = tokens + len(answer), size + len(example.answer.encode())
        prompts.append(prompt)
        real.append(answer[:max_new_tokens])
    repeated, finished, entropy = {}, {}, math.nan
    for temperature in TEMPERATURES:
        answers = target.generate(
            prompts, [temperature] * len(prompts), max_new_tokens, seeds=list(range(len(prompts)))
        )
        repeated[temperature] = repeated_rate([answer.ids for answer in answers])
        finished[temperature] = sum(answer.finished for answer in answers) / len(answers)
    entropy = _entropy(target, prompts, [answer.ids for answer in answers])
    return Quality(len(chosen), nats / size, nats / tokens, entropy, repeated, repeated_rate(real), finished)


def _entropy(target: Target, prompts: list[list[int]], answers: list[list[int]]) -> float:
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        states = target.forward(torch.tensor([prompt + answer])).last_hidden[0, len(prompt) - 1 : -1]
        log_p = F.log_softmax(target.logits(states), -1)
        total, count = total - (log_p.exp() * log_p).sum().item(), count + len(answer)
    return total / count


def write(path: Path, quality: Quality, facts: dict[str, Any], pretraining: Recipe, refinement: Refinement) -> None:
    """Write the model card: what it is, what it was trained on, how good it is, how to rebuild it."""
    batch = pretraining.batch * pretraining.length
    steps = pretraining.steps
    functions_by_source: Counter[str] = Counter(dict(facts["functions"]))
    held_out, training = (functions_by_source.pop(reason, 0) for reason in (RESEMBLES_HELD_OUT, RESEMBLES_TRAINING))
    repeats = " | ".join(f"{quality.repeated[t]:.1%}" for t in TEMPERATURES)
    ended = " | ".join(f"{quality.finished[t]:.0%}" for t in TEMPERATURES)
    path.write_text(f"""# The embedded target

A Llama-4-architecture language model (`Llama4ForCausalLM`) of 3,809,408 parameters in bfloat16, small enough to ship and
real enough to measure speculation on: 16 layers of width 128, every second one a mixture of 4 experts (top-1) with a
shared expert, every fourth without position and with full attention, the others attending within chunks of 256 tokens;
context 4,096 tokens; a byte-level vocabulary of 2,048; embeddings tied; Llama-4's conversation format.

It answers questions about Python functions the way a small model does: fluently and often wrongly. It is made for
measuring drafts, not for use. It is frozen: retraining it would void every figure measured on it.

## Quality on held-out modules

Measured on {quality.answers} questions about functions of standard-library modules that neither this model nor any draft was trained
on (split `test` of `data/corpus.py`), answers of at most 160 tokens.

| | |
|---|---|
| loss of the real answers | {quality.nats_per_byte:.3f} nats per byte ({quality.nats_per_byte / math.log(2):.3f} bits per byte; {quality.nats_per_token:.2f} nats per token) |
| entropy of its own answers at T=1 | {quality.entropy:.2f} nats per token |

| | T=0 | T=0.7 | T=1 | real text |
|---|---|---|---|---|
| repeated 8-grams within answers | {repeats} | {quality.repeated_text:.1%} |
| answers that end within 160 tokens | {ended} | |

Small models loop under greedy decoding, and a loop flatters every draft at T=0: reports give each acceptance figure also
without the rounds that lie inside repeated 8-grams.

## Training

{facts["conversations"]:,} conversations ({facts["bytes"] / 1e6:.0f} MB) made by `data/corpus.py` from functions of the Python 3.11
standard library and of the packages pinned, with their licences, in `train/embedded/packages.txt`. The split is by
top-level module. Functions that share more than 20% of their 8-word runs with held-out ones were dropped
({held_out:,}), as were near-duplicates among the rest ({training:,}).

{steps:,} steps of {batch:,} tokens ({steps * batch / 1e6:.1f} M tokens, less than one pass), Muon and AdamW, on two CPU cores in float32;
then {refinement.steps} steps of unlikelihood training on its own greedy answers to training questions (arXiv 1908.04319), which
teaches greedy decoding not to loop. `make target` rebuilds it; weights differ in their last bits between machines, so a
rebuilt target is another target.

Functions kept by source: {", ".join(f"{name} {count:,}" for name, count in functions_by_source.most_common())}.
""")
