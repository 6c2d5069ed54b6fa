"""The head's names, shapes and arithmetic, piece by piece, and its cache."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from eagle3.models.draft import Eagle3Draft, RMSNorm, rotation_table

from . import conftest
from .conftest import DRAFT_IDS, NARROW

CONFIG = replace(NARROW, rope_theta=10000.0)


def random_draft(**changes: Any) -> Eagle3Draft:
    """A head in float64, with norms that are not all ones."""
    return conftest.random_draft(CONFIG, scale=0.5, **changes).double()


def test_tensors_have_the_names_and_shapes_that_engines_load() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in random_draft(fc_norm=True).state_dict().items()}
    assert shapes == {
        "fc.weight": (12, 36),
        "midlayer.self_attn.q_proj.weight": (24, 24),
        "midlayer.self_attn.k_proj.weight": (12, 24),
        "midlayer.self_attn.v_proj.weight": (12, 24),
        "midlayer.self_attn.o_proj.weight": (12, 24),
        "midlayer.mlp.gate_proj.weight": (20, 12),
        "midlayer.mlp.up_proj.weight": (20, 12),
        "midlayer.mlp.down_proj.weight": (12, 20),
        "midlayer.hidden_norm.weight": (12,),
        "midlayer.input_layernorm.weight": (12,),
        "midlayer.post_attention_layernorm.weight": (12,),
        "norm.weight": (12,),
        "lm_head.weight": (5, 12),
        "fc_norm.0.weight": (12,),
        "fc_norm.1.weight": (12,),
        "fc_norm.2.weight": (12,),
        "d2t": (5,),
        "t2d": (17,),
    }


def test_d2t_is_an_offset_and_absent_where_vocabularies_are_equal() -> None:
    draft = random_draft()
    assert draft.d2t.dtype == torch.int64 and draft.d2t.tolist() == [0, 2, 2, 8, 12]
    assert draft.t2d.nonzero()[:, 0].tolist() == DRAFT_IDS.tolist() == draft.draft_ids.tolist()
    assert draft.target_ids(torch.tensor([[0, 4], [2, 1]])).tolist() == [[0, 16], [4, 3]]
    whole = random_draft(draft_vocab_size=17)
    assert not {"d2t", "t2d"} & whole.state_dict().keys()
    assert whole.target_ids(torch.tensor([3, 16])).tolist() == [3, 16]
    assert whole.draft_ids.tolist() == list(range(17))


@pytest.mark.parametrize("ids", [None, DRAFT_IDS[:-1]])
def test_a_vocabulary_of_another_size_is_refused(ids: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="draft vocabulary of 5"):
        Eagle3Draft(CONFIG, ids)


def test_embeddings_come_first_and_features_ascend() -> None:
    draft = random_draft()
    embed, h = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    x = draft.inputs(embed, h)
    assert torch.equal(x[:, :12], draft.midlayer.input_layernorm(embed))
    assert torch.equal(x[:, 12:], draft.midlayer.hidden_norm(h))
    features = torch.randn(5, 3, 12, dtype=torch.float64)
    by_hand = sum(features[:, i] @ draft.fc.weight[:, 12 * i : 12 * i + 12].T for i in range(3))
    torch.testing.assert_close(draft.combine(features), by_hand)


def test_fc_norm_and_norm_output_are_what_eagle_3_1_says() -> None:
    draft = random_draft(fc_norm=True, norm_output=True)
    features, y = torch.randn(5, 3, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    normed = [draft.fc_norm[i](features[:, i]) for i in range(3)]
    torch.testing.assert_close(draft.combine(features), torch.cat(normed, -1) @ draft.fc.weight.T)
    assert torch.equal(draft.feedback(y), draft.norm(y))
    assert random_draft().feedback(y) is y


def test_norm_before_fc_is_one_norm_over_all_captured_layers() -> None:
    draft = random_draft(norm_before_fc=True)
    features = torch.randn(5, 3, 12, dtype=torch.float64) * torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None]
    flat = features.flatten(1)
    normed = flat / (flat.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * draft.input_norm.weight
    assert draft.input_norm.weight.shape == (36,)
    torch.testing.assert_close(draft.combine(features), normed @ draft.fc.weight.T)


def test_the_residual_is_normed_where_the_head_says_so() -> None:
    draft, plain = random_draft(norm_before_residual=True), random_draft()
    plain.load_state_dict(draft.state_dict())
    h, attended = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 4, 6, dtype=torch.float64)
    assert torch.equal(draft.finish(h, attended), plain.finish(draft.midlayer.hidden_norm(h), attended))


def test_rotation_pairs_halves() -> None:
    """Pair i is (x[i], x[i + 3]), turned by position * theta ** (-i / 3)."""
    draft, position = random_draft(), 7
    x = torch.randn(24, dtype=torch.float64)
    plain = (draft.midlayer.self_attn.k_proj.weight @ x).view(2, 6)
    keys, values = draft.keys_values(x, rotation_table(CONFIG, 8, x)[:, position])
    for head in range(2):
        for i in range(3):
            turn = complex(math.cos(a := position * 10000.0 ** (-i / 3)), math.sin(a))
            by_hand = complex(plain[head, i].item(), plain[head, i + 3].item()) * turn
            assert abs(complex(keys[head, i].item(), keys[head, i + 3].item()) - by_hand) < 1e-12
    torch.testing.assert_close(values.flatten(), draft.midlayer.self_attn.v_proj.weight @ x)


def test_norms_compute_in_float32_and_let_float64_be() -> None:
    norm = RMSNorm(64, 1e-6)
    x = torch.randn(4, 64) * 300
    by_hand = x.bfloat16().float() / (x.bfloat16().float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm.bfloat16()(x.bfloat16()), by_hand.bfloat16())
    wide = norm.double()(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cast_head_keeps_its_positions(dtype: torch.dtype) -> None:
    """At position 3000 a rotation by rounded frequencies would be a random one."""
    draft, generator = random_draft(), torch.Generator().manual_seed(1)
    embed, h = torch.randn(2, 1, 6, 12, dtype=torch.float64, generator=generator)
    positions = torch.arange(3000, 3006)[None]
    exact = draft.decode(embed, h, positions, draft.new_cache(1, 3006))
    cast = draft.to(dtype)
    rounded = cast.decode(embed.to(dtype), h.to(dtype), positions, cast.new_cache(1, 3006))
    assert rounded.dtype == dtype
    error = (rounded.double() - exact).norm() / exact.norm()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


def test_features_of_the_stores_dtype_are_taken() -> None:
    draft, features = random_draft().float(), torch.randn(2, 3, 12).bfloat16()
    assert torch.equal(draft.combine(features), draft.combine(features.float()))


def test_rows_served_at_once_or_one_by_one_are_the_same() -> None:
    draft = random_draft()
    embed, h = torch.randn(2, 3, 7, 12, dtype=torch.float64)
    positions = torch.arange(7).expand(3, 7)
    together = draft.decode(embed, h, positions, draft.new_cache(3, 7))
    cache, parts = draft.new_cache(3, 9), []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        parts.append(draft.decode(embed[:, start:end], h[:, start:end], positions[:, start:end], cache))
    assert cache.length == 7
    torch.testing.assert_close(torch.cat(parts, 1), together, rtol=1e-12, atol=1e-12)


def test_rolled_back_rows_leave_no_trace() -> None:
    draft = random_draft()
    embed, h = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    positions, cache, clean = torch.arange(8)[None], draft.new_cache(1, 8), draft.new_cache(1, 8)
    draft.decode(embed[:, :4], h[:, :4], positions[:, :4], cache)
    draft.decode(embed[:, 5:], h[:, 5:], positions[:, 4:7], cache)
    cache.rollback(4)
    draft.decode(embed[:, :4], h[:, :4], positions[:, :4], clean)
    after = [draft.decode(embed[:, 4:6], h[:, 4:6], positions[:, 4:6], each) for each in (cache, clean)]
    assert torch.equal(*after)
