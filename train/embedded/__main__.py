"""Rebuilds the embedded target: corpus, tokenizer, training, refinement, model card.

    make target            # installs the pinned packages, then runs this under torchrun with one process per core

Every step leaves its result in the work folder and is skipped where it stands, so an interrupted build goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import Llama4ForCausalLM, PreTrainedTokenizerFast

from ...configs.settings import TargetSettings
from ...data.chat import prompt_ids
from ...data.conversations import Conversation
from ...models.target import Target, load_target
from . import card, corpus, pretrain
from .refine import Refinement, refine

#: What was run for the weights that ship.
PRETRAINING = pretrain.Recipe(cycles=((800, 200), (600, 400), (500, 300)))
REFINEMENT = Refinement()
MAX_ANSWER = 160
TOKENIZER_TEXTS, QUESTIONS = 30000, 3000


def main() -> None:
    """Run the steps that are not done yet; only the first process writes."""
    parser = argparse.ArgumentParser(prog="python -m eagle3.train.embedded", description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, default=Path(".target/packages"), help="folder of installed packages")
    parser.add_argument("--work", type=Path, default=Path(".target"), help="folder of intermediate results")
    parser.add_argument("--out", type=Path, default=Path(".target/embedded"), help="folder of the finished model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        build_corpus(arguments.packages, arguments.work)
    _wait()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.work / "tokenizer")
    model = build_model(arguments.work, tokenizer)
    if first:
        save(model, tokenizer, arguments.out)
        target = load_target(TargetSettings(path=str(arguments.out)))
        quality = card.measure(target, card.held_out("test", 200))
        facts = json.loads((arguments.work / "corpus.json").read_text())
        card.write(arguments.out / "README.md", quality, facts, PRETRAINING, REFINEMENT)
    _wait()


def build_corpus(packages: Path, work: Path) -> None:
    """Write ``ids.npy``, ``tokenizer/``, ``questions.json`` and ``corpus.json`` (what was kept from where)."""
    if (work / "corpus.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    chosen, counts = corpus.conversations(packages)
    texts = [corpus.render(example) for example in chosen]
    tokenizer = corpus.train_tokenizer(iter(random.Random(0).sample(texts, TOKENIZER_TEXTS)))
    tokenizer.save_pretrained(work / "tokenizer")
    np.save(work / "ids.npy", corpus.encode(texts, tokenizer))
    (work / "questions.json").write_text(json.dumps([example.question for example in chosen[:QUESTIONS]]))
    size = sum(len(text.encode()) for text in texts)
    facts = {"conversations": len(texts), "bytes": size, "functions": counts.most_common()}
    (work / "corpus.json").write_text(json.dumps(facts, indent=1))


def build_model(work: Path, tokenizer: PreTrainedTokenizerFast) -> Llama4ForCausalLM:
    """The trained and refined model in fp32; both steps resume or are skipped."""
    ids = np.load(work / "ids.npy", mmap_mode="r")
    config = pretrain.configuration(
        len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    model = pretrain.initialise(config, PRETRAINING.seed)
    refined = work / "refined.pt"
    if refined.exists():
        model.load_state_dict(torch.load(refined))
        return model
    texts = [corpus.render(example) for example in card.held_out("validation", 400)]
    stream = torch.from_numpy(corpus.encode(texts, tokenizer).astype(np.int64))
    held_out = stream[: 60 * PRETRAINING.length + 1].unfold(0, PRETRAINING.length + 1, PRETRAINING.length)
    pretrain.pretrain(model, ids, PRETRAINING, work, held_out)
    target = Target(model, tokenizer, TargetSettings())
    asked = json.loads((work / "questions.json").read_text())
    questions = [
        prompt_ids(tokenizer, Conversation("", "", "train", [{"role": "user", "content": question}]))
        for question in asked
    ]

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        return [answer.ids for answer in target.generate(prompts, [0.0] * len(prompts), MAX_ANSWER)]

    with torch.compiler.set_stance("force_eager"):  # every step has a shape of its own
        refine(model, questions, ids, REFINEMENT, generate, work / "metrics.jsonl")
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(model.state_dict(), refined)
    return model


def save(model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (bf16), configuration, tokenizer and chat format as any engine reads them."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    described = folder / "tokenizer_config.json"
    settings = json.loads(described.read_text())
    settings = {key: value for key, value in settings.items() if key not in ("backend", "is_local", "local_files_only")}
    # The class name that every release of transformers knows; newer ones write a name that older engines refuse.
    described.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    (folder / "recipe.json").write_text(
        json.dumps({"pretraining": asdict(PRETRAINING), "refinement": asdict(REFINEMENT)}, indent=2) + "\n"
    )


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
