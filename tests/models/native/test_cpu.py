"""Compiled products of few rows: the numbers of plain torch, whatever the shape, and plain torch where there is no compiler."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from eagle3.models.native.cache import Cache
from eagle3.models.native.config import DecoderConfig, LayerConfig
from eagle3.models.native.cpu import compiler, operations
from eagle3.models.native.cpu.compiler import Unavailable, load_compiled
from eagle3.models.native.cpu.operations import ROWS, CompiledOperations, make_operations
from eagle3.models.native.decoder import Decoder
from eagle3.models.native.operations import Operations
from eagle3.models.native.sights import Window, branching, following
from eagle3.models.native.weights import Dense, Experts, allocate
from torch import Tensor

from .conftest import Pair, assert_close, random_ids

CPU = torch.device("cpu")


def config(experts: int = 0, hidden: int = 32, width: int = 48, top_k: int = 1) -> DecoderConfig:
    layer = LayerConfig(rotates=True, chunk=0, experts=experts, width=width)
    return DecoderConfig(96, hidden, 2, 1, 8, 1e-5, 1e4, (layer,), top_k=top_k)


@pytest.fixture(autouse=True)
def _always_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says: these tests are about the numbers."""
    try:
        load_compiled()
    except Unavailable as reason:
        pytest.skip(f"compiled products: {reason}")
    monkeypatch.setattr(CompiledOperations, "_most_rows", lambda *_: ROWS[-1])


def ways(of: DecoderConfig) -> tuple[CompiledOperations, Operations]:
    return CompiledOperations(of, load_compiled()), Operations(of, CPU)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 13, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (32, 64), (33, 65), (128, 200)])
def test_product(rows: int, inputs: int, outputs: int) -> None:
    compiled, plain = ways(config())
    x, y = torch.randn(rows, inputs), torch.randn(rows, outputs)
    for weight in (
        torch.randn(inputs, outputs),
        torch.randn(outputs, inputs).t(),
        torch.randn(inputs, 3 * outputs)[:, ::3],
    ):
        compiled.prepare([weight])
        assert_close(compiled.linear(x, weight), plain.linear(x, weight), 1e-5)
        assert_close(compiled.add_linear(y.clone(), x, weight), plain.add_linear(y, x, weight), 1e-5)


def test_rows_that_do_not_lie_one_behind_the_other_and_none_at_all() -> None:
    compiled, plain = ways(config(experts=4))
    weight, mlp = torch.randn(32, 70), random_mlp(config(experts=4))
    compiled.prepare([weight, mlp, mlp.shared])
    for x in (torch.randn(32, 6).t(), torch.randn(1, 32).expand(6, 32)):
        assert_close(compiled.linear(x, weight), plain.linear(x, weight), 1e-5)
        assert_close(compiled.mlp(x, mlp.shared), plain.mlp(x, mlp.shared), 1e-5)
        assert_close(compiled.experts(x, mlp), plain.experts(x, mlp), 1e-4)
    nothing = torch.randn(0, 32)
    assert compiled.linear(nothing, weight).shape == (0, 70)
    assert compiled.mlp(nothing, mlp.shared).shape == compiled.experts(nothing, mlp).shape == (0, 32)


def test_a_row_is_computed_alike_whatever_is_beside_it() -> None:
    """So a token that is verified has the logits, to the bit, that plain decoding has."""
    compiled, _ = ways(config(experts=4))
    weight, mlp = torch.randn(32, 70), random_mlp(config(experts=4))
    compiled.prepare([weight, mlp])
    x = torch.randn(13, 32)
    for rows in (1, 2, 6, 7):
        assert compiled.linear(x[:rows], weight).equal(compiled.linear(x, weight)[:rows])
        assert compiled.experts(x[:rows], mlp).equal(compiled.experts(x, mlp)[:rows])
        assert compiled.norm(x[:rows], torch.ones(32)).equal(compiled.norm(x, torch.ones(32))[:rows])


def random_mlp(of: DecoderConfig) -> Experts:
    mlp = allocate(of, CPU, torch.float32).layers[0].mlp
    assert isinstance(mlp, Experts) and mlp.every is not None
    torch.manual_seed(0)
    for tensor in (mlp.router, *mlp.every):
        tensor.normal_()
    return mlp


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 6, 40])
def test_experts(rows: int, top_k: int) -> None:
    of = config(experts=5, top_k=top_k)
    compiled, plain = ways(of)
    mlp, x = random_mlp(of), torch.randn(rows, 32)
    compiled.prepare([mlp])
    assert_close(compiled.experts(x, mlp), plain.experts(x, mlp), 1e-4)


def test_no_other_expert_is_computed() -> None:
    of = config(experts=3)
    compiled, _ = ways(of)
    mlp, x = random_mlp(of), torch.randn(9, 32)
    mlp.gate_up[(x @ mlp.router).sum(0).argmin()].fill_(torch.nan)
    chosen = (x @ mlp.router).argmax(1)
    compiled.prepare([mlp])
    broken = mlp.gate_up.isnan().flatten(1).any(1)
    assert compiled.experts(x, mlp).isfinite().all(1).equal(~broken[chosen])


@pytest.mark.parametrize("inner", [1, 48, 64])
def test_mlp_over_the_whole_range_of_its_gate(inner: int) -> None:
    compiled, plain = ways(config())
    mlp = Dense(torch.randn(4, 2 * inner), torch.randn(inner, 4))
    compiled.prepare([mlp])
    for scale in (1e-6, 1.0, 30.0, 1e4):
        x = torch.randn(6, 4) * scale
        assert_close(compiled.mlp(x, mlp), plain.mlp(x, mlp), 1e-5)
    assert compiled.mlp(torch.full((1, 4), torch.nan), mlp).isnan().all()


@pytest.mark.parametrize("hidden", [1, 7, 32, 130])
def test_norm(hidden: int) -> None:
    compiled, plain = ways(config(hidden=hidden))
    weight = torch.rand(hidden)
    for x in (
        torch.randn(5, hidden),
        1e-4 * torch.randn(5, hidden),
        torch.zeros(2, hidden),
        torch.randn(hidden, 5).t(),
    ):
        assert_close(compiled.norm(x, weight), plain.norm(x, weight), 1e-6)


def test_a_decoder_of_every_variant(pair: Pair) -> None:
    """Prompt, chain, rollback and tree, beside the same weights in plain torch."""
    decoder = pair.ours.decoder
    if decoder.weights.norm.device != CPU:
        pytest.skip("the products are a CPU's")
    ids, nodes = random_ids(40), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    found = []
    for made in ways(decoder.config):
        target = Decoder(decoder.config, decoder.weights, made, pair.ours.info.layers)
        cache, chunks = pair.ours.new_cache(64), decoder.config.chunks
        steps = [
            target.forward(ids[:30], following(cache, 30, chunks, torch.float32), cache)[0],
            target.forward(ids[30:36], following(cache, 6, chunks, torch.float32), cache)[0],
        ]
        cache.rollback(33)
        steps.append(target.forward(ids[:3], branching(cache, nodes, chunks, torch.float32), cache)[0])
        found.append(torch.cat(steps))
    assert_close(found[0], found[1], 1e-4)


@pytest.mark.parametrize("heads", [(2, 2, 16), (4, 2, 32), (6, 1, 80), (4, 4, 128)])
@pytest.mark.parametrize("rows", [1, 2, 6, 23, 64])
def test_attention_to_a_cache(rows: int, heads: tuple[int, int, int]) -> None:
    """To all of it or a window of it, with and without a mask; what is masked may hold anything finite."""
    count, stored, width = heads
    layer = LayerConfig(rotates=True, chunk=0, experts=0, width=8)
    compiled, plain = ways(DecoderConfig(8, 32, count, stored, width, 1e-5, 1e4, (layer,)))
    assert compiled._attends
    cache = Cache(compiled.config, 150, torch.empty(0))
    cache.stored.normal_()
    wide = torch.randn(rows + 3, (count + 2 * stored) * width)
    mask = torch.zeros(rows, 91).masked_fill_(torch.rand(rows, 91) < 0.5, -torch.inf)
    mask[:, 7] = 0.0
    cache.stored[0, 9 + mask.isinf().all(0).nonzero()[:, 0]] = 1e30
    for qkv, limit in ((wide[3:], 1e-5), (20 * wide[3:], 1e-4)):
        for sight in (
            Window(9, 100, mask),
            Window(0, 150, torch.zeros(rows, 150)),
            *([Window(3, 4, None)] * (rows == 1)),
        ):
            assert_close(compiled.look(qkv, sight, 0, cache), plain.look(qkv, sight, 0, cache), limit)


def test_each_way_is_taken_where_it_was_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    slower_from = 8
    times: Iterator[float] = iter([time for rows in ROWS for time in (1.0 if rows < slower_from else 3.0, 2.0)])
    monkeypatch.setattr(operations, "_seconds", lambda _: next(times))
    compiled, _ = ways(config())
    weight, calls = torch.randn(32, 16), list[int]()
    compiled.prepare([weight])
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w: calls.append(len(x)) or real(x, w))
    for rows in (1, 6, 7, 8, 64):
        x = torch.randn(rows, 32)
        assert_close(compiled.linear(x, weight), real(x, weight), 1e-5)
    assert calls == [7, 8, 64]


def test_what_is_large_or_narrow_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    of = config(experts=3)
    assert type(make_operations(of, CPU, torch.bfloat16)) is Operations
    made = make_operations(of, CPU, torch.float32)
    assert isinstance(made, CompiledOperations)
    mlp = random_mlp(of)
    matrices = [torch.zeros(32, 32), torch.zeros(32, 33), mlp.shared, mlp]
    for small, kept in ((1024, 1), (1056, 2), (mlp.shared.gate_up.numel(), 4)):
        monkeypatch.setattr(operations, "SMALL", small)
        made = CompiledOperations(of, load_compiled())
        made.prepare(matrices)
        assert len(made._fast) == kept


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    load_compiled.cache_clear()
    try:
        with pytest.raises(Unavailable, match=r"no C\+\+ compiler"):
            load_compiled()
        made = make_operations(config(), CPU, torch.float32)
        assert type(made) is Operations and made.described == "products by torch"
        assert "left to torch, which is slower: no C++ compiler" in capsys.readouterr().err
    finally:
        load_compiled.cache_clear()


def test_a_compiler_that_fails_says_why_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo broken 1.0 && exit\necho 'no such thing' >&2\necho more >&2\nexit 1\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_compiled.cache_clear()
    try:
        with pytest.raises(Unavailable, match="cannot compile them: no such thing$"):
            load_compiled()
        assert not list((tmp_path / "cache" / "eagle3" / "kernels").iterdir())
    finally:
        load_compiled.cache_clear()


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And again where what is there cannot be loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = list[Path]()
    real = compiler._compile

    def compiled(compiler: str, flags: tuple[str, ...], path: Path) -> None:
        made.append(path)
        path.write_bytes(b"half a library") if len(made) == 1 else real(compiler, flags, path)

    monkeypatch.setattr(compiler, "_compile", compiled)
    try:
        load_compiled.cache_clear()
        with pytest.raises(Unavailable, match="cannot be loaded"):
            load_compiled()
        for _ in range(2):
            load_compiled.cache_clear()
            load_compiled()
        assert len(made) == 2 and made[1].exists()
    finally:
        load_compiled.cache_clear()


def test_vectors_are_no_wider_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    load_compiled.cache_clear()
    try:
        assert load_compiled().isa != "AVX-512"
        compiled, plain = ways(config())
        x, weight = torch.randn(7, 33), torch.randn(33, 65)
        compiled.prepare([weight])
        assert_close(compiled.linear(x, weight), plain.linear(x, weight), 1e-5)
    finally:
        load_compiled.cache_clear()


def test_logits_of_one_row_have_one_dimension(pair: Pair) -> None:
    states: Tensor = pair.ours.prefill(random_ids(5), [5]).last_hidden
    assert pair.ours.logits(states[-1]).shape == (pair.ours.info.vocab_size,)
    assert_close(pair.ours.logits(states)[-1], pair.ours.logits(states[-1]), 1e-5)
