"""The command line: what it says, with which exit code, and which stages it runs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from eagle3 import cli
from eagle3.configs.errors import Incomplete, Interrupted, UserError
from eagle3.configs.loader import describe, load
from eagle3.configs.settings import TargetSettings

Outcome = Callable[[cli.Run], None]


class Pipeline:
    """Stages that only say that they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.standing: set[str] = set()
        self.outcome: dict[str, Outcome] = {}

    def stage(self, name: str) -> cli.Stage:
        def execute(run: cli.Run) -> None:
            self.outcome.get(name, lambda run: None)(run)
            self.ran.append(name)

        return cli.STAGES[name]._replace(stands=lambda run: name in self.standing, execute=execute)


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """Fake stages in an empty folder."""
    monkeypatch.chdir(tmp_path)
    fake = Pipeline()
    monkeypatch.setattr(cli, "STAGES", {name: fake.stage(name) for name in cli.STAGES})
    monkeypatch.setattr(
        cli,
        "report",
        SimpleNamespace(
            write_report=lambda folder: {"run": folder.name},
            summary_table=lambda report: f"table of {report['run']}",
            compare=lambda folders: f"comparison of {', '.join(folder.name for folder in folders)}",
        ),
    )
    return fake


def raising(error: BaseException) -> Outcome:
    def outcome(run: cli.Run) -> None:
        raise error

    return outcome


def test_one_of_several_processes_ends_with_a_code_of_its_own(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher that sees one end sends the others SIGTERM; and one of them says that all is done."""
    earlier = signal.getsignal(signal.SIGTERM)
    assert cli.main(["eval", "tiny"]) == 0
    assert signal.getsignal(signal.SIGTERM) == earlier
    assert capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    try:
        assert cli.main(["eval", "tiny"]) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "said"), [("0", "error: a = 1: b; c\n"), ("1", "")])
def test_what_all_who_evaluate_find_the_first_says(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, said: str
) -> None:
    """Recorders know nothing of each other, and each says what it finds."""
    monkeypatch.setenv("RANK", rank)
    for name in ("eval", "record"):
        pipeline.outcome[name] = raising(UserError("a", 1, "b", "c"))
        assert cli.main([name, "tiny"]) == 2
        assert capsys.readouterr().err == (said if name == "eval" else "error: a = 1: b; c\n")


def test_run_goes_through_all_stages_and_ends_with_the_report(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "tiny", "run.name=demo", "train.epochs=9"]) == 0
    assert pipeline.ran == ["prepare", "regenerate", "record", "train", "eval"]
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        *(f"{name:<12}done in 0:00" for name in pipeline.ran),
        "",
        "table of demo",
        "",
        "runs/demo/eval/report.html",
    ]
    assert said.err == ""
    assert load(Path("runs/demo/config.yaml")) == load("tiny", ["run.name=demo", "train.epochs=9"])


def test_stages_that_stand_are_skipped(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.standing = {"prepare", "record", "train"}
    assert cli.main(["run", "tiny"]) == 0
    # The trainer looks for itself whether what stands was made with these settings.
    assert pipeline.ran == ["regenerate", "train", "eval"]
    lines = capsys.readouterr().out.splitlines()[:5]
    assert [line.partition(" ")[0] for line in lines if line.endswith("done before")] == ["prepare", "record", "train"]


@pytest.mark.parametrize("name", ["prepare", "regenerate", "record", "train", "eval"])
def test_a_stage_alone(pipeline: Pipeline, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main([name, "tiny"]) == 0
    assert pipeline.ran == [name]
    assert ("table of tiny" in capsys.readouterr().out) == (name == "eval")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("train.clip", 0, "too low", "raise it"), 2, "error: train.clip = 0: too low; raise it"),
        (Incomplete("the loss is not finite"), 3, "error: the loss is not finite"),
        (Interrupted("interrupted: 3 of 9; resume with: x"), 75, "interrupted: 3 of 9; resume with: x"),
        (KeyboardInterrupt(), 75, "interrupted: what was finished is kept; resume with the same command"),
    ],
)
def test_how_a_stage_ends_is_how_the_command_ends(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    pipeline.outcome["record"] = raising(error)
    assert cli.main(["run", "tiny"]) == code
    assert pipeline.ran == ["prepare", "regenerate"]
    assert capsys.readouterr().err == f"{line}\n"


def test_a_bug_keeps_its_traceback(pipeline: Pipeline) -> None:
    pipeline.outcome["prepare"] = raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "tiny"])


def test_sigterm_between_units_is_resumable(pipeline: Pipeline) -> None:
    pipeline.outcome["prepare"] = lambda run: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5)
    earlier = signal.getsignal(signal.SIGTERM)
    assert cli.main(["run", "tiny"]) == 75
    assert signal.getsignal(signal.SIGTERM) == earlier


def test_a_refused_recipe_does_not_replace_the_runs_own(pipeline: Pipeline) -> None:
    assert cli.main(["run", "tiny", "train.epochs=3"]) == 0
    recipe = Path("runs/tiny/config.yaml").read_text()
    pipeline.outcome["train"] = raising(UserError("train.epochs", 4, "another", "set it back"))
    assert cli.main(["train", "tiny", "train.epochs=4"]) == 2
    assert Path("runs/tiny/config.yaml").read_text() == recipe
    pipeline.outcome["train"] = raising(Interrupted("interrupted"))
    assert cli.main(["train", "tiny", "train.epochs=4"]) == 75
    assert load(Path("runs/tiny/config.yaml")).train.epochs == 4


def test_the_target_is_loaded_once_and_only_when_needed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(cli, "targets", SimpleNamespace(load_target=loaded.append))
    assert cli.main(["run", "tiny"]) == 0
    assert loaded == []
    pipeline.outcome = dict.fromkeys(("regenerate", "record", "eval"), lambda run: run.target)
    assert cli.main(["run", "tiny"]) == 0
    assert loaded == [load("tiny").target]


def test_the_evaluation_takes_transformers_model_where_it_wants_it(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an earlier stage if it is the same; the native engine lets go of it, and loads its own."""
    loaded = []

    def load_target(settings: TargetSettings) -> str:
        loaded.append(settings)
        return f"target {len(loaded)}"

    monkeypatch.setattr(cli, "targets", SimpleNamespace(load_target=load_target))
    seen, tiny = [], load("tiny").target
    other = replace(tiny, dtype="bfloat16")
    pipeline.outcome = {
        "regenerate": lambda run: seen.append(run.target),
        "eval": lambda run: seen.extend([[*map(run.evaluating, (tiny, other))], "target" in vars(run)]),
    }
    assert cli.main(["run", "tiny", "eval.engine=transformers", "eval.beside="]) == 0
    assert [*seen[:1], *seen[1], *seen[2:]] == ["target 1", "target 1", "target 2", True]
    assert loaded == [tiny, other]
    seen.clear()
    loaded.clear()
    pipeline.outcome["eval"] = lambda run: seen.extend([run.evaluating and "ready", "target" in vars(run)])
    assert cli.main(["run", "tiny"]) == 0
    assert seen == ["target 1", "ready", False] and loaded == [tiny]


def test_where_servers_answer_no_weights_are_loaded(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "targets", SimpleNamespace(load_target=lambda _: "target", load_text=lambda _: "text"))
    seen = []
    pipeline.outcome = {"regenerate": lambda run: seen.append(run.answering)}
    assert cli.main(["regenerate", "tiny"]) == 0
    assert cli.main(["regenerate", "tiny", "regenerate.endpoints=http://a:8000,http://b:8000/v1"]) == 0
    assert seen == ["target", "text"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "command = (none): nothing to do; choose one of run, plan, prepare, regenerate, record, train, eval, inspect, export, import, report, or --help"),
        (["trian", "tiny"], "command = trian: there is no such command; did you mean train?"),
        (["xyz"], "command = xyz: there is no such command; choose one of run,"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "nowhere.yaml"], "recipe = nowhere.yaml: there is no such file;"),
        (["train", "tiny", "train.epochs"], "override = train.epochs: it has no value; write section.name=value"),
        (["train", "tiny", "--train.epochs=3"], "argument = --train.epochs=3: there is no such option; write settings as section.name=value, after the recipe"),
        (["train", "tiny", "train.epochs=no"], "train.epochs = no: it is"),
        (["inspect", "nowhere"], "store = nowhere: it holds no manifest"),
        (["report"], "the following arguments are required: RUN; see eagle3 report --help"),
        (["--nothing"], "the following arguments are required: COMMAND; see eagle3 --help"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert line in said.err
    assert said.err.count("\n") == 1


def test_a_folder_that_cannot_be_written(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert cli.main(["run", "tiny", "run.root=file"]) == 2
    problem, remedy = "file/tiny cannot be written (Not a directory)", "choose a folder that you may write to"
    assert capsys.readouterr().err == f"error: run.root = file: {problem}; free some space or {remedy}\n"


def test_a_full_disk_is_told_wherever_it_shows(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.outcome["train"] = raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/tiny/train/log"))
    assert cli.main(["train", "tiny"]) == 2
    remedy = "free some space and run the command again: what is finished is kept"
    assert capsys.readouterr().err == f"error: disk = runs/tiny/train: it is full (No space left on device); {remedy}\n"
    pipeline.outcome["train"] = raising(OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["train", "tiny"])


def test_a_full_disk_keeps_the_recipe(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "tiny", "train.epochs=3"]) == 0

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refusing(run: cli.Run) -> None:
        monkeypatch.setattr(Path, "write_bytes", full)
        raise UserError("run.root", "runs", "it cannot be written", "free some space")

    pipeline.outcome["train"] = refusing
    assert cli.main(["train", "tiny", "train.epochs=4"]) == 2  # the stage met the full disk, and so does its end
    assert capsys.readouterr().err == "error: run.root = runs: it cannot be written; free some space\n"
    assert load(Path("runs/tiny/config.yaml")).train.epochs == 4
    files = {path: path.read_bytes() for path in Path("runs/tiny").iterdir()}
    assert cli.main(["run", "tiny", "train.epochs=5"]) == 2
    assert {path: path.read_bytes() for path in Path("runs/tiny").iterdir()} == files


def test_several_runs_are_compared(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "runs/a", "runs/b"]) == 0
    assert capsys.readouterr().out == "\ncomparison of a, b\n\nruns/a/eval/report.html\nruns/b/eval/report.html\n"


@pytest.mark.parametrize("command", ["run", "plan", *cli.STAGES])
def test_help_explains_every_setting_that_matters(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    sections = describe() if command in ("run", "plan") else cli.STAGES[command].sections
    for setting in (setting for section in sections for setting in describe()[section]):
        assert f"{setting.name}={setting.default} {setting.text}" in words


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {command}" in said for command in ("run", "plan", *cli.STAGES, "inspect", "report"))


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("arguments", [("-m", "eagle3", "train", "--help"), ("-m", "eagle3.train", "tiny", "a.b=c")])
def test_help_and_mistakes_do_not_wait_for_torch(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = run(*arguments, cwd=tmp_path)
    assert ended.returncode == (0 if "--help" in arguments else 2)
    imported = {
        line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")
    }
    assert "eagle3.configs.loader" in imported
    assert not imported & {"torch", "transformers", "numpy"}


def test_the_trainer_says_the_same_as_the_command(tmp_path: Path) -> None:
    ended = run("-m", "eagle3.train", cwd=tmp_path)
    assert ended.returncode == 2
    assert "error: recipe = (none): there is no recipe; write CONFIG [section.name=value ...]" in ended.stderr


def test_a_reader_that_goes_away_is_no_bug(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from eagle3.configs.entry import finish; sys.exit(finish(lambda: print(1)))",
        ],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert ended.returncode == 75
    assert ended.stderr == b""
