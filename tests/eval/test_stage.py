"""The whole stage over the tiny target: what it writes, how it goes on after an interruption, what it refuses."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.errors import Interrupted, UserError
from eagle3.configs.settings import EvalSettings, Settings, TargetSettings
from eagle3.data.chat import prompt_ids
from eagle3.data.conversations import Conversation
from eagle3.data.files import encode_line, file_sha256
from eagle3.eval import engines, speculate, stage
from eagle3.eval.jobs import make_jobs
from eagle3.eval.report import write_report
from eagle3.eval.stage import compare, evaluate
from eagle3.eval.traces import BASELINE, SPECULATIVE, TIE, Trace, read_traces
from eagle3.models.checkpoint import save_draft
from eagle3.models.draft import Eagle3Draft
from eagle3.models.native.loading import load_native
from eagle3.models.native.target import NativeTarget
from eagle3.models.target import Target, load_target, load_text

TEMPERATURES = (0.0, 1.0)
TESTS = 4  # prompts, of two sources
CHAIN, LIMIT = 2, 5
MAIN, TREE, DEPTH, NODES = f"chain {CHAIN}", "tree 6/3/3", 3, 6
SIDES = [None, MAIN, TREE]
ANSWERS = len(SIDES) * TESTS * len(TEMPERATURES)
DRAFTERS = {"NoneType": None, "ChainDrafter": MAIN, "TreeDrafter": TREE}

Decode = Callable[..., speculate.Decoded]
Evaluated = tuple[Path, list[str | None]]


@pytest.fixture(scope="module")
def settings(recipe: Settings) -> Settings:
    chosen = EvalSettings(chain=CHAIN, beside=(TREE,), temperatures=TEMPERATURES, prompts=TESTS, max_new_tokens=LIMIT)
    return replace(recipe, eval=chosen)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, new_draft: Callable[..., Eagle3Draft]) -> Path:
    """A run with prompts and a draft; not to be written to."""
    folder = tmp_path_factory.mktemp("ready")
    write_prompts(folder, ["test"] * TESTS + ["train", "validation"])
    save_draft(new_draft(), folder / "draft", torch.float32)
    return folder


@pytest.fixture
def run_dir(ready: Path, tmp_path: Path) -> Path:
    """A run before its evaluation."""
    return Path(shutil.copytree(ready, tmp_path / "run"))


@pytest.fixture(scope="module")
def by_transformers(settings: Settings) -> Settings:
    """The recipe for the other engine, which has no trees."""
    return replace(settings, eval=replace(settings.eval, engine="transformers", beside=()))


@pytest.fixture(scope="module")
def native(tiny_folder: Path) -> NativeTarget:
    return load_native(TargetSettings(path=str(tiny_folder)), 64)


@pytest.fixture(scope="module")
def evaluated(settings: Settings, ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """A run that is evaluated, and of every request its drafting, in their order; not to be written to."""
    folder = Path(shutil.copytree(ready, tmp_path_factory.mktemp("evaluated") / "run"))
    order: list[str | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "decode", watching(lambda drafter: order.append(DRAFTERS[type(drafter).__name__])))
        evaluate(settings, folder, refuse_to_decode)
    return folder, order


def write_prompts(folder: Path, splits: Sequence[str]) -> None:
    conversations = [
        Conversation(f"id {i}", ("sums", "words")[i % 2], split, [{"role": "user", "content": f"Say {'so ' * i}{i}."}])
        for i, split in enumerate(splits)
    ]
    (folder / "conversations").mkdir(exist_ok=True)
    path = folder / "conversations" / "prompts.jsonl"
    path.write_bytes(b"".join(encode_line(conversation._asdict()) for conversation in conversations))


def watching(before: Callable[[Any], None]) -> Decode:
    """Decoding that says of every request first whether it has a drafter."""

    def decode(prompt: Any, verifier: Any, drafter: Any, limits: Any, sampling: Any) -> speculate.Decoded:
        before(drafter)
        return speculate.decode(prompt, verifier, drafter, limits, sampling)

    return decode


def refuse_to_decode(_: Any) -> Any:
    raise AssertionError


class Countdown:
    """Does ``what`` before the request of this number, warm-up included."""

    def __init__(self, requests: int, what: Callable[[], None]) -> None:
        self.left, self.what = requests, what

    def __call__(self, drafter: Any) -> None:
        self.left -= 1
        if not self.left:
            self.what()


def crash() -> Any:
    raise ZeroDivisionError


def traces_of(run_dir: Path) -> list[Trace]:
    """All that does not depend on the clock."""
    return [replace(trace, ttft_s=0.0, total_s=0.0) for trace in read_traces(run_dir / "eval" / "traces.jsonl")]


def description_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "eval" / "eval.json").read_bytes())
    return found


# --- what it writes


def test_every_test_prompt_is_answered_with_every_drafting_at_every_temperature(evaluated: Evaluated) -> None:
    traces = traces_of(evaluated[0])
    assert len({trace.key for trace in traces}) == len(traces) == ANSWERS
    assert [trace.drafting for trace in traces] == SIDES * (ANSWERS // len(SIDES))
    assert all((trace.mode == BASELINE) == (trace.drafting is None) for trace in traces)
    assert {trace.mode for trace in traces} == {BASELINE, SPECULATIVE}
    assert [trace.temperature for trace in traces] == [t for t in TEMPERATURES for _ in range(len(SIDES) * TESTS)]
    assert {trace.prompt_id for trace in traces} == {f"id {i}" for i in range(TESTS)}
    assert [trace.source for trace in traces[:: len(SIDES)]] == ["sums", "words"] * (TESTS * len(TEMPERATURES) // 2)


def test_traces_are_whole(evaluated: Evaluated, tiny_target: Target) -> None:
    for trace in read_traces(evaluated[0] / "eval" / "traces.jsonl"):
        count = len(trace.ids)
        assert 1 <= count <= LIMIT
        assert len(trace.pieces) == len(trace.authors) == len(trace.repeated) == count
        assert "".join(trace.pieces) == tiny_target.tokenizer.decode(trace.ids)
        assert (trace.finish == "stop") == (trace.ids[-1] in tiny_target.info.eos_ids)
        assert trace.prompt.startswith("Say")
        conversation = Conversation("", "", "test", [{"role": "user", "content": trace.prompt}])
        assert trace.input_tokens == len(prompt_ids(tiny_target.tokenizer, conversation))
        assert 0 < trace.ttft_s <= trace.total_s
        assert (trace.lossless is not None) == (trace.mode == SPECULATIVE and trace.temperature == 0)
        if trace.mode == BASELINE:
            assert trace.rounds == () and set(trace.authors) == {"target"}
        else:
            assert 1 + sum(entry.emitted for entry in trace.rounds) == count
            assert {entry.drafted for entry in trace.rounds} <= {CHAIN if trace.drafting == MAIN else NODES}
            assert max((entry.accepted for entry in trace.rounds), default=0) <= DEPTH


def test_greedy_answers_are_those_of_plain_decoding(evaluated: Evaluated, tiny_target: Target) -> None:
    cold = [trace for trace in traces_of(evaluated[0]) if trace.temperature == 0]
    for plain, *others in zip(*[iter(cold)] * len(SIDES), strict=True):
        assert all(fast.ids == plain.ids and fast.lossless is not None and fast.lossless.equal for fast in others)
        conversation = Conversation("", "", "test", [{"role": "user", "content": plain.prompt}])
        (answer,) = tiny_target.generate([prompt_ids(tiny_target.tokenizer, conversation)], [0.0], LIMIT)
        assert plain.ids == tuple(answer.ids)


def test_both_engines_give_the_same_traces(
    evaluated: Evaluated, by_transformers: Settings, run_dir: Path, tiny_target: Target
) -> None:
    """Greedy and sampled, token by token and round by round: transformers' computes the caches in another way."""
    evaluate(by_transformers, run_dir, lambda _: tiny_target)
    ours = [trace for trace in traces_of(evaluated[0]) if trace.drafting in (None, MAIN)]
    assert traces_of(run_dir) == ours
    assert any(entry.accepted for trace in ours for entry in trace.rounds)
    assert description_of(run_dir)["engine"].startswith("transformers ")


def test_the_first_answer_rotates_among_the_prompts_of_a_source(evaluated: Evaluated) -> None:
    """What comes later may find a warmer machine: no side, in no source, may always be the one."""
    folder, order = evaluated
    size = len(SIDES)
    warm_up, groups = order[:size], [order[at : at + size] for at in range(size, len(order), size)]
    assert warm_up == SIDES
    assert len(groups) == TESTS * len(TEMPERATURES)
    sources = [trace.source for trace in traces_of(folder)[::size]]
    for source in ("sums", "words"):
        its = [group for group, of in zip(groups, sources, strict=True) if of == source]
        assert its == [SIDES[turn % size :] + SIDES[: turn % size] for turn in range(len(its))]
        assert {group[0] for group in its} == set(SIDES)


def test_seeds_are_those_of_prompts(evaluated: Evaluated) -> None:
    seeds: dict[str, set[int]] = {}
    for trace in traces_of(evaluated[0]):
        seeds.setdefault(trace.prompt_id, set()).add(trace.seed)
    assert {len(found) for found in seeds.values()} == {1}
    assert len(set.union(*seeds.values())) == TESTS


def test_eval_json_says_how(evaluated: Evaluated, settings: Settings, tiny_target: Target) -> None:
    folder, _ = evaluated
    found = description_of(folder)
    assert found["schema"] == 1 and found["batch"] == 1 and found["seed"] == settings.run.seed
    assert found["benchmark"] == "tiny" and re.fullmatch(r"eagle3 native \(.*products.*\), torch .*", found["engine"])
    assert found["settings"] == {
        "draft": None, "engine": "native", "tensor_parallel": 1, "chain": CHAIN, "beside": [TREE], "temperatures": [0.0, 1.0], "prompts": TESTS, "max_new_tokens": LIMIT, "sampling": "sampled",
        "dtype": "float32",
    }  # fmt: skip
    assert found["target"]["layers"] == list(tiny_target.info.layers) == found["draft"]["target_layers"]
    assert found["target"]["weights_sha256"] == tiny_target.info.weights_sha256
    assert found["draft"]["weights_sha256"] == file_sha256(folder / "draft" / "model.safetensors")
    assert {"torch", "transformers", "processor", "threads", "device"} <= found["environment"].keys()
    assert found["environment"]["processes"] == 1


def test_a_report_follows(evaluated: Evaluated, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "run"))
    report = write_report(folder)
    assert [(row["temperature"], row["drafting"]["method"], row["category"]) for row in report["results"]] == [
        (temperature, method, source)
        for temperature in TEMPERATURES
        for method in ("chain", "tree")
        for source in (None, "sums", "words")
    ]
    for row in (report["results"][0], report["results"][3]):
        assert row["losslessness"] == {"answers": TESTS, "diverged": 0, "ties": 0, "largest_gap": 0.0}


# --- where it goes on


def test_a_complete_evaluation_is_skipped(
    evaluated: Evaluated, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = evaluated
    before = {path: path.read_bytes() for path in (folder / "eval").iterdir()}
    monkeypatch.setattr(stage, "decode", watching(refuse_to_decode))
    monkeypatch.setattr(stage, "load_draft", refuse_to_decode)
    evaluate(settings, folder)
    assert {path: path.read_bytes() for path in (folder / "eval").iterdir()} == before


def test_a_signal_ends_it_after_a_group_and_the_rest_is_the_same(
    evaluated: Evaluated, settings: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, size = traces_of(evaluated[0]), len(SIDES)
    # A group of warm-up, the first group; the signal comes in the second group, which is finished.
    monkeypatch.setattr(
        stage, "decode", watching(Countdown(2 * size + 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    )
    with pytest.raises(Interrupted) as ended:
        evaluate(settings, run_dir)
    config = run_dir / "config.yaml"
    assert str(ended.value) == f"interrupted: 2 of 8 prompts are answered; resume with: eagle3 eval {config}"
    assert traces_of(run_dir) == whole[: 2 * size]
    assert not (run_dir / "eval" / "eval.json").exists()

    # Then it crashes in the last answer of a group, and leaves a group behind of which the last line is half.
    monkeypatch.setattr(stage, "decode", watching(Countdown(3 * size, crash)))
    with pytest.raises(ZeroDivisionError):
        evaluate(settings, run_dir)
    assert traces_of(run_dir) == whole[: 3 * size]
    path = run_dir / "eval" / "traces.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, *lines[: size - 1], lines[size - 1][:50]]))

    requests: list[Any] = []
    monkeypatch.setattr(stage, "decode", watching(requests.append))
    evaluate(settings, run_dir)
    assert traces_of(run_dir) == whole
    assert description_of(run_dir) == description_of(evaluated[0])
    assert len(requests) == size * (1 + TESTS * len(TEMPERATURES) - 3)


def test_complete_traces_need_no_decoding(evaluated: Evaluated, settings: Settings, tmp_path: Path) -> None:
    """A crash between the last group and eval.json."""
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "run"))
    (folder / "eval" / "eval.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "decode", watching(refuse_to_decode))
        evaluate(settings, folder)
    assert description_of(folder) == description_of(evaluated[0])


def test_fewer_prompts_have_the_same_answers(evaluated: Evaluated, settings: Settings, run_dir: Path) -> None:
    fewer = replace(settings, eval=replace(settings.eval, prompts=2, temperatures=(1.0,)))
    evaluate(fewer, run_dir)
    found = traces_of(run_dir)
    whole = {trace.key: trace for trace in traces_of(evaluated[0])}
    assert len(found) == 2 * len(SIDES) and {trace.source for trace in found} == {"sums", "words"}
    assert all(trace == whole[trace.key] for trace in found)


def test_the_warm_up_takes_no_more_room_than_the_shortest_answers(settings: Settings, run_dir: Path) -> None:
    chosen = EvalSettings(chain=1, beside=(TREE,), prompts=1, max_new_tokens=1)
    evaluate(replace(settings, eval=chosen), run_dir)
    assert {(len(trace.ids), trace.rounds) for trace in traces_of(run_dir)} == {(1, ())}


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_the_numerics_are_those_of_the_evaluation(settings: Settings, run_dir: Path, engine: str) -> None:
    assert settings.target.dtype == "float32"
    asked: list[TargetSettings] = []

    def load(chosen: TargetSettings) -> Target:
        asked.append(chosen)
        return load_target(chosen)

    chosen = EvalSettings(engine=engine, chain=1, temperatures=(0.0,), prompts=1, max_new_tokens=2, dtype="bfloat16")
    evaluate(replace(settings, eval=chosen), run_dir, load)
    assert asked == ([] if engine == "native" else [replace(settings.target, dtype="bfloat16")])
    assert description_of(run_dir)["target"]["dtype"] == "bfloat16"
    assert traces_of(run_dir)[1].lossless is not None


def test_room_is_asked_for_before_the_target_is_loaded(
    settings: Settings, run_dir: Path, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the longest prompt, its answer, all nodes of a tree, and one; and for the head."""
    asked: list[int] = []
    beside: list[int] = []

    def load(_: TargetSettings, capacity: int, **options: Any) -> NativeTarget:
        asked.append(capacity)
        beside.append(options["beside"])
        raise ZeroDivisionError

    monkeypatch.setattr(engines, "load_native", load)
    with pytest.raises(ZeroDivisionError):
        evaluate(settings, run_dir)
    assert asked == [longest_prompt(tiny_target) + LIMIT + NODES + 1]
    assert beside[0] > (run_dir / "draft" / "model.safetensors").stat().st_size
    assert not (run_dir / "eval").exists()


def test_a_model_that_nobody_uses_any_more_makes_room(tiny_folder: Path) -> None:
    settings = TargetSettings(path=str(tiny_folder))
    gc.disable()
    try:
        gone = weakref.ref(load_target(settings))
        assert gone() is not None  # its hooks hold it
        engines.load_engine(settings, "native", 8)
        assert gone() is None
    finally:
        gc.enable()


# --- losslessness


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_where_greedy_answers_part(tiny_target: Target, native: NativeTarget, engine: str) -> None:
    target, prompt, limit = native if engine == "native" else tiny_target, [5, 6, 7], 4
    (answer,) = tiny_target.generate([prompt], [0.0], limit)
    plain = answer.ids
    assert compare(target, prompt, plain, list(plain)).equal
    for position in range(len(plain)):
        logits = tiny_target.logits(tiny_target.forward(torch.tensor([prompt + plain[:position]])).last_hidden[0, -1])
        gap = float(logits.max() - logits.sort().values[-2])
        assert gap > TIE
        other = [*plain[:position], abs(plain[position] - 1), *plain[position + 1 :]]
        for fast in (other, plain[:position]):
            found = compare(target, prompt, plain, fast)
            assert (found.equal, found.position, found.diverged) == (False, position, True)
            assert found.gap == pytest.approx(gap, abs=1e-4)


def test_answers_that_differ_are_those_of_their_drafting(
    settings: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree's answers to the longer prompts are cut short, at every temperature."""
    known = speculate.decode

    def decode(prompt: Any, verifier: Any, drafter: Any, limits: Any, sampling: Any) -> speculate.Decoded:
        wrong = DRAFTERS[type(drafter).__name__] == TREE and limits.max_new_tokens == LIMIT and len(prompt) > shortest
        return known(prompt, verifier, drafter, limits._replace(max_new_tokens=LIMIT - wrong), sampling)

    prompts = [job.prompt for job in make_jobs(settings, run_dir, load_text(settings.target))]
    shortest = min(map(len, prompts))
    longer = sum(len(prompt) > shortest for prompt in prompts[:TESTS])
    monkeypatch.setattr(stage, "decode", decode)
    evaluate(settings, run_dir)
    found = [(trace.drafting, trace.lossless) for trace in traces_of(run_dir) if trace.lossless]
    assert all(lossless.equal for drafting, lossless in found if drafting == MAIN)
    positions = [lossless.position for drafting, lossless in found if drafting == TREE and lossless.diverged]
    assert 0 < longer < TESTS and positions == [LIMIT - 1] * longer
    report = write_report(run_dir)
    counted = [row["losslessness"] and row["losslessness"]["diverged"] for row in report["results"]]
    assert (counted[0], counted[3], set(counted[6:])) == (0, longer, {None})
    assert [line.partition(":")[0] for line in report["warnings"] if "differ" in line] == [
        f"all prompts at T=0, {TREE}"
    ]


# --- what it refuses


def longest_prompt(target: Target) -> int:
    texts = [f"Say {'so ' * i}{i}." for i in range(TESTS)]
    prompts = [Conversation("", "", "test", [{"role": "user", "content": text}]) for text in texts]
    return max(len(prompt_ids(target.tokenizer, prompt)) for prompt in prompts)


@pytest.mark.parametrize(("beside", "drafted"), [((TREE,), DEPTH), ((), CHAIN), (("chain 4", TREE), 4)])
def test_answers_longer_than_the_context(
    settings: Settings, run_dir: Path, tiny_target: Target, beside: tuple[str, ...], drafted: int
) -> None:
    """A tree reaches as many positions as it has levels, however many its nodes."""
    needed = longest_prompt(tiny_target) + 9999 + drafted + 1
    with pytest.raises(UserError) as refused:
        evaluate(replace(settings, eval=replace(settings.eval, beside=beside, max_new_tokens=9999)), run_dir)
    assert str(refused.value) == (
        f"eval.max_new_tokens = 9999: prompt, answer and drafted tokens take {needed} positions, the target has 512; "
        "lower it or leave out long prompts"
    )
    assert not (run_dir / "eval").exists()


def test_a_prompt_just_fits_or_is_too_long(settings: Settings, run_dir: Path, tiny_target: Target) -> None:
    write_prompts(run_dir, ["test"])
    conversation = Conversation("", "", "test", [{"role": "user", "content": "Say 0."}])
    left = tiny_target.info.max_positions - len(prompt_ids(tiny_target.tokenizer, conversation)) - DEPTH - 1
    with pytest.raises(
        UserError, match=f"eval.max_new_tokens = {left + 1}: .* take 513 positions, the target has 512;"
    ):
        evaluate(replace(settings, eval=replace(settings.eval, max_new_tokens=left + 1)), run_dir)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stage, "decode", watching(Countdown(1, crash)))
        evaluate(replace(settings, eval=replace(settings.eval, max_new_tokens=left)), run_dir)


def test_a_family_that_only_transformers_computes(
    settings: Settings, by_transformers: Settings, run_dir: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    elsewhere = TargetSettings(path=str(folder))
    with pytest.raises(UserError) as refused:
        evaluate(replace(settings, target=elsewhere), run_dir)
    assert str(refused.value) == (
        f"target.path = {folder}: its type is qwen3; take a target of type llama or llama4_text, or set eval.engine or "
        "record.engine to transformers"
    )
    assert not (run_dir / "eval").exists()
    with pytest.raises(ZeroDivisionError):  # it is asked for
        evaluate(replace(by_transformers, target=elsewhere), run_dir, lambda _: crash())


@pytest.mark.parametrize("splits", [[], ["train", "validation"]])
def test_no_test_prompts(settings: Settings, run_dir: Path, splits: list[str]) -> None:
    write_prompts(run_dir, splits)
    with pytest.raises(UserError, match=r"^prepare.test = 4: there are no test prompts; give 1 or more$"):
        evaluate(settings, run_dir)


@pytest.mark.parametrize(("missing", "command"), [("conversations", "prepare"), ("draft", "train")])
def test_earlier_stages_are_missing(settings: Settings, run_dir: Path, missing: str, command: str) -> None:
    shutil.rmtree(run_dir / missing)
    with pytest.raises(UserError, match=rf"^run.name = tiny: there is no .*{missing}.*; run `eagle3 {command}` first$"):
        evaluate(settings, run_dir)
    assert not (run_dir / "eval").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 16}, "its hidden size is 16, the target's is 32"),
        ({"vocab_size": 259}, "its vocabulary is 259, the target's is {vocab_size}"),
        ({"target_layers": (0, 3, 4)}, r"its captured layers is \(0, 3, 4\), the target's is \(1, 3, 4\)"),
        ({"target_layers": (1, 3)}, r"its captured layers is \(1, 3\), the target's is \(1, 3, 4\)"),
    ],
)
def test_a_draft_of_another_target(
    settings: Settings,
    run_dir: Path,
    tiny_target: Target,
    new_draft: Callable[..., Eagle3Draft],
    changes: dict[str, Any],
    problem: str,
) -> None:
    save_draft(new_draft(**changes), run_dir / "draft", torch.float32)
    problem = problem.format(vocab_size=tiny_target.info.vocab_size)
    remedy = "set target.path and target.layers to what it was trained on"
    with pytest.raises(UserError, match=f"^draft = .*/draft: {problem}; {remedy}$"):
        evaluate(settings, run_dir)
    assert not (run_dir / "eval").exists()


@pytest.mark.parametrize(
    ("section", "changes", "line"),
    [
        ("eval", {"chain": 3}, "eval.chain = 3: .*/eval was made with 2; set it back"),
        ("eval", {"chain": "auto"}, 'eval.chain = "auto": .*/eval was made with 2; set it back'),
        ("eval", {"temperatures": (0.0,)}, r"eval.temperatures = \[0.0\]: .*/eval was made with \[0.0, 1.0\]; set it back"),
        ("eval", {"beside": ()}, r'eval.beside = \[\]: .*/eval was made with \["tree 6/3/3"\]; set it back'),
        ("eval", {"engine": "transformers"}, 'eval.engine = "transformers": .*/eval was made with "native"; set it back'),
        ("eval", {"sampling": "greedy"}, 'eval.sampling = "greedy": .*/eval was made with "sampled"; set it back'),
        ("run", {"seed": 4}, "run.seed = 4: .*/eval was made with 3; set it back"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("complete", [True, False])
def test_changed_settings(
    evaluated: Evaluated,
    settings: Settings,
    tmp_path: Path,
    section: str,
    changes: dict[str, Any],
    line: str,
    complete: bool,
) -> None:
    folder = evaluated[0]
    if not complete:
        folder = Path(shutil.copytree(folder, tmp_path / "run"))
        (folder / "eval" / "eval.json").unlink()
    before = (folder / "eval" / "traces.jsonl").read_bytes()
    changed: Any = {section: replace(getattr(settings, section), **changes)}
    with pytest.raises(UserError, match=f"^{line}, choose another run.name, or delete .*/eval$"):
        evaluate(replace(settings, **changed), folder)
    assert (folder / "eval" / "traces.jsonl").read_bytes() == before


def test_changed_inputs(
    evaluated: Evaluated,
    settings: Settings,
    tmp_path: Path,
    new_draft: Callable[..., Eagle3Draft],
) -> None:
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "run"))
    save_draft(new_draft(seed=1), folder / "draft", torch.float32)
    with pytest.raises(UserError, match="^weights of the draft = .* was made with"):
        evaluate(settings, folder)
    shutil.copytree(evaluated[0] / "draft", folder / "draft", dirs_exist_ok=True)
    write_prompts(folder, ["test"] * (TESTS + 1))
    with pytest.raises(UserError, match="^prompts = .* was made with"):
        evaluate(settings, folder)
