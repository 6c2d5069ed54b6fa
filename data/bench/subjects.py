"""What is recorded: the target that ships, with answers of its own, and Llamas of any size with random weights.

Shapes: H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from ...configs.loader import load
from ...configs.settings import RecordSettings, Settings, TargetSettings
from ...models.target import DTYPES, EMBEDDED, Target
from ...models.target_info import find_decoder
from ..answers import Answer, read_finished
from ..chat import prompt_ids
from ..conversations import Conversation
from ..corpus import examples, functions, standard_library
from ..files import encode_line, write_atomic
from ..planning import Batch, plan
from ..regenerate import regenerate

EVERY = 29  # of the questions about the standard library one is asked: neighbours are of one module
SAID = 7  # the token that a Llama with random weights always says
LOUD = 100.0  # what every token's embedding has in one place, so that one direction outweighs what random layers add


class Shape(NamedTuple):
    """A Llama's; ``inner`` is the width of its MLP."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int


#: 88m is 8b made small in proportion, its vocabulary too; the others have the shapes of Llama 3.2 and 3.1.
PRESETS = {
    "88m": Shape(768, 12, 2048, 12, 4, 8192),
    "1b": Shape(2048, 16, 8192, 32, 8, 128_256),
    "3b": Shape(3072, 28, 8192, 24, 8, 128_256),
    "8b": Shape(4096, 32, 14_336, 32, 8, 128_256),
}


class Subject(NamedTuple):
    """A target, what it said, and how that is recorded: ``shards`` of batches of the positions of ``answers``.

    ``bare`` is the model's decoder without any hook, with the same weights.
    """

    name: str
    target: Target
    bare: nn.Module
    answers: list[Answer]
    settings: RecordSettings
    shards: list[list[Batch]]

    @property
    def tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)

    def inputs(self) -> list[Tensor]:
        """What the bare decoder is given: the planned batches, padded on the right."""
        return [self._input(batch).to(self.target.device) for shard in self.shards for batch in shard]

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> None:
        """The bare decoder over all of ``inputs``; nothing is kept."""
        for input_BT in inputs:
            self.bare(input_ids=input_BT, use_cache=False)
        if self.target.device.type == "cuda":
            torch.cuda.synchronize()

    def flop_per_token(self) -> int:
        """Floating-point operations of its products with weights; transformers gives every token to every expert."""
        embedding = self.target.head.embedding.data_ptr()
        matrices = (weight for weight in self.bare.parameters() if weight.dim() > 1 and weight.data_ptr() != embedding)
        return 2 * sum(weight.numel() for weight in matrices)

    def _input(self, batch: Batch) -> Tensor:
        rows = [torch.tensor(self.answers[sample].ids) for sample in batch]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def embedded(device: str, conversations: int) -> Subject:
    """The demo's target and recipe, and what it answers to questions about the standard library."""
    recipe = load("tiny", [])
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    target, bare = _target(model, device, recipe.target)
    with tempfile.TemporaryDirectory() as folder:
        asked = islice(_questions(recipe, target), conversations)
        path = Path(folder) / "conversations" / "prompts.jsonl"
        path.parent.mkdir()
        write_atomic(path, b"".join(encode_line(question._asdict()) for question in asked))
        regenerate(recipe, Path(folder), target)
        answers = list(read_finished(path.parent, target.info.vocab_size))
    return _subject("embedded, float32", target, bare, answers, recipe.record)


def llama(shape: Shape, device: str, dtype: str, tokens: int, batch_tokens: int) -> Subject:
    """A Llama with random weights that always says the same, so that its greedy answers are known without decoding.

    Lengths are drawn as those of MT-bench's questions with their answers; a third of the answers are greedy.
    """
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = LOUD
        model.get_output_embeddings().weight[:, 0] = 0.0
        model.get_output_embeddings().weight[SAID, 0] = 1.0
    target, bare = _target(model, device, TargetSettings(path="random", dtype=dtype))
    record = RecordSettings(batch_tokens=batch_tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = f"Llama of {parameters / 1e6:,.0f} M parameters, {shape.layers} x {shape.hidden}, {dtype}"
    return _subject(name, target, bare, random_answers(shape.vocabulary, tokens), record)


def _target(model: PreTrainedModel, device: str, settings: TargetSettings) -> tuple[Target, nn.Module]:
    """The target, and its decoder as it was before hooks were put into it."""
    nn.Module.to(model, device).requires_grad_(False)
    shared = {id(parameter): parameter for parameter in model.parameters()}
    bare = find_decoder(copy.deepcopy(model, shared).eval(), settings.path)
    return Target(model, AutoTokenizer.from_pretrained(EMBEDDED), settings), bare


def _subject(name: str, target: Target, bare: nn.Module, answers: list[Answer], settings: RecordSettings) -> Subject:
    """With as many shards as a long recording has in flight, and some more."""
    tokens = sum(len(answer.ids) for answer in answers)
    settings = replace(settings, shard_tokens=min(settings.shard_tokens, max(1, tokens // 6)))
    return Subject(name, target, bare, answers, settings, plan([len(answer.ids) for answer in answers], settings))


def _questions(recipe: Settings, target: Target) -> Iterator[Conversation]:
    asked = (example for function in functions(standard_library()) for example in examples(function))
    for example in islice(asked, 0, None, EVERY):
        messages = [{"role": "user", "content": example.question}]
        question = Conversation(example.id, example.kind, example.split, messages)
        if len(prompt_ids(target.tokenizer, question)) <= recipe.prepare.max_prompt_tokens:
            yield question


def random_answers(vocabulary: int, tokens: int) -> list[Answer]:
    """Conversations of ``tokens`` in all, of random tokens but for what is said greedily."""
    random = np.random.default_rng(0)
    answers = list[Answer]()
    for number in count():
        if tokens <= 0:
            break
        prompt, said = int(random.lognormal(4.2, 0.8)) + 1, min(1024, int(random.lognormal(5.5, 0.7)) + 1)
        temperature = (0.0, 0.7, 1.0)[number % 3]
        ids, turns = random.integers(vocabulary, size=prompt + said), [[prompt, prompt + said]]
        if temperature == 0.0:
            ids[prompt:] = SAID
        answers.append(Answer(str(number), "random", "train", temperature, ids.tolist(), turns, "stop", True))
        tokens -= len(ids)
    return answers
