"""What is exported comes back the same head from every format; what files do not say is listed or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.models.draft import Eagle3Draft
from eagle3.models.engines import Files, read_files
from eagle3.models.formats import FORMATS, Origin, write
from eagle3.models.imports import CONVENTIONS, take
from eagle3.models.target_files import TargetFiles
from safetensors.torch import save_file
from torch import Tensor

from .conftest import DRAFT_IDS, random_draft

HERE = Path("heads/theirs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a Llama-4 of 48 layers in the multimodal layout: its configuration, and its ends."""
    path = tmp_path_factory.mktemp("target")
    text = {"model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 24, "vocab_size": 17}
    (path / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    torch.manual_seed(1)
    names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    save_file({name: torch.randn(17, 24) for name in names}, path / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def target(folder: Path) -> TargetFiles:
    return TargetFiles(TargetSettings(path=str(folder)))


def written(name: str, draft: Eagle3Draft) -> Files:
    provenance = {"name": "theirs", "revision": None, "weights_sha256": "", "num_layers": 48, "dtype": "float32"}
    return write(name, draft, torch.float32, Origin(provenance, {"step": 1}, 3), "heads/theirs")


def same(one: Eagle3Draft, other: Eagle3Draft) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return (
        one.config == other.config
        and first.keys() == second.keys()
        and all(torch.equal(first[key], second[key]) for key in first)
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [5, 17])
def test_a_head_comes_back_from_every_format(name: str, size: int, target: TargetFiles) -> None:
    draft = random_draft(draft_vocab_size=size)
    imported = take(name, HERE, written(name, draft), target)
    assert same(imported.draft, draft)
    assert set(CONVENTIONS) <= set(imported.assumed)


@pytest.mark.parametrize("flag", ["fc_norm", "norm_output", "norm_before_residual", "norm_before_fc"])
def test_flags_come_back(flag: str, target: TargetFiles) -> None:
    draft = random_draft(**{flag: True})
    assert same(take("speculators", HERE, written("speculators", draft), target).draft, draft)


def test_the_default_head_of_the_speculators_trainer_is_read(target: TargetFiles) -> None:
    """A Llama layer with one norm before fc, ``input_norm``, the normed residual, and the normed output fed back."""
    flags = {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True}
    draft = random_draft(**flags)
    files = written("speculators", draft)
    assert files.tensors["input_norm.weight"].shape == (3 * 24,)
    assert all(files.config[flag] for flag in flags)
    imported = take("speculators", HERE, files, target)
    assert same(imported.draft, draft)
    assert "fc_norm False, norm_output True, norm_before_residual True, norm_before_fc True" in imported.assumed
    del files.config["norm_before_fc"]  # as vLLM reads it then, there is no such norm
    with pytest.raises(UserError, match=r"its tensor input_norm\.weight has no place in a head"):
        take("speculators", HERE, files, target)


def test_vllm_reads_norm_before_fc_from_the_inner_configuration_too(target: TargetFiles) -> None:
    draft = random_draft(norm_before_fc=True)
    files = written("vllm", draft)
    del files.config["norm_before_fc"]
    files.config["eagle_config"]["norm_before_fc"] = True
    assert same(take("vllm", HERE, files, target).draft, draft)


# --- NVIDIA's head for Maverick: made for TensorRT-LLM, typed as a Llama-4, with the whole vocabulary


def of_nvidia(draft: Eagle3Draft) -> Files:
    """The files of ``draft`` as such a head's are described: no list of layers, no d2t, another name for the width."""
    config = draft.config
    said = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama4_text",
        "hidden_size": config.hidden_size,
        "intermediate_size": 999,  # of an expert, which a head does not have
        "intermediate_size_mlp": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
    }
    return Files(said, dict(draft.state_dict()), {})


def test_a_llama_4_typed_head_of_the_whole_vocabulary_is_read_as_tensorrt_llm_reads_it(target: TargetFiles) -> None:
    draft = random_draft(draft_vocab_size=17)
    imported = take("trtllm", HERE, of_nvidia(draft), target)
    assert same(imported.draft, draft)
    assert imported.assumed[0] == (
        "captured layers, by output: [1, 23, 44] (TensorRT-LLM's default: the files name none)"
    )
    assert "draft_vocab_size 17 (TensorRT-LLM's default: the files do not say)" in imported.assumed
    assert "the embedding is the target's: the files hold none" in imported.assumed


def test_its_lm_head_is_the_targets_where_it_has_none(target: TargetFiles) -> None:
    files = of_nvidia(random_draft(draft_vocab_size=17))
    del files.tensors["lm_head.weight"]
    imported = take("trtllm", HERE, files, target)
    assert torch.equal(imported.draft.lm_head.weight, target.lm_head)
    assert "the LM head is the target's, as in TensorRT-LLM: the files hold none" in imported.assumed


def test_vllm_would_not_know_its_kind(target: TargetFiles) -> None:
    with pytest.raises(UserError, match="for vLLM, model_type is llama4_text, and a head is a llama"):
        take("vllm", HERE, of_nvidia(random_draft(draft_vocab_size=17)), target)


# --- what files leave open


def test_what_is_not_said_is_the_engines_default_and_listed(target: TargetFiles) -> None:
    files = written("sglang", random_draft())
    for key in ("rope_theta", "rope_parameters", "rms_norm_eps"):
        del files.config[key]
    del files.config["eagle_config"]
    imported = take("sglang", HERE, files, target)
    assert imported.draft.config.rope_theta == 10000.0
    assert imported.draft.config.rms_norm_eps == 1e-6
    for line in (
        "captured layers, by output: [1, 23, 44] (SGLang's default: the files name none)",
        "rope_theta 10000.0 (SGLang's default: the files do not say)",
        "rms_norm_eps 1e-06 (SGLang's default: the files do not say)",
    ):
        assert line in imported.assumed


def test_a_flag_that_the_engine_ignores_is_told(target: TargetFiles) -> None:
    files = written("sglang", random_draft())
    files.config["norm_before_residual"] = True
    assert any(
        "norm_before_residual, which SGLang ignores" in line for line in take("sglang", HERE, files, target).assumed
    )


def test_one_list_of_layers_means_something_else_to_every_engine(target: TargetFiles) -> None:
    files = written("hf", random_draft())
    del files.config["eagle_aux_hidden_state_layer_ids"]  # vLLM falls back to the other list, and numbers it by input
    assert take("sglang", HERE, files, target).draft.config.target_layers == (1, 23, 44)
    assert take("vllm", HERE, files, target).draft.config.target_layers == (0, 22, 43)
    with pytest.raises(UserError, match=r"vLLM reads target_layers as \[0, 22, 43\], SGLang as \[1, 23, 44\]; say for"):
        take("hf", HERE, files, target)


def test_rows_of_another_order_are_sorted(target: TargetFiles) -> None:
    draft, order = random_draft(), torch.tensor([3, 0, 4, 2, 1])
    files = written("vllm", draft)
    files.tensors["d2t"] = DRAFT_IDS[order] - torch.arange(5)
    files.tensors["lm_head.weight"] = files.tensors["lm_head.weight"][order]
    assert same(take("vllm", HERE, files, target).draft, draft)


def test_an_embedding_of_its_own_is_compared_or_left_out(target: TargetFiles) -> None:
    files = written("vllm", random_draft())
    files.tensors["embed_tokens.weight"] = target.embedding.clone()
    assert (
        "the embedding is the target's, and the files' own is equal to it" in take("vllm", HERE, files, target).assumed
    )
    files.tensors["embed_tokens.weight"] += 1
    with pytest.raises(UserError, match="its embed_tokens.weight, which vLLM would use, is not the target's"):
        take("vllm", HERE, files, target)
    assert any("is left out" in line for line in take("sglang", HERE, _for_sglang(files), target).assumed)


def _for_sglang(files: Files) -> Files:
    inner = {"eagle_aux_hidden_state_layer_ids": [1, 23, 44]}
    return files._replace(config=files.config | {"eagle_config": inner})


Plant = Callable[[Files], object]


def without(name: str) -> Plant:
    return lambda files: files.tensors.pop(name)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Plant:
    return lambda files: files.tensors.update({name: change(files.tensors[name])})


def key(name: str, value: object) -> Plant:
    return lambda files: files.config.update({name: value})


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (without("fc.weight"), "there is no tensor fc.weight"),
        (without("lm_head.weight"), "there is no lm_head.weight, which it leaves uninitialised"),
        (without("d2t"), "there is no d2t, and its draft vocabulary is 5 of 17"),
        (tensor("d2t", lambda d2t: d2t + torch.arange(5)), "its d2t, as offsets, leads outside the vocabulary or twice"),
        (tensor("d2t", lambda d2t: d2t.float()), r"its d2t is torch.float32 \[5\], and must be whole numbers \[5\]"),
        (tensor("t2d", lambda t2d: ~t2d), "its d2t and t2d name different parts of the vocabulary"),
        (tensor("norm.weight", lambda weight: weight[:4].clone()), r"norm.weight has shape \[4\], and its config.json"),
        (tensor("norm.weight", lambda weight: weight * torch.nan), "norm.weight holds values that are not finite"),
        (tensor("lm_head.weight", lambda weight: weight[:4]), "its lm_head has 4 rows, and its config.json a draft"),
        (lambda files: files.tensors.update(gate=torch.ones(1)), "its tensor gate has no place in a head of one layer"),
        (key("num_hidden_layers", 2), "it reads num_hidden_layers as 2, and only 1 is known here"),
        (key("attention_bias", True), "it reads attention_bias as True, and only False is known here"),
        (key("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "a RoPE of type linear"),
        (key("vocab_size", 19), "its vocab_size is 19, and that of .* is 17"),
        (key("hidden_size", 16), "its hidden_size is 16, and that of .* is 24"),
        (key("eagle_aux_hidden_state_layer_ids", [2, 24, 49]), r"it captures the outputs of layers \[1, 23, 48\] of 48"),
        (key("draft_vocab_size", "many"), "its config.json reads draft_vocab_size as many"),
    ],
)  # fmt: skip
def test_a_head_that_cannot_be_read_is_refused(plant: Plant, said: str, target: TargetFiles) -> None:
    files = written("vllm", random_draft())
    plant(files)
    with pytest.raises(UserError, match=said):
        take("vllm", HERE, files, target)


def test_weights_are_read_from_shards_and_from_pickles(tmp_path: Path) -> None:
    files = written("eagle", random_draft())
    (tmp_path / "config.json").write_text(json.dumps(files.config))
    torch.save(files.tensors, tmp_path / "pytorch_model.bin")
    pickled = read_files(tmp_path).tensors
    names = sorted(files.tensors)
    save_file({name: files.tensors[name] for name in names[:4]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: files.tensors[name] for name in names[4:]}, tmp_path / "model-00002-of-00002.safetensors")
    sharded = read_files(tmp_path).tensors
    for found in (pickled, sharded):
        assert found.keys() == files.tensors.keys()
        assert all(torch.equal(found[name], files.tensors[name]) for name in names)


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"fc.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: it is damaged, or holds more than tensors"):
        read_files(tmp_path)


def test_a_target_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target.path = .*check the name, or the connection to the hub"):
        TargetFiles(TargetSettings(path=str(tmp_path)))
