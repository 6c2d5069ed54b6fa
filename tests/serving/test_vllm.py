"""What we train is what vLLM serves: the same tokens, and the same drafted ones accepted, position by position."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eagle3.cli import main
from eagle3.eval.live import LiveEngine
from eagle3.eval.serving import Served, ask, decode_all, differences
from eagle3.models.checkpoint import load_draft, save_draft
from eagle3.models.draft import Eagle3Draft
from eagle3.models.rollout import RolloutBatch, rollout
from eagle3.models.start import feature_scale
from eagle3.models.target import Target
from safetensors.torch import load_file, save_file

from .conftest import CHAIN, MOST, PYTHON, TARGET, Serve

pytestmark = pytest.mark.serving

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
Make = Callable[[Eagle3Draft, Target, list[list[int]]], Eagle3Draft]


@pytest.fixture(scope="module")
def plain(target: Target, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy decoding of the target alone."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    answers = target.generate([prompts[at] for at in order], [0.0] * len(prompts), MOST)
    found = dict(zip(order, (answer.ids for answer in answers), strict=True))
    return [found[at] for at in range(len(prompts))]


@pytest.fixture(scope="module")
def ours(run: Path, target: Target, prompts: list[list[int]], engines: dict[str, Future[LiveEngine]]) -> Served:
    """Our own decoder's answers, while the engines start."""
    return decode_all(target, load_draft(run / "draft").eval(), prompts, CHAIN, MOST)


def variant(run: Path, draft: Eagle3Draft) -> Path:
    """A run like ``run`` with another head."""
    folder = run.parent / f"fc_norm-{draft.config.fc_norm}-D{draft.config.draft_vocab_size}"
    shutil.copytree(run, folder)
    noted = json.loads((run / "draft" / "config.json").read_text())
    kept = {key: noted[key] for key in ("eagle3_target", "eagle3_training")}
    save_draft(draft, folder / "draft", torch.float32, kept)
    return folder


def whole_vocabulary(draft: Eagle3Draft, target: Target, prompts: list[list[int]]) -> Eagle3Draft:
    """``draft``, with the target's rows for the tokens that it could not propose."""
    whole = Eagle3Draft(replace(draft.config, draft_vocab_size=draft.config.vocab_size))
    weights = {name: tensor for name, tensor in draft.state_dict().items() if name not in ("d2t", "t2d")}
    rows = target.head.lm_head.float().clone()
    rows[draft.draft_ids] = draft.lm_head.weight.detach()
    whole.load_state_dict(weights | {"lm_head.weight": rows})
    return whole.eval()


def of_every_flag(draft: Eagle3Draft, target: Target, prompts: list[list[int]]) -> Eagle3Draft:
    """``draft`` with EAGLE-3.1's flags and a normed residual, and norms that leave its features about as they were."""
    flags = {"fc_norm": True, "norm_output": True, "norm_before_residual": True}
    flagged = Eagle3Draft(replace(draft.config, **flags), draft.draft_ids)
    features = target.forward(torch.tensor(prompts[0])[None]).features[0]
    norms = {
        f"fc_norm.{at}.weight": torch.full((draft.config.hidden_size,), float(scale))
        for at, scale in enumerate(feature_scale(draft, features))
    }
    flagged.load_state_dict(draft.state_dict() | norms)
    return flagged.eval()


VARIANTS: dict[str, Make] = {"whole": whole_vocabulary, "flags": of_every_flag}


@pytest.fixture(scope="module")
def heads(run: Path, target: Target, prompts: list[list[int]]) -> dict[str, Path]:
    """The demo's head in several formats, other kinds of head made of it, and one whose layers are shifted by one."""
    found = {}
    for name, form in (("hf", "hf"), ("speculators", "speculators"), ("shifted", "vllm")):
        found[name] = run.parent / name
        assert main(["export", str(run), "--format", form, "--out", str(found[name])]) == 0
    config = json.loads((found["shifted"] / "config.json").read_text())
    config[LAYER_IDS] = [layer - 1 for layer in config[LAYER_IDS]]
    (found["shifted"] / "config.json").write_text(json.dumps(config))
    for name, make in VARIANTS.items():
        folder = variant(run, make(load_draft(run / "draft"), target, prompts))
        found[name] = folder / "hf"
        assert main(["export", str(folder), "--format", "hf", "--out", str(found[name])]) == 0
    return found


@pytest.fixture(scope="module")
def engines(heads: dict[str, Path], serve: Serve) -> dict[str, Future[LiveEngine]]:
    """A vLLM for every head; they start two at a time while others are asked."""
    chosen = {"method": "eagle3", "num_speculative_tokens": CHAIN}
    return {name: serve(name, speculative_config=chosen | {"model": str(head)}) for name, head in heads.items()}


def agrees(engine: LiveEngine, target: Target, prompts: list[list[int]], plain: list[list[int]], ours: Served) -> None:
    theirs = ask(engine, prompts, MOST)
    print(f"ours {ours.counters}\nvLLM {theirs.counters}")
    assert differences(target, prompts, ours, theirs) == []
    assert differences(target, prompts, ours._replace(answers=plain), theirs) == []
    assert ours.counters.acceptance_length > 1.2  # else nothing was compared


@pytest.mark.parametrize("form", ["hf", "speculators"])
def test_the_demos_head_is_served_as_we_decode(
    form: str,
    engines: dict[str, Future[LiveEngine]],
    target: Target,
    prompts: list[list[int]],
    plain: list[list[int]],
    ours: Served,
) -> None:
    agrees(engines[form].result(), target, prompts, plain, ours)


def test_layers_shifted_by_one_are_told_by_the_files_and_by_the_engine(
    run: Path,
    heads: dict[str, Path],
    engines: dict[str, Future[LiveEngine]],
    target: Target,
    prompts: list[list[int]],
    ours: Served,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = engines["shifted"].result()
    command = ["export", str(run), "--format", "vllm", "--out", str(heads["shifted"]), "--check", "--against"]
    assert main([*command, engine.url]) == 3
    assert "it will capture the outputs of layers [0, 6, 11], and the head was trained on [1, 7, 12] (numbered by" in (
        capsys.readouterr().err
    )
    found = differences(target, prompts, ours, ask(engine, prompts, MOST))
    assert found
    assert all(line.startswith(("position", "it took")) for line in found)  # what it says is still the target's


@pytest.mark.parametrize("name", VARIANTS)
def test_other_kinds_of_head_are_too(
    name: str,
    run: Path,
    engines: dict[str, Future[LiveEngine]],
    target: Target,
    prompts: list[list[int]],
    plain: list[list[int]],
) -> None:
    draft = VARIANTS[name](load_draft(run / "draft"), target, prompts)
    ours = decode_all(target, draft, prompts, CHAIN, MOST)
    agrees(engines[name].result(), target, prompts, plain, ours)


def test_the_speculators_package_computes_our_logits(run: Path, target: Target, tmp_path: Path) -> None:
    """A reader that we did not write, over a rollout of three steps."""
    head, draft = tmp_path / "head", load_draft(run / "draft").eval()
    assert main(["export", str(run), "--format", "speculators", "--out", str(head)]) == 0
    ids = torch.randint(10, 2000, (1, 40), generator=torch.Generator().manual_seed(0))
    seen, embedding = target.forward(ids), target.head.embedding.float().contiguous()
    given = {
        "features": seen.features[0, :-1].flatten(1).clone(),
        "next_ids": ids[0, 1:].clone(),
        "embedding": embedding,
    }
    save_file(given, tmp_path / "given")
    script = Path(__file__).with_name("read_speculators.py")
    command = [str(PYTHON), str(script), str(head), str(TARGET), "given", "out"]
    subprocess.run(command, check=True, cwd=tmp_path)
    theirs = load_file(tmp_path / "out")
    assert torch.equal(theirs["d2t"], draft.d2t)
    batch = RolloutBatch(
        ids[0], torch.ones(40, dtype=torch.bool), seen.features[0], seen.last_hidden[0], torch.tensor([40])
    )
    with torch.no_grad():
        for step, output in enumerate(rollout(draft, embedding, batch, 3)):
            logits = theirs[str(step)][output.rows]
            torch.testing.assert_close(logits, draft.logits(output.y), rtol=1e-5, atol=1e-4)
