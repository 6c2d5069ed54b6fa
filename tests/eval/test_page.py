"""The page is one file that fetches nothing, closes what it opens and shows every text as text."""

from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from eagle3.eval.answers import render_answers, visible
from eagle3.eval.figures import Axis, Point, Scale, Series, line_plot, spread
from eagle3.eval.plots import training
from eagle3.eval.report import write_report
from eagle3.eval.style import STYLE
from eagle3.eval.traces import read_traces

FETCHING = {
    "script",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "video",
    "audio",
    "source",
    "base",
    "form",
    "image",
    "use",
}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes, texts of answers, tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.answers: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        name = dict(attrs).get("class") or ""
        if tag not in VOID:
            self._open.append((tag, name))
        if name == "answer":
            self.answers.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        names = [name for _, name in self._open]
        if "answer" in names and "newline" not in names:
            self.answers[-1] += data


def load_example() -> ModuleType:
    """The run that test_report.py makes."""
    spec = importlib.util.spec_from_file_location("report_example", Path(__file__).with_name("test_report.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with hostile names and tokens, and its report."""
    folder: Path = load_example().write_run(tmp_path_factory.mktemp("runs") / "<u>demo & co")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def text(run_dir: Path) -> str:
    """The page."""
    return (run_dir / "eval" / "report.html").read_text(encoding="utf-8")


def test_page_fetches_nothing(text: str) -> None:
    page = Page(text)
    assert FETCHING.isdisjoint(page.tags)
    assert {"src", "href", "xlink:href", "action", "srcset"}.isdisjoint(name for name, _ in page.attributes)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "http:" not in text and "https:" not in text
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text


def test_page_shows_hostile_texts_as_texts(text: str) -> None:
    assert "<script" not in text and "<target>" not in text and "<i>|" not in text and "<u>" not in text
    for shown in (
        "&lt;target&gt;",
        "&lt;i&gt;|prose",
        "&lt;u&gt;demo &amp; co",
        "cpu &amp; co",
        "&lt;script&gt;alert(1)",
    ):
        assert shown in text


def test_answers_are_shown_whole(text: str, run_dir: Path) -> None:
    written = {"".join(t.pieces).replace("\x1b", "␛") for t in read_traces(run_dir / "eval" / "traces.jsonl")}
    shown = Page(text).answers
    assert len(shown) == 4 and set(shown) <= written


def test_tokens_carry_their_author_and_round(run_dir: Path) -> None:
    shown = render_answers(read_traces(run_dir / "eval" / "traces.jsonl"))
    assert 'data-says="round 1: 3 of 3 drafted tokens accepted"' in shown
    first = shown[shown.index('class="answer"') :].split('class="round"')
    assert (first[1].count('class="t"'), first[1].count('class="d"')) == (1, 0)
    assert (first[2].count('class="t"'), first[2].count('class="d"')) == (1, 3)


def test_page_has_what_a_person_looks_at_first(text: str) -> None:
    for title in (
        "Acceptance by position",
        "Where it helps",
        "Training",
        "Answers, token by token",
        "Measure it again",
    ):
        assert title in text
    assert text.count("<svg") == 7
    assert "All 6 greedy answers are those of plain decoding" in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_draftings_stand_side_by_side_where_there_are_several(tmp_path: Path, text: str) -> None:
    folder: Path = load_example().write_run(tmp_path / "several", beside=True)
    write_report(folder)
    shown = (folder / "eval" / "report.html").read_text()
    page = Page(shown)
    assert "Draftings side by side" in shown and "Draftings side by side" not in text
    assert shown.count("<td>tree 9/3/2</td>") == 2 and shown.count("<td>none</td>") == 2
    assert len(page.answers) == 4  # the main drafting's
    assert shown.count("of 3 drafted tokens accepted") and "of 9 drafted tokens accepted" not in shown
    assert shown.count("<svg") == text.count("<svg")


def test_ties_are_not_passed_over(tmp_path: Path) -> None:
    folder: Path = load_example().write_run(tmp_path / "ties", temperatures=(0.0,), sources=("a",))
    path = folder / "eval" / "traces.jsonl"
    tie = '"lossless": {"equal": false, "position": 3, "gap": 1e-05}'
    path.write_text(path.read_text().replace('"lossless": {"equal": true, "position": null, "gap": null}', tie, 1))
    write_report(folder)
    shown = (folder / "eval" / "report.html").read_text()
    assert "All 3 greedy answers are those of plain decoding, 1 of them up to a tie." in shown


def test_every_colour_has_a_dark_twin() -> None:
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)", 1)
    names = set(re.findall(r"(--[a-z0-9-]+):", light))
    assert names == set(re.findall(r"(--[a-z0-9-]+):", dark.split("@media")[0]))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", STYLE)) <= names


def test_invisible_characters_become_visible() -> None:
    assert visible("\x1b<\n") == '␛&lt;<i class="newline">↵</i>\n'


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1.0, 3.5, False, [1, 1.5, 2, 2.5, 3, 3.5]),
        (0.0, 880.0, False, [0, 200, 400, 600, 800]),
        (0.9, 22.0, True, [1, 2, 5, 10, 20]),
        (2.1, 2.9, True, [2.2, 2.4, 2.6, 2.8]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert Scale(low, high, 0, 100, log).ticks() == pytest.approx(expected)


def test_labels_keep_their_distance_and_order() -> None:
    assert spread([50, 51, 10], 15, 0, 100) == [50, 65, 10]
    assert spread([99, 98, 97], 15, 0, 100) == [100, 85, 70]


def test_a_flat_line_is_drawn() -> None:
    drawn = line_plot([Series("flat", [Point(0, 0.0), Point(1, 0.0)], 0)], Axis("x"), Axis("y"))
    assert "nan" not in drawn and "polyline" in drawn


def test_a_log_without_validation_draws_the_loss_alone() -> None:
    lines = [{"step": step, "loss": 3.0 / step} for step in range(1, 1001)]
    ((title, drawn),) = training(lines)
    points = re.search(r'points="([^"]+)"', drawn)
    assert title == "Loss" and points and 100 < len(points[1].split()) <= 160
