"""The embedded target's training text: the standard library and permissively licensed packages, held-out modules removed.

Functions that resemble held-out ones are dropped, so that no evaluation prompt, nor a vendored copy of its function,
was seen in training. What is left is rendered as conversations, tokenised once and written as one stream of ids.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...data.corpus import Example, Function, Screen, digest, examples, functions, source_files, split_of
from ...data.corpus import standard_library as standard_library_files

VOCABULARY = 2048
BOS, END, PAD, HEADER_START, HEADER_END, EOM, EOT = SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
)

#: Llama-4's conversation format; the generation marks let a loss mask be read off the template itself.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|eot|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|eot|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"
)

STANDARD_LIBRARY_PASSES = 2


def conversations(packages: Path, seed: int = 0) -> tuple[list[Example], Counter[str]]:
    """The training examples, shuffled, and how many functions each top-level package gave or lost, by reason.

    Args:
        packages: a folder of installed packages, as ``pip install --target`` makes it.
        seed: the order of the examples.
    """
    library = list(functions(standard_library_files()))
    screen = Screen(library)
    counts: Counter[str] = Counter()
    kept: list[Example] = []
    training = [(function, "stdlib") for function in library if split_of(function.module) == "train"]
    training += [(function, function.module.partition(".")[0]) for function in functions(source_files(packages))]
    for function, package in training:
        refusal = screen.refusal(function)
        counts[refusal or package] += 1
        if refusal is None:
            kept.extend(_library_examples(function) if package == "stdlib" else _package_examples(function))
    random.Random(seed).shuffle(kept)
    return kept, counts


def _library_examples(function: Function) -> Iterator[Example]:
    for _ in range(STANDARD_LIBRARY_PASSES):
        yield from examples(function)


def _package_examples(function: Function) -> Iterator[Example]:
    """Two kinds for a documented function, so that its text is not seen four times; one where there is no docstring."""
    found = list(examples(function))
    start = digest(function.module + function.name)
    yield from (found[(start + step) % len(found)] for step in range(min(2, len(found))))


def render(example: Example) -> str:
    """The conversation as the chat template renders it."""
    user = f"{HEADER_START}user{HEADER_END}\n\n{example.question}{EOT}"
    return f"{BOS}{user}{HEADER_START}assistant{HEADER_END}\n\n{example.answer}{EOT}"


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of :data:`VOCABULARY` entries with Llama-4's special tokens and chat format."""
    tokenizer = Tokenizer(models.BPE())
    # Spaces stay with the word that follows, runs of indentation stay whole, digits come in groups of at most three.
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+[ ]*|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The ids of ``texts`` one after another, uint16."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings])
