"""What several processes compute together is what one computes alone, and groups of them know nothing of each other."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.models.parallel import ALONE, Place, announce, announced, from_first, here, join, leading, placed
from eagle3.models.target import load_target
from torch.distributed.tensor import DTensor
from transformers import (
    AutoTokenizer,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

MEMBERS, GROUPS = 2, 2
KINDS = ("llama", "llama4", "nested")
LAYERS = (1, 3, 4)

fork = multiprocessing.get_context("fork")


def test_neighbours_are_a_group() -> None:
    found = [placed(rank, 6, 2) for rank in range(6)]
    assert found == [Place(group, 3, member, 2) for group in range(3) for member in range(2)]
    assert [ours.writes for ours in found] == [True, False] * 3
    for number in range(12):
        assert [ours.does(number) for ours in found].count(True) == 2
    assert [placed(rank, 4, 1) for rank in range(4)] == [Place(rank, 4, 0, 1) for rank in range(4)]


def test_a_launcher_says_where_a_process_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here(1) == ALONE
    with pytest.raises(UserError, match="record.tensor_parallel = 8: there are 1 processes; start a multiple of 8, as"):
        here(8)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert here(3) == Place(1, 2, 2, 3)
    with pytest.raises(UserError, match="record.tensor_parallel = 4: there are 6 processes"):
        here(4)


def test_heads_are_dealt_evenly() -> None:
    config = Llama4Config(text_config={"num_attention_heads": 6, "num_key_value_heads": 6})
    with pytest.raises(UserError, match="record.tensor_parallel = 4: the target has 6 key/value heads; give a divisor"):
        join(4, config)


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, a Llama-4 with one matrix at both ends, and a Llama-4 inside a model that sees."""
    root = tmp_path_factory.mktemp("parallel")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    shutil.copytree(tiny_folder, root / "llama4")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(root / "llama")
    mixture = {"intermediate_size_mlp": 64, "num_local_experts": 4, "interleave_moe_layer_step": 2}
    mixture |= {"attention_chunk_size": 16, "max_position_embeddings": 512, "use_qk_norm": False}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
    config = Llama4Config(text_config=sizes | mixture, vision_config=vision | {"image_size": 28, "patch_size": 14})
    Llama4ForConditionalGeneration(config).save_pretrained(root / "nested")
    for kind in ("llama", "nested"):
        tokenizer.save_pretrained(root / kind)
    return root


def ids_of(group: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(7, vocab_size, (2, 40), generator=torch.Generator().manual_seed(group))


def lead_or_follow(ours: Place) -> list[torch.Tensor]:
    """What a member was told to run, when the first ends well and when it ends in a mistake."""
    if not ours.writes:
        return [*announced(), *announced()]
    told = [torch.full((1, 3), ours.group), torch.arange(8).reshape(4, 2)]
    with leading(ours):
        announce(ours, told[0])
    with pytest.raises(UserError), leading(ours):
        announce(ours, told[1])
        raise UserError("a", "b", "c", "d")
    return told


def _member(rank: int, port: int, root: Path, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(MEMBERS * GROUPS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ours, found = here(MEMBERS), {}
    for kind in KINDS:
        target = load_target(TargetSettings(path=str(root / kind), layers=LAYERS), MEMBERS)
        states = target.forward(ids_of(ours.group, target.info.vocab_size))
        found[kind] = {
            "states": (states.features, states.last_hidden),
            "said": target.generate([[7, 8, 9], [10, 11]], [0.0, 1.0], 12),
            "head": target.head,
            "info": target.info,
            "held": sum(
                p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in target.model.parameters()
            ),
        }
    found["told"], found["ran"] = from_first(rank), lead_or_follow(ours)
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def computed(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, meeting: Callable[[], int]
) -> list[dict[str, Any]]:
    """What two groups of two processes found, by rank."""
    out = tmp_path_factory.mktemp("computed")
    port, ranks = meeting(), range(MEMBERS * GROUPS)
    processes = [fork.Process(target=_member, args=(rank, port, folders, out)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in ranks]


@pytest.mark.parametrize("kind", KINDS)
def test_together_as_alone(kind: str, folders: Path, computed: list[dict[str, Any]]) -> None:
    alone = load_target(TargetSettings(path=str(folders / kind), layers=LAYERS))
    parameters = sum(parameter.numel() for parameter in alone.model.parameters())
    said = alone.generate([[7, 8, 9], [10, 11]], [0.0, 1.0], 12)
    for rank, found in enumerate(computed):
        ours = found[kind]
        states = alone.forward(ids_of(placed(rank, len(computed), MEMBERS).group, alone.info.vocab_size))
        for mine, theirs in zip(ours["states"], (states.features, states.last_hidden), strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert ours["said"] == said
        assert ours["info"] == alone.info
        for mine, theirs in zip(ours["head"], alone.head, strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert ours["held"] < 0.55 * parameters


def test_a_matrix_at_both_ends_is_one(computed: list[dict[str, Any]]) -> None:
    for found in computed:
        for kind in KINDS:
            head = found[kind]["head"]
            assert (head.lm_head.data_ptr() == head.embedding.data_ptr()) == (kind == "llama4")


def test_members_are_told_what_the_first_does(computed: list[dict[str, Any]]) -> None:
    assert [found["told"] for found in computed] == [0, 0, 2, 2]
    for rank, found in enumerate(computed):
        group = placed(rank, len(computed), MEMBERS).group
        assert [ids.tolist() for ids in found["ran"]] == [[[group] * 3], [[0, 1], [2, 3], [4, 5], [6, 7]]]


def test_who_is_alone_tells_nobody() -> None:
    with leading(ALONE):
        announce(ALONE, torch.zeros(1, 1))
