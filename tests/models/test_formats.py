"""Every format read back as its engine reads it is the head that was trained; every known way to go wrong is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.models.draft import Eagle3Draft
from eagle3.models.engines import Files, read_files
from eagle3.models.formats import FORMATS, Origin, check, write
from torch import Tensor

from .conftest import random_draft

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
TARGET = {"name": "maverick", "revision": None, "weights_sha256": "ab", "num_layers": 48, "dtype": "bfloat16"}
ORIGIN = Origin(TARGET, {"step": 10}, 3)


def written(name: str, draft: Eagle3Draft) -> Files:
    return write(name, draft, torch.float32, ORIGIN, "heads/mine")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": 17}])
def test_every_format_says_what_was_trained(name: str, changes: dict[str, Any]) -> None:
    draft = random_draft(**changes)
    assert check(name, written(name, draft), draft, ORIGIN) == []


@pytest.mark.parametrize("name", ["hf", "vllm", "sglang", "trtllm", "speculators"])
@pytest.mark.parametrize("flag", ["fc_norm", "norm_output"])
def test_flags_of_eagle_3_1_are_said(name: str, flag: str) -> None:
    draft = random_draft(**{flag: True})
    files = written(name, draft)
    assert check(name, files, draft, ORIGIN) == []
    assert any(f"it reads {flag} as True" in fault for fault in check(name, files, random_draft(), ORIGIN))


@pytest.mark.parametrize("name", ["hf", "vllm", "speculators"])
def test_a_normed_residual_is_said(name: str) -> None:
    draft = random_draft(norm_before_residual=True)
    assert check(name, written(name, draft), draft, ORIGIN) == []


@pytest.mark.parametrize(
    ("name", "flag", "others"),
    [
        ("sglang", "norm_before_residual", "hf, vllm, speculators"),
        ("trtllm", "norm_before_residual", "hf, vllm, speculators"),
        ("eagle", "fc_norm", "hf, vllm, sglang, trtllm, speculators"),
    ],
)
def test_engines_without_a_flag_are_refused(name: str, flag: str, others: str) -> None:
    with pytest.raises(UserError, match=f"is not known to run {flag}, .*; choose one of {others}$"):
        written(name, random_draft(**{flag: True}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"target_layers": (2, 23, 44)},
            r"it will capture the outputs of layers \[1, 23, 44\], .* trained on \[2, 23, 44\]; ",
        ),
        ({"head_dim": 8}, "it reads head_dim as 6, and the head was trained with 8; choose another format"),
    ],
)
def test_an_engine_that_goes_its_own_way_is_refused_other_heads(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"--format = eagle: SafeAILab EAGLE cannot run this head: {said}"):
        written("eagle", random_draft(**changes))


@pytest.mark.parametrize(
    ("name", "where", "ids"),
    [
        ("hf", (LAYER_IDS,), [2, 24, 45]),
        ("hf", ("eagle_config", LAYER_IDS), [1, 23, 44]),
        ("vllm", (LAYER_IDS,), [2, 24, 45]),
        ("sglang", ("eagle_config", LAYER_IDS), [1, 23, 44]),
        ("speculators", (LAYER_IDS,), [2, 24, 45]),
    ],
)
def test_layers_are_numbered_as_the_engine_numbers_them(name: str, where: tuple[str, ...], ids: list[int]) -> None:
    found: Any = written(name, random_draft()).config
    for key in where:
        found = found[key]
    assert found == ids


def test_tensorrt_llm_reads_them_in_its_options() -> None:
    assert written("trtllm", random_draft()).texts == {
        "trtllm.yaml": "speculative_config:\n  decoding_type: Eagle3\n  max_draft_len: 3\n"
        "  speculative_model: heads/mine\n  eagle3_layers_to_capture: [1, 23, 44]\n"
    }


# --- pitfalls, planted one by one

Plant = Callable[[Files], None]


def shift(files: Files) -> None:
    if LAYER_IDS in files.config:
        files.config[LAYER_IDS] = [layer - 1 for layer in files.config[LAYER_IDS]]
    else:
        inner = files.config["eagle_config"]
        inner[LAYER_IDS] = [layer + 1 for layer in inner[LAYER_IDS]]


def shift_in_options(files: Files) -> None:
    files.texts["trtllm.yaml"] = files.texts["trtllm.yaml"].replace("[1, 23, 44]", "[2, 24, 45]")


def absolute_ids(files: Files) -> None:
    files.tensors["d2t"] = files.tensors["d2t"] + torch.arange(5)


def without_tensor(name: str) -> Plant:
    return lambda files: files.tensors.__delitem__(name) if name in files.tensors else None


def without_key(*names: str) -> Plant:
    def plant(files: Files) -> None:
        for config in (files.config, files.config.get("transformer_layer_config", {})):
            for name in names:
                config.pop(name, None)

    return plant


def with_key(name: str, value: Any) -> Plant:
    return lambda files: files.config.__setitem__(name, value)


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    return lambda files: files.tensors.__setitem__(name, change(files.tensors[name]))


UNKNOWN = torch.zeros(2)
UNINITIALISED = "which it leaves uninitialised"
FATE = {"trtllm": "in whose place it takes the target's"}
PITFALLS: list[tuple[str, Plant, str]] = [
    (
        "vllm",
        shift,
        "it will capture the outputs of layers [0, 22, 43], and the head was trained on [1, 23, 44] (number",
    ),
    (
        "speculators",
        shift,
        "it will capture the outputs of layers [0, 22, 43], and the head was trained on [1, 23, 44]",
    ),
    (
        "sglang",
        shift,
        "it will capture the outputs of layers [2, 24, 45], and the head was trained on [1, 23, 44] (number",
    ),
    (
        "trtllm",
        shift_in_options,
        "it will capture the outputs of layers [2, 24, 45], and the head was trained on [1, 23",
    ),
    *[
        fault
        for name in FORMATS
        for fault in (
            (name, absolute_ids, "d2t holds target ids, and it adds the draft id to each: write target id - draft id"),
            (name, without_tensor("d2t"), "there is no d2t, so it takes draft ids for target ids"),
            (name, without_tensor("lm_head.weight"), f"there is no lm_head.weight, {FATE.get(name, UNINITIALISED)}"),
            (
                name,
                without_key("rope_theta", "rope_parameters"),
                "it reads rope_theta, which the file does not say, as 10000",
            ),
            (name, without_key("rms_norm_eps"), "it reads rms_norm_eps, which the file does not say, as 1e-06"),
            (name, without_key("eagle3_target"), "there is no eagle3_target: which target it was trained on"),
            (
                name,
                with_key("eagle3_target", TARGET | {"dtype": "float8"}),
                "eagle3_target.dtype is float8, and the target of this run has bfloat16",
            ),
            (
                name,
                with_tensor("norm.weight", lambda tensor: tensor[:4].clone()),
                "norm.weight has shape [4], and the head's is [24]",
            ),
            (
                name,
                with_tensor("norm.weight", lambda tensor: tensor.to(torch.int64)),
                "norm.weight has type torch.int64, and the head's is torch.float32",
            ),
            (name, with_tensor("fc.weight", lambda tensor: tensor.flip(1)), "fc.weight is not the head's"),
            (name, lambda files: files.tensors.update({"model.gate": UNKNOWN}), "it drops model.gate without a word"),
        )
    ],
    ("vllm", with_key("norm_before_residual", True), "it reads norm_before_residual as True, and the head was trained"),
    (
        "speculators",
        without_key("norm_before_residual"),
        "it reads norm_before_residual, which the file does not say, as",
    ),
    ("sglang", without_key("draft_vocab_size"), "there is no draft_vocab_size, without which it does not start"),
    ("vllm", with_key("norm_before_fc", True), "it reads norm_before_fc as True, and the head was trained with False"),
    ("sglang", with_key("norm_before_fc", True), "it reads norm_before_fc as True, and only False is known here"),
    (
        "vllm",
        with_key("layer_types", ["sliding_attention"]),
        "it reads layer_types as sliding_attention, and only full",
    ),
    ("vllm", with_key("norm_output", True), "it reads norm_output as True, and the head was trained with False"),
    ("vllm", with_key("head_dim", 3), "it reads head_dim as 3, and the head was trained with 6"),
    (
        "sglang",
        with_key("architectures", ["Eagle3LlamaForCausalLM"]),
        "architectures is ['Eagle3LlamaForCausalLM'], and",
    ),
    ("vllm", with_key("model_type", "llama4"), "model_type is llama4, and a head is a llama"),
    (
        "vllm",
        with_key("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        "it reads a RoPE of type linear, and a head has the plain one",
    ),
    ("speculators", lambda files: _back(files), "there is no layers.0.mlp.down_proj.weight, which it leaves"),
]


def _back(files: Files) -> None:
    renamed = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in files.tensors.items()}
    files.tensors.clear()
    files.tensors.update(renamed)


@pytest.mark.parametrize(("name", "plant", "said"), PITFALLS)
def test_a_pitfall_is_told(name: str, plant: Plant, said: str) -> None:
    draft = random_draft()
    files = written(name, draft)
    plant(files)
    found = check(name, files, draft, ORIGIN)
    assert any(said in fault for fault in found), found


def test_folders_without_a_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json: there is no such file"):
        read_files(tmp_path)


# --- another reader


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Half-split RoPE of ``[N, W]`` at one position."""
    half = x.shape[-1] // 2
    angle = torch.tensor([position * theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=x.dtype)
    low, high = x[:, :half], x[:, half:]
    return torch.cat((low * angle.cos() - high * angle.sin(), low * angle.sin() + high * angle.cos()), -1)


def oracle(files: Files, features: Tensor, embedded: Tensor, steps: int) -> list[Tensor]:
    """Logits of a chain behind the last row, from the published description alone: one row, one head at a time.

    ``features [T, F, H]``; ``embedded [T + steps - 1, H]``: what follows each row, then what is drafted.
    """
    config, weight = files.config, {name: tensor.double() for name, tensor in files.tensors.items()}
    heads, shared, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    layer, found = "midlayer.", []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    h = y = torch.empty(0)
    for position in range(len(features) + steps - 1):
        h = weight["fc.weight"] @ features[position].flatten() if position < len(features) else y
        parts = (
            rms_norm(embedded[position], weight[layer + "input_layernorm.weight"], eps),
            rms_norm(h, weight[layer + "hidden_norm.weight"], eps),
        )
        x = torch.cat(parts)
        project = {name: weight[f"{layer}self_attn.{name}_proj.weight"] @ x for name in "qkv"}
        query = rotate(project["q"].view(heads, -1), position, config["rope_theta"])
        keys.append(rotate(project["k"].view(shared, -1), position, config["rope_theta"]))
        values.append(project["v"].view(shared, -1))
        attended = []
        for head in range(heads):
            at = head * shared // heads
            scores = torch.stack([query[head] @ key[at] for key in keys]) / query.shape[-1] ** 0.5
            attended.append(sum(w * value[at] for w, value in zip(scores.softmax(0), values, strict=True)))
        y = h + weight[layer + "self_attn.o_proj.weight"] @ torch.cat(attended)
        inner = rms_norm(y, weight[layer + "post_attention_layernorm.weight"], eps)
        gate, up = (weight[f"{layer}mlp.{name}_proj.weight"] @ inner for name in ("gate", "up"))
        y = y + weight[layer + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
        found.append(weight["lm_head.weight"] @ rms_norm(y, weight["norm.weight"], eps))
    return found[-steps:]


def test_a_reader_made_from_the_description_computes_our_logits() -> None:
    draft, steps, rows = random_draft().double(), 3, 7
    features, embedded = torch.randn(rows, 3, 24).double(), torch.randn(rows + steps - 1, 24).double()
    theirs = oracle(write("eagle", draft, torch.float64, ORIGIN, ""), features, embedded, steps)
    cache, positions = draft.new_cache(1, 32), torch.arange(32)[None]
    with torch.no_grad():
        y = draft.decode(embedded[None, :rows], draft.combine(features)[None], positions[:, :rows], cache)[:, -1:]
        for step in range(steps):
            torch.testing.assert_close(theirs[step], draft.logits(y)[0, 0], rtol=1e-10, atol=1e-10)
            at = rows + step
            if step + 1 < steps:
                y = draft.decode(embedded[None, at : at + 1], draft.feedback(y), positions[:, at : at + 1], cache)
