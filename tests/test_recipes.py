"""Every file that ships for a launcher is one that its launcher can use."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from eagle3.cli import STAGES
from eagle3.configs import loader

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ZERO = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
BATCH = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("name", loader.recipes())
def test_recipes_load_and_say_what_they_are_for(name: str) -> None:
    settings = loader.load(name)
    assert settings.run.name == name
    assert (ROOT / "configs" / f"{name}.yaml").read_text().startswith("# ")


def test_the_flagship_is_what_its_target_needs() -> None:
    settings = loader.load("maverick")
    assert settings.target.layers == (1, 23, 44)
    assert settings.target.dtype == "bfloat16"
    batch = (ROOT / "slurm" / "eval.sbatch").read_text()
    for option in ("gpus-per-node", "ntasks-per-node"):
        assert f"#SBATCH --{option}={settings.eval.tensor_parallel}\n" in batch


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launchers_name_a_deepspeed_file_that_ships(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    deepspeed = config["deepspeed_config"]
    if "deepspeed_config_file" in deepspeed:
        assert ROOT / deepspeed["deepspeed_config_file"] in ZERO
        # accelerate refuses what the file says already.
        assert not config.keys() & {"mixed_precision"}
        assert not deepspeed.keys() & {"zero_stage", "gradient_clipping", "gradient_accumulation_steps"}


@pytest.mark.parametrize("path", ZERO, ids=lambda path: path.stem)
def test_deepspeed_files_are_the_stage_that_they_are_named_for(path: Path) -> None:
    config = json.loads(path.read_text())
    assert path.stem == f"zero{config['zero_optimization']['stage']}"
    assert "optimizer" not in config  # the trainer brings its own


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.stem)
def test_batch_scripts_parse_and_call_commands_that_exist(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    called = re.findall(r"\beagle3 (\w+) \"\$@\"", text)
    assert set(called) <= set(STAGES)
    for config in re.findall(r"--config_file (\S+)", text):
        assert ROOT / config in LAUNCHERS
    recipe = re.search(rf"^#     sbatch .*slurm/{path.name} (\w+)", text, re.MULTILINE)
    assert recipe is not None
    assert recipe[1] in loader.recipes()


FAKES = {
    # What Slurm runs on the nodes: here the command is only written down, and ends as the test says.
    "srun": """{ printf srun; printf ' %q' "$@"; echo; } >> calls
trap 'echo stopped >> calls; exit "$CODE_WHEN_STOPPED"' TERM
if [[ -n ${SIGNAL:-} ]]; then kill -USR1 "$PPID"; for _ in {1..200}; do sleep 0.05; done; fi
exit "$CODE"
""",
    "scontrol": """if [[ $1 == requeue ]]; then echo "requeue $2" >> calls; else echo node1; fi
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A repository with an environment and a cluster, both pretended."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={shlex.quote(str(tmp_path))}:$PATH\n")
    for name, script in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(cluster: Path, script: str, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    """Run a batch script as Slurm would; returns its exit code and what it called."""
    slurm = {"SLURM_SUBMIT_DIR": str(cluster), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    environment = os.environ | slurm | {"CODE": "0", "CODE_WHEN_STOPPED": "75"} | variables
    command = ["bash", str(ROOT / "slurm" / script), *arguments]
    code = subprocess.run(command, env=environment, cwd=cluster, capture_output=True, timeout=60).returncode
    calls = cluster / "calls"
    return code, calls.read_text().splitlines() if calls.exists() else []


def test_a_batch_job_runs_its_commands_in_order(cluster: Path) -> None:
    code, calls = submit(cluster, "record.sbatch", "tiny", "run.name=a b")
    assert code == 0
    assert [re.findall(r"eagle3\\? (\w+)", call) for call in calls] == [["prepare"], ["regenerate"], ["record"]]
    assert all(call.endswith(r"tiny run.name=a\ b") for call in calls)


def test_a_batch_job_starts_a_process_for_each_gpu_that_evaluates(cluster: Path) -> None:
    code, (call,) = submit(cluster, "eval.sbatch", "tiny", "run.name=a b")
    assert code == 0
    step = ["bash", "-c", call.removeprefix("srun")]
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    said = " ".join(f'"${name}"' for name in variables)
    (cluster / "eagle3").write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' {said} \"$@\"\n")
    (cluster / "eagle3").chmod(0o755)
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "3"}
    environment = os.environ | slurm | {"PATH": f"{cluster}:{os.environ['PATH']}"}
    found = subprocess.run(step, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == ["2", "4", "3", "4", "eval", "tiny", "run.name=a b", "eval.tensor_parallel=4"]


@pytest.mark.parametrize(("ending", "expected"), [("75", ["requeue 7"]), ("2", []), ("3", [])])
def test_only_what_can_be_resumed_is_put_back_into_the_queue(cluster: Path, ending: str, expected: list[str]) -> None:
    code, calls = submit(cluster, "eval.sbatch", "tiny", CODE=ending)
    assert code == int(ending)
    assert calls[1:] == expected


@pytest.mark.parametrize("ending", ["75", "1"])
def test_the_time_limit_stops_the_step_and_requeues_the_job(cluster: Path, ending: str) -> None:
    code, calls = submit(cluster, "train.sbatch", "tiny", SIGNAL="1", CODE_WHEN_STOPPED=ending)
    assert code == 75
    assert calls[1:] == ["stopped", "requeue 7"]


def test_a_batch_job_without_a_recipe_says_how_it_is_used(cluster: Path) -> None:
    code, calls = submit(cluster, "eval.sbatch")
    assert code != 0
    assert calls == []
