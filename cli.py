"""The command line.

    eagle3 run tiny run.name=mine train.epochs=8

Every command ends with one of the exit codes of :mod:`.configs.errors`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from .configs.entry import Lazy, explain, finish, first, opened, said_once, share_cores
from .configs.errors import UserError
from .configs.loader import describe, load, recipes
from .configs.settings import Settings, TargetSettings

if TYPE_CHECKING:
    from .data import inspection, plan, plan_table, prepare, record, regenerate
    from .eval import export, imports, report
    from .eval import stage as evaluation
    from .models import target as targets
    from .models import target_files
    from .models.native import loading as native_loading
    from .models.native import target as native
    from .train import stage as training
else:
    inspection = Lazy("eagle3.data.inspection")
    plan, plan_table = Lazy("eagle3.data.plan"), Lazy("eagle3.data.plan_table")
    export, report = Lazy("eagle3.eval.export"), Lazy("eagle3.eval.report")
    imports = Lazy("eagle3.eval.imports")
    prepare, regenerate = Lazy("eagle3.data.prepare"), Lazy("eagle3.data.regenerate")
    record, training = Lazy("eagle3.data.record"), Lazy("eagle3.train.stage")
    evaluation, targets = Lazy("eagle3.eval.stage"), Lazy("eagle3.models.target")
    target_files = Lazy("eagle3.models.target_files")
    native_loading = Lazy("eagle3.models.native.loading")


class Run:
    """A recipe, the folder that it fills, and its target, which is loaded when a stage first needs it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder

    @cached_property
    def target(self) -> targets.Target:
        """The frozen model; seconds for a small one, minutes for a large one."""
        return targets.load_target(self.settings.target)

    @cached_property
    def text(self) -> targets.TargetText:
        """Its tokenizer and the like, for which no weights are loaded."""
        return targets.load_text(self.settings.target)

    @property
    def answering(self) -> targets.Target | targets.TargetText:
        """The target, or its text alone where servers answer in its place."""
        return self.text if self.settings.regenerate.endpoints else self.target

    @property
    def recording(self) -> targets.Target | native.NativeTarget | target_files.TargetEnds:
        """The target, this process's part of it, or its ends alone where servers record in its place."""
        if self.settings.record.endpoints:
            return target_files.load_ends(self.settings.target)
        members = self.settings.record.tensor_parallel
        if self.settings.record.engine == "native":
            return native_loading.load_recorded(self.settings.target, members)
        return self.target if members == 1 else targets.load_target(self.settings.target, members)

    @property
    def evaluating(self) -> Callable[[TargetSettings], targets.Target]:
        """What loads transformers' model for the evaluation, once where it is the recipe's own.

        The native engine needs none; what answered for an earlier stage makes room for it.
        """
        if self.settings.eval.engine == "native":
            self.__dict__.pop("target", None)
        return lambda asked: self.target if asked == self.settings.target else targets.load_target(asked)


class Stage(NamedTuple):
    """One stage as a command.

    ``stands(run)`` says whether it is complete, ``execute(run)`` completes it; both refuse changed settings.
    ``sections`` are the settings that matter to it.
    """

    text: str
    stands: Callable[[Run], bool]
    execute: Callable[[Run], None]
    sections: tuple[str, ...]


STAGES = {
    "prepare": Stage(
        "choose the prompts and split them",
        lambda run: prepare.prepared(run.settings, run.folder),
        lambda run: prepare.prepare(run.settings, run.folder, run.text),
        ("run", "target", "prepare"),
    ),
    "regenerate": Stage(
        "let the target answer the prompts, in process or on servers",
        lambda run: regenerate.regenerated(run.settings, run.folder),
        lambda run: regenerate.regenerate(run.settings, run.folder, run.answering),
        ("run", "target", "regenerate"),
    ),
    "record": Stage(
        "record the target's hidden states",
        lambda run: record.recorded(run.settings, run.folder),
        lambda run: record.record(run.settings, run.folder, run.recording),
        ("run", "target", "record"),
    ),
    "train": Stage(
        "train the draft head",
        lambda run: (run.folder / "train" / "done.json").exists(),
        lambda run: training.train(run.settings, run.folder),
        ("run", "draft", "train", "eval"),
    ),
    "eval": Stage(
        "answer the test prompts with and without the draft, and report",
        lambda run: (run.folder / "eval" / "eval.json").exists(),
        lambda run: evaluation.evaluate(run.settings, run.folder, run.evaluating),
        ("run", "target", "eval"),
    ),
}
OTHERS = {
    "run": "all stages in order, skipping those that are complete",
    "plan": "what a run will cost in tokens, disk, memory and hours, before anything of it starts",
    "inspect": "what a recorded store holds, and whether it is whole",
    "export": "write a run's head in the format of a serving engine, or check one that was written",
    "import": "make a head that another trainer wrote fit to be evaluated and trained on",
    "report": "make reports again, or set several runs side by side",
}


PLAN = """\
Say what a run will cost before anything of it starts. Only the target's configuration is read.

Tokens are those of the run's store or answers where it has them, else as many as the recipe's limits allow; hours are told
for the speeds that are given. A disk that is too small is warned of, with exit code 0."""
EXPORT = """\
Write a run's head in the format of a serving engine, with a model card that says how to launch it.

Every export is read back as the engine will read it, defaults and all, and compared with the head that was trained.
--check does that alone. With --against it also asks a live engine for greedy answers to test prompts, and compares its
tokens, and how many drafted ones it accepted at each position, with our own decoder's; nobody else may use the engine
meanwhile."""
IMPORT = """\
Make a head of ours of one that another trainer wrote, from a folder or the hub: what the engine of its format would
compute from the same files. What these do not say (layers, RoPE, which norms) is taken as that engine takes it, and listed.

  eagle3 import nvidia/Llama-4-Maverick-17B-128E-Eagle3 maverick --format trtllm --out heads/nvidia
  torchrun --nproc-per-node 8 --no-python eagle3 eval maverick eval.draft=heads/nvidia     # what it is worth
  eagle3 train maverick train.warm_start=heads/nvidia                                      # go on from it"""
FORMATS = """\
formats:
  hf           portable: vLLM, SGLang and TensorRT-LLM read it as it is
  vllm         vLLM alone
  sglang       SGLang alone
  trtllm       TensorRT-LLM alone, with its options in trtllm.yaml
  speculators  the speculators package, which vLLM reads
  eagle        SafeAILab's EAGLE"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. ``arguments`` default to those of the process."""
    share_cores()
    return finish(partial(_dispatch, sys.argv[1:] if arguments is None else arguments))


def _dispatch(arguments: Sequence[str]) -> None:
    commands = ["run", "plan", *STAGES, "inspect", "export", "import", "report"]
    if not arguments:
        raise UserError("command", "(none)", "nothing to do", f"choose one of {', '.join(commands)}, or --help")
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        near = difflib.get_close_matches(arguments[0], commands, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(commands)}"
        raise UserError("command", arguments[0], "there is no such command", remedy)
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        remedy = f"write settings as section.name=value, after the recipe; see eagle3 {arguments[0]} --help"
        raise UserError("argument", unknown[0], "there is no such option", remedy)
    match parsed.command:
        case "plan":
            show_plan(parsed)
        case "inspect":
            for line in inspection.inspect(parsed.store, parsed.verify):
                print(line, flush=True)
        case "export":
            export_head(parsed)
        case "import":
            imports.import_head(parsed.head, load(parsed.config, parsed.overrides), parsed.format, parsed.out)
        case "report":
            report_runs(parsed.runs)
        case command:
            # Processes that evaluate together come to every end together.
            ending = said_once() if command == "eval" else nullcontext()
            with ending, opened(settings := load(parsed.config, parsed.overrides)) as folder:
                run_stages(list(STAGES) if command == "run" else [command], Run(settings, folder))


def run_stages(names: Sequence[str], run: Run) -> None:
    """Complete the named stages in order, saying of each how long it took; after eval, report.

    Of several processes the first says so, and reports.

    Raises:
        UserError: a stage's, or two that must run side by side are to run one after the other.
    """
    limit = run.settings.record.spool_shards
    if limit is not None and len(names) > 1 and not (run.folder / "train" / "done.json").exists():
        remedy = (
            "start eagle3 prepare and regenerate, then eagle3 record and eagle3 train at once, and then eagle3 eval"
        )
        raise UserError("record.spool_shards", limit, "recording waits for a trainer that reads meanwhile", remedy)
    for name in names:
        stage = STAGES[name]
        with _timed(name) as outcome:
            # What the two last stages were made from is only known once they look; they return at once if they stand.
            if stage.stands(run):
                outcome.append("done before")
            if not outcome or name in ("train", "eval"):
                stage.execute(run)
    if "eval" in names and first():
        report_runs([run.folder])


@contextmanager
def _timed(name: str) -> Iterator[list[str]]:
    started, outcome = time.monotonic(), list[str]()
    yield outcome
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    if first():
        print(f"{name:<12}{outcome[0] if outcome else f'done in {minutes}:{seconds:02d}'}", flush=True)


def report_runs(folders: Sequence[Path]) -> None:
    """Write the report of every run; show one as a table, several side by side."""
    reports = [report.write_report(folder) for folder in folders]
    print(f"\n{report.summary_table(reports[0]) if len(reports) == 1 else report.compare(list(folders))}\n")
    for folder in folders:
        print(folder / "eval" / "report.html")


def show_plan(parsed: argparse.Namespace) -> None:
    """Print what a recipe will cost, as a table or as JSON."""
    speeds = plan.Speeds(parsed.answer_tokens_per_s, parsed.tokens_per_s, parsed.train_tokens_per_s)
    made = plan.make_plan(load(parsed.config, parsed.overrides), speeds, parsed.gpus)
    print(plan.to_json(made) if parsed.json else plan_table.render(made))


def export_head(parsed: argparse.Namespace) -> None:
    """Write a run's head for an engine, or check what was written, in its files and in a live engine."""
    if parsed.against and not parsed.check:
        raise UserError("--against", parsed.against, "it belongs to --check", "export first, then check")
    if parsed.check:
        export.check(parsed.run, parsed.format, parsed.out, parsed.against, parsed.prompts)
    else:
        export.export(parsed.run, parsed.format, parsed.out)


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as every other part of the project does."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command", self.prog, message, f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eagle3",
        description="Train an EAGLE-3 draft head for a frozen language model, and measure what it is worth.",
        epilog="eagle3 COMMAND --help explains every setting that matters to a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    every = tuple(describe())
    for name, text, sections in (
        ("run", OTHERS["run"], every),
        *((name, stage.text, stage.sections) for name, stage in STAGES.items()),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=explain(sections),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_recipe(command)
    _add_plan(commands.add_parser(
        "plan", help=OTHERS["plan"], description=PLAN, epilog=explain(every),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    ))  # fmt: skip
    inspect = commands.add_parser("inspect", help=OTHERS["inspect"], allow_abbrev=False)
    inspect.add_argument("store", metavar="STORE", type=Path, help="the store, or the run that holds it")
    inspect.add_argument("--verify", action="store_true", help="read every byte; exit code 2 if any is damaged")
    exports = commands.add_parser(
        "export", help=OTHERS["export"], description=EXPORT, epilog=FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    exports.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    exports.add_argument("--format", metavar="FORMAT", required=True, help="one of those below")
    exports.add_argument("--out", metavar="DIR", type=Path, required=True, help="the head's folder, for the engine")
    exports.add_argument("--check", action="store_true", help="check DIR and write nothing; exit code 3 if it is wrong")
    exports.add_argument("--against", metavar="URL", help="with --check: compare with the live engine at URL")
    prompts = "test prompts to compare, fewer where the run has not as many; default %(default)s"
    exports.add_argument("--prompts", metavar="N", type=int, default=100, help=prompts)
    imported = commands.add_parser(
        "import", help=OTHERS["import"], description=IMPORT, epilog=FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    imported.add_argument("head", metavar="HEAD", help="the head's folder or hub name")
    _add_recipe(imported)
    imported.add_argument("--format", metavar="FORMAT", required=True, help="one of those below")
    imported.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    reports = commands.add_parser("report", help=OTHERS["report"], allow_abbrev=False)
    reports.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder")
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help=f"a recipe: a YAML file, or {' or '.join(recipes())}")
    overrides = "settings that take the place of the recipe's"
    command.add_argument("overrides", metavar="section.name=value", nargs="*", default=[], help=overrides)


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    for option, text in (
        ("--answer-tokens-per-s", "at which the target answers"),
        ("--tokens-per-s", "at which it is recorded"),
        ("--train-tokens-per-s", "at which the head trains"),
    ):
        command.add_argument(option, metavar="N", type=float, help=f"tokens a second, over all GPUs, {text}")
    gpus = "GPUs that hold the target together, and that train; default %(default)s"
    command.add_argument("--gpus", metavar="N", type=int, default=8, help=gpus)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
