"""Two processes that hold a target together compute what one does, each with half of it, by as few exchanges as can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.models.native import loading, memory, parallel
from eagle3.models.native.config import Share
from eagle3.models.native.families import family_of
from eagle3.models.native.loading import load_native
from eagle3.models.native.memory import check_memory, needed_bytes
from eagle3.models.native.parallel import RECORDING, Group, join, join_members, shard
from eagle3.models.native.target import NativeTarget
from eagle3.models.native.weights import Experts
from eagle3.models.target import TargetOutput
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import AutoConfig, Llama4TextConfig

from .conftest import CAPTURED, CHUNK, LAYERS, VARIANTS, assert_close, built, random_ids
from .test_forward import PARENTS, ancestors
from .test_loading import Witness

CPU = torch.device("cpu")
DEALT = ("maverick", "scout", "chunk of five, tied", "two experts a token", "llama", "llama scaled")
CAPACITY = 80

States = dict[str, tuple[Tensor, Tensor]]


def settings_of(folder: Path) -> TargetSettings:
    return TargetSettings(path=str(folder), layers=CAPTURED)


def states_of(target: NativeTarget) -> States:
    """Features and logits of tokens that come in every way there is."""
    found: States = {}

    def note(name: str, output: TargetOutput) -> None:
        found[name] = output.features, target.logits(output.last_hidden)

    lengths = [1, 13, CHUNK, 31]
    note("packed", target.prefill(random_ids(sum(lengths)), lengths))
    cache, ids = target.new_cache(CAPACITY), random_ids(60)
    note("prompt", target.forward(ids[:21], cache))
    note("rejected", target.forward(random_ids(8, seed=1), cache))
    cache.rollback(22)
    note("after a rollback", target.forward(ids[22:23], cache))
    note("verified", target.forward(ids[23:30], cache))
    note("tree", target.forward(random_ids(len(PARENTS), seed=2), cache, ancestors(PARENTS)))
    cache.keep(torch.tensor([0, 1, 3, 6, 9]))
    note("after a tree", target.forward(ids[30:34], cache))
    found["alone"] = found["verified"][0], target.logits(torch.ones(target.info.hidden_size))
    return found


def held_bytes(target: NativeTarget) -> int:
    """Of all memory behind the weights, each counted once."""
    weights = target.decoder.weights
    tensors = [weights.embedding, weights.norm, weights.lm_head]
    for layer in weights.layers:
        dense = layer.mlp
        if isinstance(dense, Experts):
            tensors += [dense.router, dense.gate_up, dense.down]
            dense = dense.shared
        tensors += [layer.input_norm, layer.qkv, layer.out, layer.mlp_norm, *dense]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def replicated_bytes(target: NativeTarget) -> int:
    """Of embedding, norms and routers, which every process has."""
    weights = target.decoder.weights
    tensors = [weights.embedding, weights.norm]
    for layer in weights.layers:
        tensors += [layer.input_norm, layer.mlp_norm]
        tensors += [layer.mlp.router] if isinstance(layer.mlp, Experts) else []
    return sum(tensor.nbytes for tensor in tensors)


def _exchanges(target: NativeTarget) -> list[Counter[str]]:
    """Of a prefill, of a forward over one token, of one over a tree, and of their logits."""
    counted: list[Counter[str]] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counted[-1][name] += 1
            return function(*arguments, **options)

        return call

    cache = target.new_cache(CAPACITY)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "barrier", "send", "recv"):
            patch.setattr(distributed, name, counting(name, getattr(distributed, name)))
        patch.setattr(parallel, "_all_gather", counting("gather", parallel._all_gather))
        counted.append(Counter())
        output = target.prefill(random_ids(20), [9, 11])
        counted.append(Counter())
        target.forward(random_ids(1), cache)
        counted.append(Counter())
        target.forward(random_ids(len(PARENTS)), cache, ancestors(PARENTS))
        counted.append(Counter())
        target.logits(output.last_hidden)
    return counted


def _refused(folder: Path, group: Group) -> str:
    with pytest.raises(UserError) as refused:
        load_native(settings_of(folder), CAPACITY, group=group)
    return str(refused.value)


def _member(group: Group, folders: dict[str, Path], refused: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {"refused": {name: _refused(folder, group) for name, folder in refused.items()}}
    for variant, folder in folders.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "safe_open", Witness)
            Witness.total = 0
            target = load_native(settings_of(folder), CAPACITY, group=group)
        head = target.head
        if not (tied := head.lm_head is head.embedding):
            with pytest.raises(NotImplementedError):
                head.lm_head.cpu()
        found[variant] = {
            "states": states_of(target), "exchanges": _exchanges(target), "info": target.info, "read": Witness.total,
            "embedding": head.embedding, "lm_head": head.lm_head.shape, "tied": tied,
            "held": held_bytes(target), "cache": target.new_cache(CAPACITY).stored.nbytes,
            "predicted": needed_bytes(target.decoder.config, CAPACITY, torch.float32),
        }  # fmt: skip
        target = load_native(settings_of(folder), CAPACITY, group=group, whole_head=True)
        found[variant]["with the head"] = {
            "states": states_of(target), "exchanges": _exchanges(target), "lm_head": target.head.lm_head,
            "held": held_bytes(target), "predicted": needed_bytes(target.decoder.config, 0, torch.float32)[0],
        }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Path]) -> dict[str, Path]:
    return {variant: saved(built(VARIANTS[variant])) for variant in DEALT}


@pytest.fixture(scope="module")
def refused(saved: Callable[..., Path]) -> dict[str, Path]:
    """A target that is not dealt to two, and one of which a matrix of which each needs a half has too many rows."""
    found = {"heads": saved(built(VARIANTS["llama wide heads"])), "misshaped": saved(built(VARIANTS["llama"]))}
    file = found["misshaped"] / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.cat((tensors[name], tensors[name]))}, file)
    return found


@pytest.fixture(scope="module")
def computed(
    folders: dict[str, Path], refused: dict[str, Path], together: Callable[..., list[Any]]
) -> list[dict[str, Any]]:
    """What each of two processes found, by rank."""
    return together(_member, folders, refused)


@pytest.fixture(params=DEALT)
def variant(request: pytest.FixtureRequest) -> str:
    """Each of the dealt ones in turn."""
    return request.param


@pytest.fixture
def alone(variant: str, folders: dict[str, Path]) -> NativeTarget:
    """The same target in one process."""
    return load_native(settings_of(folders[variant]), CAPACITY, CPU)


def test_together_as_alone(variant: str, alone: NativeTarget, computed: list[dict[str, Any]]) -> None:
    expected = states_of(alone)
    for found in (member[variant] for member in computed):
        assert found["states"].keys() == expected.keys()
        for way, states in expected.items():
            for mine, other in zip(found["states"][way], states, strict=True):
                assert_close(mine, other, 1e-5)
        assert found["info"] == alone.info
        assert torch.equal(found["embedding"], alone.head.embedding)


def test_all_have_the_same_bits(variant: str, computed: list[dict[str, Any]]) -> None:
    """So that all route a token to the same expert."""
    first, second = (member[variant]["states"] for member in computed)
    for way, states in first.items():
        assert all(torch.equal(mine, other) for mine, other in zip(states, second[way], strict=True))


def test_two_sums_a_layer_and_one_gathering_of_logits(variant: str, computed: list[dict[str, Any]]) -> None:
    forward = Counter(all_reduce=2 * LAYERS)
    for member in computed:
        assert member[variant]["exchanges"] == [forward, forward, forward, Counter(gather=1)]


def test_each_reads_and_holds_its_share(variant: str, alone: NativeTarget, computed: list[dict[str, Any]]) -> None:
    """... which is known before; and only embedding, norms and routers are in both."""
    found = [member[variant] for member in computed]
    for member in found:
        assert member["read"] == member["held"]
        assert (member["held"], member["cache"]) == member["predicted"]
        assert 2 * member["cache"] == alone.new_cache(CAPACITY).stored.nbytes
        assert member["held"] < 0.6 * held_bytes(alone)
    assert sum(member["held"] for member in found) == held_bytes(alone) + replicated_bytes(alone)


def test_a_part_of_an_lm_head_is_not_taken_for_it(
    variant: str, alone: NativeTarget, computed: list[dict[str, Any]]
) -> None:
    """Nobody has all of one that is not the embedding, which a process notes that reads it."""
    for member in computed:
        assert member[variant]["lm_head"] == alone.head.lm_head.shape
        assert member[variant]["tied"] == (alone.head.lm_head is alone.head.embedding)


def test_with_all_of_the_lm_head_logits_need_nobody(
    variant: str, alone: NativeTarget, computed: list[dict[str, Any]]
) -> None:
    expected, forward = states_of(alone), Counter(all_reduce=2 * LAYERS)
    for member in computed:
        found = member[variant]["with the head"]
        for way, states in expected.items():
            for mine, other in zip(found["states"][way], states, strict=True):
                assert_close(mine, other, 1e-5)
        assert found["exchanges"] == [forward, forward, forward, Counter()]
        assert torch.equal(found["lm_head"], alone.head.lm_head)
        assert found["held"] == found["predicted"]
        tied = alone.head.lm_head is alone.head.embedding
        assert found["held"] - member[variant]["held"] == (0 if tied else alone.head.lm_head.nbytes // 2)


def test_what_is_recorded_is_dealt_to_the_members_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_members(1) is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        UserError, match="^record.tensor_parallel = 2: there are 3 processes; start a multiple of 2, as"
    ):
        join_members(2)
    config = family_of(maverick(), "")[1]
    with pytest.raises(UserError, match="^record.tensor_parallel = 16: it does not divide .* give a divisor of 8$"):
        shard(config, Share(0, 16), setting=RECORDING)
    odd = replace(config, vocab_size=202_049)
    assert shard(replace(odd, whole_head=True), Share(0, 8)).whole_head
    with pytest.raises(UserError, match="202,049 tokens"):
        shard(odd, Share(0, 8))


def test_what_a_group_refuses(refused: dict[str, Path], computed: list[dict[str, Any]]) -> None:
    for member in computed:
        assert member["refused"] == {
            "heads": "eval.tensor_parallel = 2: it does not divide the target's 1 key/value heads; leave it at 1",
            "misshaped": f"target.path = {refused['misshaped']}: its model.layers.1.self_attn.q_proj.weight is (64, 32)"
            " and not (32, 32); take files that belong together",
        }


def maverick() -> Llama4TextConfig:
    return Llama4TextConfig(num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False)


def test_a_share_of_maverick() -> None:
    """An eighth of 399.62 B, and all of the embedding's 1.03 B: by hand."""
    _, config = family_of(maverick(), "")
    ours = shard(config, Share(5, 8))
    assert (ours.num_heads, ours.num_kv_heads, ours.layers[0].width, ours.layers[1].width) == (5, 1, 2048, 1024)
    weights, cache = needed_bytes(ours, 1, torch.bfloat16)
    assert weights / 2 == pytest.approx(399.62e9 / 8 + 1.03e9, rel=1e-3)
    assert cache == 48 * 2 * 128 * 2
    with pytest.raises(UserError, match=r"= 16: it does not divide the target's 8 key/value .* give a divisor of 8$"):
        shard(config, Share(0, 16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 6, "num_kv_heads": 3}, "3 key/value heads and 6 query heads; give a divisor of 3"),
        ({"vocab_size": 98}, "98 tokens; give a divisor of 2"),
        ({"layers": 50}, "50 columns of an MLP; give a divisor of 2"),
        ({"layers": 1002}, "1,002 columns of an expert; give a divisor of 2"),
    ],
)
def test_what_is_not_dealt_evenly(changes: dict[str, Any], words: str, folders: dict[str, Path]) -> None:
    name = "maverick" if changes.get("layers") == 1002 else "llama"
    _, config = family_of(AutoConfig.from_pretrained(folders[name]), "")
    config = replace(config, num_heads=8, num_kv_heads=4)
    if "layers" in changes:
        kind = max(config.layers, key=lambda layer: layer.experts)
        changes = {"layers": (replace(kind, width=changes["layers"]),)}
    with pytest.raises(UserError) as refused:
        shard(replace(config, **changes), Share(1, 4))
    assert str(refused.value) == f"eval.tensor_parallel = 4: it does not divide the target's {words}"


def test_too_little_memory_for_a_share(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the whole target does not fit into is enough for a half."""
    _, config = family_of(AutoConfig.from_pretrained(folders["llama"]), "")
    ours, meminfo = shard(config, Share(1, 2)), tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    need = sum(needed_bytes(ours, CAPACITY, torch.float32))
    meminfo.write_text(f"MemAvailable: {need // 1024 + 1} kB\n")
    check_memory("it", ours, CAPACITY, CPU, torch.float32)
    with pytest.raises(UserError, match="target.path = it: its weights take"):
        check_memory("it", config, CAPACITY, CPU, torch.float32)
    meminfo.write_text(f"MemAvailable: {need // 1024 - 1} kB\n")
    with pytest.raises(UserError, match="target.path = it: on each of 2 processes its weights take"):
        check_memory("it", ours, CAPACITY, CPU, torch.float32)


def test_processes_share_the_memory_of_their_machine(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks for its share, and for that of a head beside it."""
    ours = shard(family_of(AutoConfig.from_pretrained(folders["llama"]), "")[1], Share(1, 2))
    meminfo, group = tmp_path / "meminfo", cast(Group, SimpleNamespace(least=lambda free: free))
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    need = sum(needed_bytes(ours, CAPACITY, torch.float32))
    for here, beside in ((1, 0), (2, 0), (2, 4096)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        meminfo.write_text(f"MemAvailable: {here * (need + beside) // 1024 + 1} kB\n")
        check_memory("it", ours, CAPACITY, CPU, torch.float32, group, beside)
        meminfo.write_text(f"MemAvailable: {here * (need + beside) // 1024 - 1} kB\n")
        with pytest.raises(
            UserError, match=r"more processes \(record.tensor_parallel, eval.tensor_parallel\), or bfloat16"
        ):
            check_memory("it", ours, CAPACITY, CPU, torch.float32, group, beside)


def test_a_launcher_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join(1) is None
    with pytest.raises(UserError) as refused:
        join(8)
    said = (
        "eval.tensor_parallel = 8: there are 1 processes; start 8, as with torchrun --nproc-per-node 8, or set it to 1"
    )
    assert str(refused.value) == said
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="tensor_parallel = 1: there are 4 processes"):
        join(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="tensor_parallel = 4: there are 2 GPUs here; start as many"):
        join(4)
