"""Every layout of a checkpoint is read, one tensor at a time; what does not suit is told in one line, early."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.models.native import loading, memory
from eagle3.models.native.families import family_of
from eagle3.models.native.loading import load_native
from eagle3.models.native.memory import needed_bytes
from eagle3.models.target import Target, reader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .conftest import CAPTURED, COMMON, LLAMA4, VARIANTS, assert_close, built, random_ids

CPU = torch.device("cpu")
SHARDS = {"max_shard_size": "60KB"}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
}  # fmt: skip


def settings_of(folder: Path, **changes: Any) -> TargetSettings:
    return replace(TargetSettings(path=str(folder), layers=CAPTURED), **changes)


def seeing() -> PreTrainedModel:
    torch.manual_seed(0)
    return Llama4ForConditionalGeneration(Llama4Config(text_config=LLAMA4, vision_config=VISION)).eval()


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["maverick", "llama scaled", "multimodal"])
def test_layouts(layout: str, dtype: torch.dtype, options: dict[str, str], saved: Callable[..., Path]) -> None:
    model = seeing() if layout == "multimodal" else built(VARIANTS[layout])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = saved(model, **options)
    model = reader(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(options)
    ours = load_native(settings_of(folder), 64)
    ids = random_ids(21)
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    assert_close(ours.logits(ours.prefill(ids, [21]).last_hidden), expected)


def test_it_says_of_itself_what_the_other_says(tiny_folder: Path, tiny_target: Target) -> None:
    ours = load_native(TargetSettings(path=str(tiny_folder)), 64)
    assert ours.info == tiny_target.info
    assert ours.text.eos_ids == tiny_target.text.eos_ids
    for mine, other in zip(ours.head, tiny_target.head, strict=True):
        assert torch.equal(torch.as_tensor(mine).cpu(), torch.as_tensor(other).cpu())
    assert ours.head.lm_head is ours.head.embedding


class Witness:
    """A file of tensors that notes what of it is held at once."""

    held: ClassVar[set[int]] = set()
    most = total = opened = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._file = safe_open(*arguments, **options)

    def __enter__(self) -> Witness:
        Witness.opened += 1
        assert Witness.opened == 1
        return self

    def __exit__(self, *_: object) -> None:
        Witness.opened -= 1

    def get_slice(self, name: str) -> Witness:
        self._slice = self._file.get_slice(name)
        return self

    def get_shape(self) -> list[int]:
        return self._slice.get_shape()

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self._slice[index]
        assert not Witness.held
        Witness.held.add(id(tensor))
        weakref.finalize(tensor, Witness.held.discard, id(tensor))
        Witness.most, Witness.total = max(Witness.most, tensor.nbytes), Witness.total + tensor.nbytes
        return tensor


def test_one_tensor_is_read_at_a_time(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """... and of the experts' one expert's; each once, from one open file."""
    model = built(LLAMA4 | {"num_local_experts": 16})
    folder = saved(model, **SHARDS)
    monkeypatch.setattr(loading, "safe_open", Witness)
    load_native(settings_of(folder), 64)
    assert Witness.total == sum(parameter.nbytes for parameter in model.parameters())
    assert Witness.most == model.model.embed_tokens.weight.nbytes  # all experts of a layer are 8 times that


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        load_native(settings_of(folder, **changes), 64, CPU)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def llama_folder(saved: Callable[..., Path]) -> Path:
    return saved(built(COMMON))


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A small Llama, to damage."""
    return Path(shutil.copytree(llama_folder, tmp_path / "llama"))


def test_other_families(saved: Callable[..., Path]) -> None:
    folder = saved(Qwen3ForCausalLM(Qwen3Config(**COMMON)))
    expected = f"target.path = {folder}: its type is qwen3; take a target of type llama or llama4_text"
    expected += ", or set eval.engine or record.engine to transformers"
    assert refusal(folder) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised (fp8)"),
        ({"attention_bias": True}, "its attention_bias is True"),
        ({"mlp_bias": True}, "its mlp_bias is True"),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "its RoPE is linear"),
        ({"num_key_value_heads": 3}, "it has 4 heads of 8, and 3 for keys and values"),
    ],
)
def test_what_is_not_computed(changes: dict[str, Any], words: str, folder: Path) -> None:
    changed_config(folder, **changes)
    assert words in refusal(folder)


def test_quantised_inside_a_model_that_sees(saved: Callable[..., Path]) -> None:
    folder = saved(seeing())
    changed_config(folder, quantization_config={"quant_method": "fbgemm_fp8"})
    assert "quantised (fbgemm_fp8)" in refusal(folder)


def test_sliding_layers(saved: Callable[..., Path]) -> None:
    folder = saved(built(LLAMA4))
    changed_config(folder, layer_types=["sliding_attention", *["chunked_attention"] * 2, "full_attention"])
    assert "its layers use sliding_attention" in refusal(folder)


def test_missing_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "its files have no tensor model.layers.2.mlp.up_proj.weight" in refusal(folder)


def test_misshaped_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors")
    assert "its model.norm.weight is (31,) and not (32,); take files that belong together" in refusal(folder)


def test_as_many_elements_in_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert f"its {name} is (48, 32) and not (32, 48)" in refusal(folder)


def test_damaged_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "its weights are damaged" in refusal(folder)


def test_an_index_that_is_not_of_these_files(saved: Callable[..., Path]) -> None:
    folder = saved(built(COMMON), **SHARDS)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    names["model.norm.weight"] = names["model.embed_tokens.weight"]
    index.write_text(json.dumps({"weight_map": names}))
    assert "its weights are damaged (File does not contain tensor model.norm.weight)" in refusal(folder)


def test_layers_that_it_has_not(folder: Path) -> None:
    assert "the target has 4 layers" in refusal(folder, layers=(1, 4))


def test_folders_and_numerics(folder: Path) -> None:
    assert "no config.json" in refusal(folder / "nowhere")
    assert "target.dtype = float16" in refusal(folder, dtype="float16")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_known_before_anything_is_loaded(variant: str, saved: Callable[..., Path]) -> None:
    model = built(VARIANTS[variant])
    folder = saved(model)
    _, config = family_of(AutoConfig.from_pretrained(folder), "")
    weights, cache = needed_bytes(config, 100, torch.bfloat16)
    assert weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert cache == load_native(settings_of(folder, dtype="bfloat16"), 100).new_cache(100).stored.nbytes


def test_memory_of_maverick() -> None:
    """By hand: 3.02 B in attention, 6.04 B dense, 3.02 B shared, 386.5 B routed, and twice 1.03 B at the ends."""
    maverick = Llama4TextConfig(num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False)
    _, config = family_of(maverick, "")
    weights, cache = needed_bytes(config, 1, torch.bfloat16)
    assert weights / 2 == pytest.approx(400.65e9, rel=1e-3)
    assert cache == 48 * 2 * 8 * 128 * 2


def test_too_little_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights fit, but not with the cache; nothing was read to know it."""
    _, config = family_of(AutoConfig.from_pretrained(folder), "")
    weights, cache = needed_bytes(config, 64, torch.float32)
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    meminfo.write_text(f"MemFree: 1 kB\nMemAvailable: {(weights + cache) // 1024 + 1} kB\n")
    load_native(settings_of(folder), 64, CPU)
    (folder / "model.safetensors").unlink()
    meminfo.write_text(f"MemFree: 1 kB\nMemAvailable: {(weights + cache) // 1024 - 1} kB\n")
    said = refusal(folder)
    assert "and a cache of 64 tokens" in said and "of cpu are free; take a device with more memory" in said
