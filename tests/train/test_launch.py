"""Real launchers: the same trainer under accelerate, torchrun and DeepSpeed, on two processes without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from eagle3.cli import main
from eagle3.configs import loader
from eagle3.configs.errors import UserError
from eagle3.configs.settings import Settings, TrainSettings
from eagle3.models.checkpoint import load_draft
from eagle3.models.formats import FORMATS
from eagle3.train.checkpoint import checkpoints
from eagle3.train.launch import check_engine, configure, make_accelerator
from eagle3.train.stage import train
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ACCELERATE = [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "configs/accelerate/cpu_2ranks.yaml")]
LAUNCHERS = {
    "alone": [sys.executable],
    "zero2 alone": [*ACCELERATE, "--main_process_port", "29624", "--zero_stage", "2", "--num_processes", "1"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "29611"],
    **{f"zero{stage}": [*ACCELERATE, "--main_process_port", f"2962{stage}", "--zero_stage", str(stage)] for stage in (1, 2, 3)},
}  # fmt: skip
#: What the trainer says that it runs by.
SAYS = {
    "alone": "train: plain torch, 1 rank, float32, cpu",
    "zero2 alone": "train: DeepSpeed ZeRO-2, 1 rank, float32, cpu",
    "torchrun": "train: DDP, 2 ranks, float32, cpu",
    **{f"zero{stage}": f"train: DeepSpeed ZeRO-{stage}, 2 ranks, float32, cpu" for stage in (1, 2, 3)},
}


@pytest.fixture
def launch(longer: Settings, run_dir: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the trainer on the complete run, in its recipe, by a launcher."""
    recipe = run_dir.parent / "recipe.yaml"
    recipe.write_text(loader.dump(longer))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def start(launcher: list[str], *overrides: str) -> subprocess.Popen[str]:
        settings = [f"run.root={run_dir.parent}", f"run.name={run_dir.name}", *overrides]
        command = [*launcher, "-m", "eagle3.train", str(recipe), *settings]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    return start


@pytest.fixture(scope="module")
def longer(short: Settings) -> Settings:
    """Some 25 steps, which are not so large that rounding grows beyond what is compared."""
    return replace(short, train=replace(short.train, epochs=6, learning_rate=1e-3))


@pytest.fixture(scope="module")
def alone(longer: Settings, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run trained by one process."""
    run_dir = Path(shutil.copytree(finished, tmp_path_factory.mktemp("alone") / "run"))
    train(longer, run_dir)
    return run_dir


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "train" / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


def last_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """The optimiser's whole state after the last step."""
    return load_file(checkpoints(run_dir / "train" / "checkpoints")[-1] / "state.safetensors")


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        error = (tensor - theirs[name]).norm() / theirs[name].norm()
        assert error < (1e-5 if name.endswith("/weight") else 1e-3), name


def validated(run_dir: Path) -> list[float]:
    return [line["validation"]["loss"] for line in lines(run_dir) if "validation" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accumulation"), [("torchrun", 1), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_two_processes_train_what_one_trains(
    launch: Callable[..., subprocess.Popen[str]], alone: Path, run_dir: Path, name: str, accumulation: int
) -> None:
    """Gradients are far above the largest norm: where clipping, a rate or accumulation were not the recipe's, losses would not agree."""
    assert all(line["grad_norm"] > 10 * TrainSettings.clip for line in lines(alone) if "grad_norm" in line)
    process = launch(LAUNCHERS[name], f"train.accumulation={accumulation}")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert SAYS[name] in said
    assert len(losses(alone)) > 20
    assert losses(run_dir) == [pytest.approx(loss, rel=1e-5) for loss in losses(alone)]
    assert validated(run_dir) == [pytest.approx(loss, rel=1e-4) for loss in validated(alone)]
    ours, theirs = load_draft(run_dir / "draft"), load_draft(alone / "draft")
    assert ours.config == theirs.config
    assert ours.draft_ids.equal(theirs.draft_ids)
    assert all(tensor.equal(theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())  # in bfloat16
    assert_close(last_state(run_dir), last_state(alone))
    for form in FORMATS:  # an optimiser-sharded head exports with every tensor and buffer: the export checks itself
        assert main(["export", str(run_dir), "--format", form, "--out", str(run_dir / form)]) == 0
    assert json.loads((run_dir / "train" / "done.json").read_text())["steps"] == len(losses(alone))


@pytest.mark.slow
def test_two_processes_train_by_muon_what_one_trains(
    launch: Callable[..., subprocess.Popen[str]], longer: Settings, run_dir: Path, tmp_path: Path
) -> None:
    """Stopped once on the way."""
    chosen = replace(longer, train=replace(longer.train, optimizer="muon"))
    alone = Path(shutil.copytree(run_dir, tmp_path / "alone"))
    train(chosen, alone)
    first = launch(LAUNCHERS["torchrun"], "train.optimizer=muon")
    after(run_dir, 7, first)
    os.kill(trainers(first)[0], signal.SIGTERM)
    first.communicate(timeout=400)
    process = launch(LAUNCHERS["torchrun"], "train.optimizer=muon")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert losses(run_dir) == [pytest.approx(loss, rel=1e-4) for loss in losses(alone)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2 alone", "zero3"])
def test_muon_under_deepspeed_is_refused(
    launch: Callable[..., subprocess.Popen[str]], run_dir: Path, name: str
) -> None:
    process = launch(LAUNCHERS[name], "train.optimizer=muon")
    said, _ = process.communicate(timeout=400)
    assert process.returncode != 0
    assert "error: train.optimizer = muon: it needs whole matrices, and DeepSpeed" in said
    assert "set train.optimizer=adamw, or launch without DeepSpeed (plain DDP)" in said
    assert re.search(r"exitcode\s*: 2\b", said)
    assert not (run_dir / "train").exists()


@pytest.mark.slow
@pytest.mark.parametrize("starts", [("zero2", "zero2 alone", "zero2"), ("zero3", "alone", "zero3", "zero1")])
def test_a_run_goes_on_under_other_ranks_and_stages(
    launch: Callable[..., subprocess.Popen[str]], alone: Path, run_dir: Path, starts: tuple[str, ...]
) -> None:
    """From one checkpoint to the next; the optimiser's state goes along, and the batches are the same."""
    for number, name in enumerate(starts, 1):
        process = launch(LAUNCHERS[name], "train.keep_checkpoints=99")
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said
        assert SAYS[name] in said
        if number < len(starts):
            cut_back(run_dir, number)
    assert [line["step"] for line in lines(run_dir)] == [line["step"] for line in lines(alone)]
    assert losses(run_dir) == [pytest.approx(loss, rel=1e-5) for loss in losses(alone)]
    assert_close(last_state(run_dir), last_state(alone))


@pytest.mark.slow
def test_bfloat16_under_zero_goes_on_exactly(launch: Callable[..., subprocess.Popen[str]], run_dir: Path) -> None:
    """From a checkpoint on the way; the float32 weights that DeepSpeed keeps beside the head's own come back, too."""
    on_gpus = str(ROOT / "configs/accelerate/8gpu.yaml")
    bfloat16 = [*ACCELERATE[:2], "--config_file", on_gpus, "--num_processes", "2", "--main_process_port", "29625"]
    found = []
    for _ in range(2):
        process = launch(bfloat16, "train.keep_checkpoints=99")
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said
        assert "train: DeepSpeed ZeRO-2, 2 ranks, bfloat16, cpu" in said
        found.append((losses(run_dir), last_state(run_dir)))
        cut_back(run_dir, 2)
    (undisturbed, theirs), (resumed, ours) = found
    assert resumed == undisturbed
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_every_stage_goes_on_exactly_and_hands_its_state_to_every_other() -> None:
    """ZeRO 0 to 3 in float32 and bfloat16, on two ranks in one start."""
    script = Path(__file__).with_name("zero_state.py")
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "29612", str(script)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "8 engines"


@pytest.mark.parametrize(
    ("variables", "refusal"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP = true: training does not support FSDP"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision = fp16: training does not support it"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED = true: DeepSpeed needs a launcher"),
    ],
)
def test_what_a_launcher_asks_for_and_would_not_get_is_refused(
    variables: dict[str, str], refusal: str, short: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=re.escape(refusal)):
        make_accelerator(short, tmp_path)


def test_deepspeed_is_given_what_the_recipe_says(short: Settings) -> None:
    settings = replace(short, train=replace(short.train, clip=0.25, accumulation=3))
    plugin = DeepSpeedPlugin(zero_stage=3)
    configure(plugin, settings)
    assert plugin.deepspeed_config["gradient_clipping"] == 0.25
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == 3
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0: the recipe has train.clip=0.5; set train.clip=1.0"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4: the recipe has train.accumulation=1"),
        (
            {"offload_optimizer_device": "cpu"},
            "zero_optimization.offload_optimizer.device = cpu: training cannot resume",
        ),
    ],
)
def test_what_deepspeed_is_told_otherwise_is_refused(options: dict[str, Any], refusal: str, short: Settings) -> None:
    with pytest.raises(UserError, match=re.escape(refusal)):
        configure(DeepSpeedPlugin(zero_stage=2, **options), short)


@pytest.mark.parametrize(
    ("found", "variables", "refusal"),
    [
        (1, {}, "zero_stage = 2: DeepSpeed runs stage 1"),
        (None, {}, "zero_stage = 2: DeepSpeed does not run"),
        (2, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage = 3: DeepSpeed runs stage 2"),
        (2, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision = bf16: DeepSpeed trains in torch.float32"),
    ],
)
def test_an_engine_that_was_not_asked_for_is_refused(
    found: int | None, variables: dict[str, str], refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, engine = DeepSpeedPlugin(zero_stage=2), torch.nn.Linear(1, 1)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    if found is not None:
        monkeypatch.setattr(engine, "zero_optimization_stage", lambda: found, raising=False)
    with pytest.raises(UserError, match=re.escape(refusal)):
        check_engine(plugin, engine)


def cut_back(run_dir: Path, count: int) -> None:
    """Leave a run that has ended as it was at its ``count``-th checkpoint."""
    late = checkpoints(run_dir / "train" / "checkpoints")[count:]
    assert late
    for checkpoint in late:
        shutil.rmtree(checkpoint)
    (run_dir / "train" / "done.json").unlink()


def after(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a step is logged."""
    log, deadline = run_dir / "train" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def trainers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that train: the launcher's children's last descendants."""
    found, parents = [], [process.pid]
    while parents:
        pid = parents.pop()
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        if b"eagle3.train" in Path(f"/proc/{pid}/cmdline").read_bytes() and not children:
            found.append(pid)
        parents += children
    return found


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(
    launch: Callable[..., subprocess.Popen[str]], alone: Path, run_dir: Path
) -> None:
    process = launch(LAUNCHERS["torchrun"], "train.epochs=15")
    after(run_dir, 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "is saved; resume with: eagle3 train" in said
    assert process.returncode != 0
    steps = len(losses(run_dir))
    again = launch(LAUNCHERS["torchrun"], "train.epochs=15")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert len(losses(run_dir)) > steps
