"""The draft checkpoint is what serving engines load, and a file that says something else is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.models.checkpoint import load_draft, save_draft
from eagle3.models.draft import Eagle3Draft
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from . import conftest
from .conftest import DRAFT_IDS, NARROW

random_draft = partial(conftest.random_draft, NARROW)
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
HEAD = "take the folder of a trained head, such as runs/<name>/draft"
OFFSETS = "write d2t as offsets: target id - draft id"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved head with a mapped vocabulary."""
    save_draft(random_draft(), tmp_path / "draft", torch.float32)
    return tmp_path / "draft"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"draft_vocab_size": 17}, {"fc_norm": True, "norm_output": True}, {"target_layers": (0, 2)}]
)
def test_a_saved_head_comes_back(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    draft = random_draft(**changes)
    save_draft(draft, tmp_path, dtype)
    loaded = load_draft(tmp_path)
    assert loaded.config == draft.config and loaded.mapped == draft.mapped
    assert torch.equal(loaded.draft_ids, draft.draft_ids)
    before, after = draft.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tensor.is_floating_point():
            assert after[name].dtype == torch.float32
            tensor = tensor.to(dtype).float()
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_that_engines_load(tmp_path: Path, dtype: torch.dtype) -> None:
    save_draft(random_draft(fc_norm=True), tmp_path, dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "fc.weight": (dtype, (12, 36)),
        "midlayer.self_attn.q_proj.weight": (dtype, (24, 24)),
        "midlayer.self_attn.k_proj.weight": (dtype, (12, 24)),
        "midlayer.self_attn.v_proj.weight": (dtype, (12, 24)),
        "midlayer.self_attn.o_proj.weight": (dtype, (12, 24)),
        "midlayer.mlp.gate_proj.weight": (dtype, (20, 12)),
        "midlayer.mlp.up_proj.weight": (dtype, (20, 12)),
        "midlayer.mlp.down_proj.weight": (dtype, (12, 20)),
        "midlayer.hidden_norm.weight": (dtype, (12,)),
        "midlayer.input_layernorm.weight": (dtype, (12,)),
        "midlayer.post_attention_layernorm.weight": (dtype, (12,)),
        "norm.weight": (dtype, (12,)),
        "lm_head.weight": (dtype, (5, 12)),
        "fc_norm.0.weight": (dtype, (12,)),
        "fc_norm.1.weight": (dtype, (12,)),
        "fc_norm.2.weight": (dtype, (12,)),
        "d2t": (torch.int64, (5,)),
        "t2d": (torch.bool, (17,)),
    }
    assert tensors["d2t"].tolist() == [0, 2, 2, 8, 12]
    assert tensors["t2d"].nonzero()[:, 0].tolist() == DRAFT_IDS.tolist()


def test_a_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    save_draft(random_draft(draft_vocab_size=17), tmp_path, torch.float32)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if name in ("d2t", "t2d") or name.startswith("fc_norm")]


def test_the_configuration_is_portable(tmp_path: Path) -> None:
    """vLLM numbers layers by whose input they are and reads the top level; SGLang by output, and reads eagle_config."""
    extra = {"eagle3_training": {"step": 7}, "architectures": ["Another"]}
    save_draft(random_draft(norm_output=True), tmp_path, torch.bfloat16, extra)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": 17,
        "draft_vocab_size": 5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        LAYER_IDS: [2, 24, 45],
        "eagle_config": {LAYER_IDS: [1, 23, 44], "use_aux_hidden_state": True},
        "norm_before_residual": False,
        "norm_output": True,
        "fc_norm": False,
        "norm_before_fc": False,
        "eagle3_training": {"step": 7},
    }


def test_a_head_from_before_norm_before_fc_has_none(tmp_path: Path) -> None:
    save_draft(random_draft(), tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("norm_before_fc") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_draft(tmp_path).config == random_draft().config


def test_engines_read_the_configuration_through_transformers(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (6, 2, False)
    assert config.to_dict()[LAYER_IDS] == [2, 24, 45] and config.eagle_config[LAYER_IDS] == [1, 23, 44]


def refusal(folder: Path, file: str | None) -> str:
    """What is said after naming ``file`` of the folder, or the folder."""
    path = folder / file if file else folder
    with pytest.raises(UserError) as caught:
        load_draft(folder)
    said, named = str(caught.value), f"draft = {path}: "
    assert said.startswith(named)
    return said.removeprefix(named)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert refusal(folder, file) == f"there is no such file; {HEAD}"


def test_a_file_for_a_folder_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    with pytest.raises(UserError, match=re.escape(f"{path}/config.json: there is no such file; {HEAD}")):
        load_draft(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"architectures": ', "it is not JSON (Expecting value: line 1 column 19 (char 18))"),
        (b"", "it is not JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff\xfe", "it is not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b"[1, 2]", "it is not a JSON object"),
    ],
)
def test_a_configuration_that_is_no_json_object_is_refused(folder: Path, content: bytes, problem: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert refusal(folder, "config.json") == f"{problem}; {HEAD}"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda raw: b"", "header too small"),
        (lambda raw: raw[:-4], "file not fully covered"),
        (lambda raw: raw + b"more", "file not fully covered"),
        (lambda raw: b"\xff" * 8 + raw[8:], "header too large"),
        (lambda raw: raw[:8] + b"!" + raw[9:], "invalid JSON in header"),
    ],
)
def test_a_damaged_file_of_weights_is_refused(folder: Path, damage: Callable[[bytes], bytes], problem: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    said = refusal(folder, "model.safetensors")
    assert said.startswith("it is damaged (") and problem in said and said.endswith(f"; {HEAD}")


ABSENT = object()
CONFIGURATIONS: list[tuple[str, object, str]] = [
    *[
        (key, value, f"{key} is {value}, and only {wanted} is supported; {HEAD}")
        for key, value, wanted in (
            ("architectures", ["LlamaForCausalLM"], ["LlamaForCausalLMEagle3"]),
            ("model_type", "qwen3", "llama"),
            ("num_hidden_layers", 2, 1),
            ("hidden_act", "gelu", "silu"),
            ("attention_bias", True, False),
            ("mlp_bias", True, False),
            ("tie_word_embeddings", True, False),
        )
    ],
    ("norm_before_residual", ABSENT, f"norm_before_residual is None, and it must be a bool; {HEAD}"),
    *[
        (key, value, f"{key} is {shown}, and it must be {wanted}; {HEAD}")
        for key, value, shown, wanted in (
            ("hidden_size", ABSENT, "None", "a positive int"),
            ("hidden_size", 12.0, "12.0", "a positive int"),
            ("intermediate_size", -20, "-20", "a positive int"),
            ("num_attention_heads", "4", "4", "a positive int"),
            ("num_key_value_heads", 0, "0", "a positive int"),
            ("head_dim", None, "None", "a positive int"),
            ("vocab_size", True, "True", "a positive int"),
            ("draft_vocab_size", 0, "0", "a positive int"),
            ("max_position_embeddings", 0, "0", "a positive int"),
            ("rms_norm_eps", -1e-5, "-1e-05", "a positive float"),
            ("rms_norm_eps", float("nan"), "nan", "a positive float"),
            ("rope_theta", True, "True", "a positive float"),
            ("rope_theta", ABSENT, "None", "a positive float"),
            ("rope_theta", float("inf"), "inf", "a positive float"),
            ("fc_norm", ABSENT, "None", "a bool"),
            ("norm_output", 1, "1", "a bool"),
        )
    ],
    (
        "rope_theta",
        10000.0,
        "rope_parameters is {'rope_type': 'default', 'rope_theta': 500000.0}, and it must be plain and agree with "
        f"rope_theta 10000.0; {HEAD}",
    ),
    (
        "rope_parameters",
        {"rope_type": "llama3", "rope_theta": 500000.0},
        "rope_parameters is {'rope_type': 'llama3', 'rope_theta': 500000.0}, and it must be plain and agree with "
        f"rope_theta 500000.0; {HEAD}",
    ),
    (
        "rope_parameters",
        ABSENT,
        f"rope_parameters is None, and it must be plain and agree with rope_theta 500000.0; {HEAD}",
    ),
    (
        "rope_scaling",
        {"rope_type": "yarn", "factor": 4.0},
        f"rope_scaling is {{'rope_type': 'yarn', 'factor': 4.0}}, and only plain RoPE is supported; {HEAD}",
    ),
    ("num_key_value_heads", 3, f"it has 4 heads over 3 key/value heads of width 6; {HEAD}"),
    ("head_dim", 5, f"it has 4 heads over 2 key/value heads of width 5; {HEAD}"),
    ("draft_vocab_size", 18, f"draft_vocab_size is 18 out of a vocabulary of 17; {HEAD}"),
]


def change_config(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if value is ABSENT:
        del config[key]
    else:
        config[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("key", "value", "said"), CONFIGURATIONS)
def test_a_configuration_of_another_head_is_refused(folder: Path, key: str, value: object, said: str) -> None:
    change_config(folder, key, value)
    assert refusal(folder, "config.json") == said


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([1, 23, 44], [1, 23, 44]),
        ([2, 24, 45], [2, 24, 45]),
        ([3, 25, 46], [1, 23, 44]),
        ([2, 24], [1, 23, 44]),
        ([24, 2, 45], [23, 1, 44]),
        ([2, 2, 45], [1, 1, 44]),
        ([0, 24, 45], [-1, 23, 44]),
        ([2, 24, 45], ["1", "23", "44"]),
        ([], []),
        (None, [1, 23, 44]),
        ([2, 24, 45], None),
    ],
)
def test_layers_that_do_not_agree_are_refused(folder: Path, inputs: Any, outputs: Any) -> None:
    change_config(folder, LAYER_IDS, inputs)
    change_config(folder, "eagle_config", {LAYER_IDS: outputs, "use_aux_hidden_state": True})
    problem = f"its two lists of captured layers, {inputs} by input and {outputs} by output, do not agree"
    assert (
        refusal(folder, "config.json") == f"{problem}; let {LAYER_IDS} be ascending, and eagle_config's list plus one"
    )


@pytest.mark.parametrize("value", [ABSENT, None, [1, 23, 44]])
def test_layers_for_one_engine_alone_are_refused(folder: Path, value: object) -> None:
    change_config(folder, "eagle_config", value)
    assert "[2, 24, 45] by input and None by output, do not agree; let " in refusal(folder, "config.json")


@pytest.mark.parametrize("flag", [{}, {"use_aux_hidden_state": False}])
def test_a_head_that_is_served_without_its_features_is_refused(folder: Path, flag: dict[str, bool]) -> None:
    change_config(folder, "eagle_config", {LAYER_IDS: [1, 23, 44], **flag})
    shown = flag.get("use_aux_hidden_state")
    said = f"use_aux_hidden_state of eagle_config is {shown}, and only True is supported; {HEAD}"
    assert refusal(folder, "config.json") == said


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("norm.weight", None, f"it has no tensor norm.weight, which its config.json asks for; {HEAD}"),
        ("lm_head.weight", None, f"it has no tensor lm_head.weight, which its config.json asks for; {HEAD}"),
        ("d2t", None, f"it has no tensor d2t, which its config.json asks for; {HEAD}"),
        ("t2d", None, f"it has no tensor t2d, which its config.json asks for; {HEAD}"),
        (
            "embed_tokens.weight",
            torch.zeros(17, 12),
            f"its tensor embed_tokens.weight has no place in the head of its config.json; {HEAD}",
        ),
        (
            "fc_norm.0.weight",
            torch.ones(12),
            f"its tensor fc_norm.0.weight has no place in the head of its config.json; {HEAD}",
        ),
        (
            "fc.weight",
            torch.zeros(12, 24),
            f"fc.weight has shape [12, 24], and its config.json says [12, 36]; {HEAD}",
        ),
        ("d2t", torch.tensor([0, 2, 2, 8]), f"d2t has shape [4], and its config.json says [5]; {HEAD}"),
        ("t2d", torch.ones(16) > 0, f"t2d has shape [16], and its config.json says [17]; {HEAD}"),
        (
            "norm.weight",
            torch.ones(12, dtype=torch.int8),
            f"norm.weight has type torch.int8, and it must have a floating-point type; {HEAD}",
        ),
        *[
            ("norm.weight", torch.tensor([1.0] * 11 + [wrong]), f"norm.weight holds values that are not finite; {HEAD}")
            for wrong in (torch.nan, torch.inf)
        ],
        (
            "d2t",
            torch.tensor([0, 2, 2, 8, 12], dtype=torch.int32),
            f"d2t has type torch.int32, and it must have torch.int64; {HEAD}",
        ),
        (
            "t2d",
            torch.ones(17, dtype=torch.uint8),
            f"t2d has type torch.uint8, and it must have torch.bool; {HEAD}",
        ),
        ("d2t", torch.tensor([0, 3, 4, 11, 16]), f"d2t leads to target ids 0..20, out of 0..16; {OFFSETS}"),
        ("d2t", torch.tensor([0, 2, 2, 8, 13]), f"d2t leads to target ids 0..17, out of 0..16; {OFFSETS}"),
        ("d2t", torch.tensor([-1, 2, 2, 8, 12]), f"d2t leads to target ids -1..16, out of 0..16; {OFFSETS}"),
        *[
            (
                name,
                tensor,
                "d2t and t2d do not name the same part of the target's vocabulary, in ascending order; " + OFFSETS,
            )
            for name, tensor in (
                ("d2t", torch.tensor([0, 2, 2, 8, 11])),  # another id
                ("d2t", torch.tensor([3, -1, 2, 8, 12])),  # the same ids in another order
                ("d2t", torch.tensor([0, 2, 2, 8, 7])),  # an id twice
                ("t2d", torch.arange(17) < 5),  # other ids
                ("t2d", torch.arange(17) < 6),  # more ids
            )
        ],
    ],
)
def test_tensors_of_another_head_are_refused(folder: Path, name: str, tensor: Tensor | None, said: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else tensors | {name: tensor}, path)
    assert refusal(folder, "model.safetensors") == said


def test_absolute_ids_within_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """A d2t of absolute ids leads to ids that may exist; t2d gives it away."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 1, 3, 5, 7])
    save_draft(Eagle3Draft(NARROW, ids), tmp_path, torch.float32)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"d2t": ids}, path)
    assert refusal(tmp_path, "model.safetensors").endswith(f"in ascending order; {OFFSETS}")


@pytest.mark.parametrize("name", ["d2t", "t2d"])
def test_a_map_where_the_vocabulary_is_whole_is_refused(tmp_path: Path, name: str) -> None:
    save_draft(random_draft(draft_vocab_size=17), tmp_path, torch.float32)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(17, dtype=torch.int64)}, path)
    assert (
        refusal(tmp_path, "model.safetensors")
        == f"its tensor {name} has no place in the head of its config.json; {HEAD}"
    )


@pytest.mark.parametrize("name", ["fc_norm.0.weight", "fc_norm.2.weight"])
def test_a_flag_without_its_tensors_is_refused(tmp_path: Path, name: str) -> None:
    save_draft(random_draft(fc_norm=True), tmp_path, torch.float32)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    assert refusal(tmp_path, "model.safetensors") == f"it has no tensor {name}, which its config.json asks for; {HEAD}"
