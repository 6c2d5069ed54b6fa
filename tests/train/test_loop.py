"""The trainer on a tiny store: it learns, keeps the best head, resumes exactly, and refuses what does not fit."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

import pytest
import torch
from eagle3.configs.errors import Incomplete, Interrupted, UserError
from eagle3.configs.settings import Settings
from eagle3.data.files import file_sha256
from eagle3.data.shards import StoreSample
from eagle3.data.store import Store
from eagle3.models.checkpoint import load_draft, save_draft
from eagle3.models.draft import Eagle3Draft
from eagle3.train import batches, checkpoint, loop, stage
from eagle3.train.batches import Collated, Schedule
from eagle3.train.feed import Planned
from eagle3.train.samples import Pass, Recorded, Samples
from eagle3.train.stage import train
from eagle3.train.validate import Tally, validation_parts
from safetensors.torch import load_file, save_file

TIMING = {"seconds", "tokens_per_s", "tflop_per_s", "waited"}


def lines_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "train" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_draft(run_dir / "draft").state_dict()


@pytest.fixture(scope="module")
def trained(short: Settings, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained without an interruption."""
    run_dir = Path(shutil.copytree(finished, tmp_path_factory.mktemp("trained") / "run"))
    train(short, run_dir)
    return run_dir


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``stopping(3)``: the process gets SIGTERM while it takes step 3."""

    def stop_at(step: int) -> None:
        take = loop.Trainer._step

        def stepping(trainer: loop.Trainer, planned: Planned, parts: Iterable[Collated]) -> dict:
            if planned.batch.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(trainer, planned, parts)

        monkeypatch.setattr(loop.Trainer, "_step", stepping)

    return stop_at


def test_it_learns_and_keeps_the_best_head(short: Settings, trained: Path) -> None:
    lines = lines_of(trained)
    steps = [line for line in lines if "loss" in line]
    checks = {line["step"]: line["validation"] for line in lines if "validation" in line}
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert list(checks) == [0, *range(4, len(steps), 4), len(steps)][: len(checks)]
    done = json.loads((trained / "train" / "done.json").read_text())
    best = max(checks, key=lambda step: checks[step]["acceptance_length"])
    assert done["step"] == best
    assert done["steps"] == len(steps)
    assert round(done["acceptance_length"], 4) == checks[best]["acceptance_length"]
    draft = load_draft(trained / "draft")
    store = Store(trained / "store")
    assert draft.config.target_layers == tuple(store.manifest.target["layers"])
    assert torch.equal(draft.draft_ids, store.draft_vocabulary(short.draft.vocab_size).ids)
    noted = json.loads((trained / "draft" / "config.json").read_text())
    assert noted["eagle3_training"]["step"] == best
    assert noted["eagle3_target"]["weights_sha256"] == store.manifest.target["weights_sha256"]


def test_a_run_says_how_fast_it_is(short: Settings, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(short, run_dir)
    said = capsys.readouterr()
    assert re.search(
        r"^15 steps in 0:\d\d, validation apart: [\d,]+ tokens/s, 0\.\d\d TFLOP/s, waiting for data \d+%$",
        said.out,
        re.M,
    )
    assert re.search(r"^train 15/15, loss [\d.]+, accuracy .*, AL 1\.\d\d, .*, 0:00 left$", said.err, re.M)
    steps = [line for line in map(json.loads, (run_dir / "train" / "metrics.jsonl").open()) if "loss" in line]
    assert all(line["tflop_per_s"] > 0 and 0 <= line["waited"] <= 1 and "mfu" not in line for line in steps)


def test_only_the_newest_checkpoints_stay(short: Settings, trained: Path) -> None:
    kept = checkpoint.checkpoints(trained / "train" / "checkpoints")
    last = json.loads((trained / "train" / "done.json").read_text())["steps"]
    assert len(kept) == short.train.keep_checkpoints
    assert checkpoint.step_of(kept[-1]) == last


def test_a_trained_run_is_left_alone(short: Settings, trained: Path) -> None:
    before = (trained / "train" / "metrics.jsonl").stat().st_mtime_ns
    train(short, trained)
    assert (trained / "train" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def by_muon(short: Settings) -> Settings:
    """The recipe with Muon and a linear decay."""
    return replace(short, train=replace(short.train, optimizer="muon", schedule="linear"))


@pytest.fixture(scope="module")
def trained_by_muon(by_muon: Settings, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that Muon trained without an interruption."""
    run_dir = Path(shutil.copytree(finished, tmp_path_factory.mktemp("muon") / "run"))
    train(by_muon, run_dir)
    return run_dir


@pytest.mark.parametrize(("step", "optimizer"), [(1, "adamw"), (4, "adamw"), (6, "adamw"), (1, "muon"), (6, "muon")])
def test_a_stopped_run_goes_on_to_the_same_head(
    request: pytest.FixtureRequest, run_dir: Path, stopping: Callable[[int], None], step: int, optimizer: str
) -> None:
    names = {"adamw": ("short", "trained"), "muon": ("by_muon", "trained_by_muon")}[optimizer]
    settings, undisturbed = map(request.getfixturevalue, names)
    stopping(step)
    with pytest.raises(Interrupted, match=f"step {step} of .* is saved; resume with: eagle3 train .*config.yaml"):
        train(settings, run_dir)
    stopping(-1)
    train(settings, run_dir)
    assert lines_of(run_dir) == lines_of(undisturbed)
    assert all(torch.equal(tensor, weights_of(undisturbed)[name]) for name, tensor in weights_of(run_dir).items())


def test_muon_learns_and_keeps_one_moment_of_a_matrix(by_muon: Settings, trained_by_muon: Path) -> None:
    losses = [line["loss"] for line in lines_of(trained_by_muon) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    newest = checkpoint.checkpoints(trained_by_muon / "train" / "checkpoints")[-1]
    parts: dict[str, set[str]] = {}
    for name in load_file(newest / "state.safetensors"):
        parameter, _, part = name.rpartition("/")
        parts.setdefault(parameter, set()).add(part)
    for name, parameter in load_draft(trained_by_muon / "draft").named_parameters():
        kept = {"momentum_buffer"} if parameter.dim() == 2 and name != "lm_head.weight" else {"exp_avg", "exp_avg_sq"}
        assert parts[name] == {"weight"} | kept


def test_a_checkpoint_of_the_other_optimizer_is_refused(
    short: Settings, by_muon: Settings, trained: Path, trained_by_muon: Path, tmp_path: Path
) -> None:
    for settings, other, theirs in ((by_muon, trained, "adamw"), (short, trained_by_muon, "muon")):
        with pytest.raises(UserError, match=f'train.optimizer = .*was made with "{theirs}"; set it back'):
            train(settings, other)
    run_dir = Path(shutil.copytree(trained_by_muon, tmp_path / "run"))
    shutil.rmtree(run_dir / "train" / "checkpoints")
    shutil.copytree(trained / "train" / "checkpoints", run_dir / "train" / "checkpoints")
    (run_dir / "train" / "done.json").unlink()
    with pytest.raises(UserError, match="it is not a checkpoint of this head and optimizer; delete"):
        train(by_muon, run_dir)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    short: Settings, trained: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 5 and 6 are taken twice; a line that was being written is cut off."""
    with monkeypatch.context() as patch:
        take = loop.Trainer._step

        def stepping(trainer: loop.Trainer, planned: Planned, parts: Iterable[Collated]) -> dict:
            if planned.batch.step == 7:
                raise KeyboardInterrupt
            return take(trainer, planned, parts)

        patch.setattr(loop.Trainer, "_step", stepping)
        with pytest.raises(KeyboardInterrupt):
            train(short, run_dir)
    with (run_dir / "train" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    train(short, run_dir)
    assert lines_of(run_dir) == lines_of(trained)
    assert all(torch.equal(tensor, weights_of(trained)[name]) for name, tensor in weights_of(run_dir).items())


@pytest.mark.slow
def test_ten_kills_leave_no_trace(short: Settings, finished: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, once in every seven steps."""
    longer = replace(short, train=replace(short.train, epochs=15, keep_checkpoints=1))
    undisturbed, killed = (Path(shutil.copytree(finished, tmp_path / name)) for name in ("undisturbed", "killed"))
    train(longer, undisturbed)
    random, fork = Random(0), multiprocessing.get_context("fork")
    for number in range(11):
        process = fork.Process(target=train, args=(longer, killed))
        process.start()
        if number < 10:
            wait_for_step(killed, 7 * number + random.randint(1, 7), process)
            time.sleep(0.02 * random.random())
            process.kill()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if number < 10 else 0)
    assert lines_of(killed) == lines_of(undisturbed)
    assert all(torch.equal(tensor, weights_of(undisturbed)[name]) for name, tensor in weights_of(killed).items())


def wait_for_step(run_dir: Path, step: int, process: BaseProcess) -> None:
    log = run_dir / "train" / "metrics.jsonl"
    while process.is_alive() and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.001)


def test_eight_micro_batches_are_the_batch(short: Settings, finished: Path, tmp_path: Path) -> None:
    """Of 8, the last of a small batch may be empty."""
    found = []
    for accumulation in (1, 8):
        run_dir = Path(shutil.copytree(finished, tmp_path / str(accumulation)))
        chosen = replace(short.train, accumulation=accumulation, batch_tokens=400, epochs=2, learning_rate=1e-3)
        train(replace(short, train=chosen), run_dir)
        found.append([line for line in lines_of(run_dir) if "loss" in line])
    for eight, one in zip(*reversed(found), strict=True):
        assert eight["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert eight["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


class Silent:
    """A store's training samples, of which the first batch's have no answer."""

    def __init__(self, samples: Samples, silent: tuple[int, ...]) -> None:
        self._samples, self._silent = samples, silent
        self.lengths, self.passes, self.ready, self.covered = (
            samples.lengths,
            samples.passes,
            samples.ready,
            samples.covered,
        )

    def loss_mask(self, index: int) -> torch.Tensor:
        mask = self._samples.loss_mask(index)
        return torch.zeros_like(mask) if index in self._silent else mask

    def __getitem__(self, index: int) -> StoreSample:
        return self._samples[index]._replace(loss_mask=self.loss_mask(index))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_batch_of_prompts_alone_teaches_nothing(
    short: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    chosen = replace(short.train, epochs=1, accumulation=accumulation)
    schedule = Schedule(
        [Pass(0, Store(run_dir / "store").indices("train"))], Store(run_dir / "store").lengths(), 200, 3
    )
    silent = next(schedule.from_step(0)).samples
    monkeypatch.setattr(stage, "Recorded", lambda *given: Silent(Recorded(*given), silent))
    before: dict[str, torch.Tensor] = {}

    def stepped(trainer: loop.Trainer, planned: Planned, parts: Iterable[Collated]) -> dict:
        if planned.batch.step == 1:
            before.update({name: tensor.clone() for name, tensor in trainer.module.state_dict().items()})
        line = take(trainer, planned, parts)
        if planned.batch.step == 1:
            assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.module.state_dict().items())
        return line

    take = loop.Trainer._step
    monkeypatch.setattr(loop.Trainer, "_step", stepped)
    train(replace(short, train=chosen), run_dir)
    first, *others = [line for line in lines_of(run_dir) if "loss" in line]
    assert before and (first["loss"], first["grad_norm"], set(first["accuracy"])) == (0.0, 0.0, {0.0})
    assert all(line["loss"] > 0 for line in others)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_names_step_and_samples(
    short: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def losing(self: loop.TrainingTimeTest, batch: object) -> object:
        trained = forward(self, batch)
        if not self.training:
            return trained
        if what == "loss":
            return trained._replace(loss=trained.loss * math.nan)
        trained.loss.register_hook(lambda gradient: gradient * math.nan)
        return trained

    forward = loop.TrainingTimeTest.forward
    monkeypatch.setattr(loop.TrainingTimeTest, "forward", losing)
    said = rf"the {what} of step 1 is nan; its samples are train-\d+, .*; there is no checkpoint yet; lower"
    with pytest.raises(Incomplete, match=said):
        train(short, run_dir)


@pytest.mark.parametrize(("split", "early"), [("train", True), ("train", False), ("validation", True)])
def test_a_damaged_sample_is_named(
    short: Settings, run_dir: Path, split: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shard has it whose flipped bits nobody looked for."""
    store = Store(run_dir / "store")
    sample = store[store.indices(split)[2]]
    shard = next(
        path for path in (run_dir / "store").glob("shard-*.safetensors") if sample.id.encode() in path.read_bytes()
    )
    state = sample.features[len(sample.input_ids) - 3, 1].contiguous().view(torch.uint8).numpy().tobytes()
    content = shard.read_bytes()
    assert content.count(state) == 1
    shard.write_bytes(content.replace(state, b"\xc0\x7f" + state[2:]))
    if not early:  # nor did the first samples, after which the head's weights are scaled, hold it
        monkeypatch.setattr(batches, "check_finite", lambda sample: None)
        monkeypatch.setattr(loop, "begin", lambda *inputs: None)
    with pytest.raises(UserError, match=f"store = sample {sample.id}: it has states that are not finite; find its"):
        train(short, run_dir)


def test_a_head_that_gets_no_better_ends_the_run(short: Settings, run_dir: Path) -> None:
    """The run goes no further when it is started again either."""
    stubborn = replace(short, train=replace(short.train, learning_rate=1e-12, epochs=20, patience=2))
    train(stubborn, run_dir)
    done = json.loads((run_dir / "train" / "done.json").read_text())
    assert (done["step"], done["steps"]) == (0, 2 * short.train.validate_every)
    (run_dir / "train" / "done.json").unlink()
    train(stubborn, run_dir)
    assert json.loads((run_dir / "train" / "done.json").read_text()) == done


def test_a_run_killed_behind_its_last_checkpoint_is_done(short: Settings, trained: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    (run_dir / "train" / "done.json").unlink()
    train(short, run_dir)
    for name in ("done.json", "metrics.jsonl"):
        assert (run_dir / "train" / name).read_bytes() == (trained / "train" / name).read_bytes()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "the checkpoint cannot be read "),
        (lambda path: path.unlink(), "the checkpoint cannot be read "),
        (
            lambda path: save_file({"lm_head.weight/weight": torch.ones(3)}, path, {"step": "15"}),
            "it is not a checkpoint",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    short: Settings, trained: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    (run_dir / "train" / "done.json").unlink()
    spoil(checkpoint.checkpoints(run_dir / "train" / "checkpoints")[-1] / "state.safetensors")
    with pytest.raises(
        UserError, match=f"train = .*step-000015/state.safetensors: {said}.*; delete .*step-000015 to go on"
    ):
        train(short, run_dir)
    shutil.rmtree(run_dir / "train" / "checkpoints" / "step-000015")
    train(short, run_dir)
    assert all(torch.equal(tensor, weights_of(trained)[name]) for name, tensor in weights_of(run_dir).items())


@pytest.mark.parametrize(
    ("section", "values", "setting"),
    [
        ("train", {"epochs": 9}, "train.epochs"),
        ("draft", {"intermediate_size": 64}, "draft.intermediate_size"),
        ("run", {"seed": 9}, "run.seed"),
    ],
)
def test_changed_settings_are_refused(
    short: Settings, trained: Path, section: str, values: dict[str, int], setting: str
) -> None:
    other = replace(short, **{section: replace(getattr(short, section), **values)})
    with pytest.raises(UserError, match=f"{setting} = .*was made with.*set it back"):
        train(other, trained)


def test_how_a_run_is_kept_and_logged_may_change(short: Settings, trained: Path) -> None:
    train(replace(short, train=replace(short.train, keep_checkpoints=1, accumulation=2)), trained)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("draft", {"vocab_size": 1 << 20}, "draft.vocab_size = 1048576: the target has a vocabulary of"),
        ("draft", {"num_kv_heads": 3}, "draft.num_kv_heads = 3: it does not divide the 4 heads"),
        ("target", {"layers": (0, 1, 2)}, r"target.layers = \[0, 1, 2\]: .* was recorded with \[1, 3, 4\]"),
        ("target", {"path": "another"}, "target.path = another: .* was recorded with"),
    ],
)
def test_what_does_not_fit_the_store_is_refused(
    short: Settings, run_dir: Path, section: str, values: dict[str, object], message: str
) -> None:
    other = replace(short, **{section: replace(getattr(short, section), **values)})
    with pytest.raises(UserError, match=message):
        train(other, run_dir)


def test_there_is_nothing_to_train_on_without_a_store(short: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run eagle3 record first"):
        train(short, tmp_path)


def test_offline_tracking_leaves_a_record(short: Settings, run_dir: Path) -> None:
    train(replace(short, train=replace(short.train, epochs=1, tracker="offline")), run_dir)
    assert list((run_dir / "wandb").glob("offline-run-*"))


def test_the_learning_rate_rises_and_falls_to_nothing(short: Settings) -> None:
    chosen = replace(short.train, warmup=0.1, learning_rate=1.0)
    rates = [loop.learning_rate(step, 100, chosen) for step in range(101)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    linear = [loop.learning_rate(step, 100, replace(chosen, schedule="linear")) for step in range(101)]
    assert linear[:11] == rates[:11]
    assert linear[10:] == [pytest.approx((100 - step) / 90) for step in range(10, 101)]


def parts(ranks: int, count: int = 37) -> Iterator[list[tuple[int, ...]]]:
    lengths = [(7 * index) % 23 for index in range(count)]
    return (validation_parts(range(count), lengths, rank, ranks) for rank in range(ranks))


@pytest.mark.parametrize("ranks", [1, 2, 5, 40])
def test_every_rank_validates_as_often_as_the_others(ranks: int) -> None:
    """Under ZeRO-3 a forward is a collective."""
    found = list(parts(ranks))
    assert len({len(mine) for mine in found}) == 1
    assert sorted(index for mine in found for part in mine for index in part) == list(range(37))


def test_validation_does_not_depend_on_how_it_is_shared(short: Settings, trained: Path) -> None:
    store = Store(trained / "store")
    draft = load_draft(trained / "draft")
    head = store.head()
    module = loop.TrainingTimeTest(draft, head.embedding, head.lm_head, short.train)
    found = []
    for ranks in (1, 3):
        tally = Tally(short.train.ttt_steps, 2)
        for rank in range(ranks):
            for part in validation_parts(store.indices("validation"), store.lengths(), rank, ranks):
                batch = loop.collate([store[index] for index in part]).on(torch.device("cpu"))
                with torch.no_grad():
                    tally.add(batch, module(batch))
        found.append(tally.result())
    assert found[0].rounds == found[1].rounds > 0
    assert found[0].accuracy == found[1].accuracy
    assert found[0].acceptance_length == found[1].acceptance_length
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)


@pytest.fixture(scope="module")
def shifted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head as the trained one, over another vocabulary, as if another trainer had chosen it."""
    draft, folder = load_draft(trained / "draft"), tmp_path_factory.mktemp("theirs") / "head"
    others = [token for token in range(draft.config.vocab_size) if token not in set(draft.draft_ids.tolist())]
    ids = torch.tensor(sorted([*draft.draft_ids.tolist()[:-1], others[-1]]))
    theirs = Eagle3Draft(draft.config, ids)
    kept = {name: tensor for name, tensor in draft.state_dict().items() if name not in ("d2t", "t2d")}
    theirs.load_state_dict(theirs.state_dict() | kept)
    save_draft(theirs, folder, torch.float32)
    return folder


def test_a_warm_start_begins_where_the_head_is_and_keeps_its_vocabulary(
    short: Settings, trained: Path, shifted: Path, run_dir: Path
) -> None:
    settings = replace(short, train=replace(short.train, warm_start=str(shifted), epochs=1))
    train(settings, run_dir)
    lines = lines_of(run_dir)
    cold, warm = lines_of(trained)[0]["validation"], lines[0]["validation"]
    assert warm["loss"] < 0.9 * cold["loss"]
    assert torch.equal(load_draft(run_dir / "draft").draft_ids, load_draft(shifted).draft_ids)
    noted = json.loads((run_dir / "draft" / "config.json").read_text())["eagle3_training"]
    assert noted["warm_start"] == file_sha256(shifted / "model.safetensors")
    train(settings, run_dir)  # done, and still the same


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("draft", {"vocab_size": 32}, "it has another shape than the recipe says; set draft.vocab_size=64$"),
        (
            "draft",
            {"intermediate_size": 40, "norm_output": True},
            "; set draft.intermediate_size=48 draft.norm_output=False$",
        ),
    ],
)
def test_a_warm_start_of_another_shape_is_refused(
    section: str, changes: dict, said: str, short: Settings, shifted: Path, run_dir: Path
) -> None:
    started = replace(short, train=replace(short.train, warm_start=str(shifted)))
    with pytest.raises(UserError, match=f"train.warm_start = .*{said}"):
        train(replace(started, **{section: replace(getattr(started, section), **changes)}), run_dir)


def test_a_warm_start_from_other_layers_or_from_nowhere_is_refused(
    short: Settings, shifted: Path, run_dir: Path, tmp_path: Path
) -> None:
    draft = load_draft(shifted)
    other = Eagle3Draft(replace(draft.config, target_layers=(0, 3, 4)), draft.draft_ids)
    save_draft(other, tmp_path / "other", torch.float32)
    for path, said in (("other", r"its target_layers is \(0, 3, 4\), and the store's \(1, 3, 4\); "), ("none", "")):
        settings = replace(short, train=replace(short.train, warm_start=str(tmp_path / path)))
        with pytest.raises(UserError, match=said or "draft = .*none/config.json: there is no such file"):
            train(settings, run_dir)
