"""What a notebook shows of plans, selections, reports and comparisons."""

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
from transformers import LlamaConfig

from layerrl import ContributionReport, LayerSelection, select_layers
from layerrl.report import Score
from layerrl.tables import as_html, as_text, in_units

CONFIG = LlamaConfig(num_hidden_layers=8)
NOTE = "<script>alert('&')</script>"


def rows(html: str) -> Iterator[list[str]]:
    """The cells of all rows; an error where the text is no HTML."""
    for row in ElementTree.fromstring(f"<div>{html}</div>").iter("tr"):
        yield [cell.text or "" for cell in row]


def report(*scores: float) -> ContributionReport:
    layers = tuple(Score(score=score, note=NOTE) for score in scores)
    return ContributionReport(method="gradient", layers=layers)


@pytest.mark.parametrize(
    "shown",
    [
        select_layers(CONFIG, 5).plan(CONFIG, beta=0.1),
        select_layers(CONFIG, [1, 2], modules="self_attn.q_proj", boost={1: 2.0}),
        report(0.1, 0.9, 0.5),
        report(0.1, 0.9, 0.5).compare(report(0.2, 0.7, 0.6)),
        report(0.1, 0.9, 0.5).compare(report(0.2, 0.7, 0.6, 0.9)),
    ],
    ids=["plan", "selection", "report", "comparison", "comparison of depths"],
)
def test_the_html_says_what_is_printed(shown: Any) -> None:
    html, printed = shown._repr_html_(), str(shown).replace(",", " ").split()
    texts = ElementTree.fromstring(f"<div>{html}</div>").itertext()
    found = {word for text in texts for word in text.replace(",", " ").split()}
    assert found - {*printed} <= {"trains"}


def test_what_others_wrote_is_escaped() -> None:
    html = report(0.1)._repr_html_()
    assert "<script>" not in html
    assert any(NOTE in cell for row in rows(html) for cell in row)
    selection = LayerSelection(num_layers=8, layers=(), also=("lm_head<&>*",))
    assert [*rows(selection._repr_html_())][1] == ["no layer of 8", "lm_head<&>*"]


def test_a_selection_shows_only_what_it_has() -> None:
    assert [*rows(select_layers(CONFIG, 5)._repr_html_())] == [["trains"], ["layer 5 of 8"]]
    boosted = select_layers(CONFIG, [5], also="head", boost={5: 2.0})
    head, _ = rows(boosted._repr_html_())
    assert head == ["trains", "also", "learning rate scaled by"]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (select_layers(CONFIG, 5).plan(CONFIG), "plan of selection: "),
        (report(*range(100)), "'gradient' report on 100 layers"),
    ],
    ids=["plan", "report"],
)
def test_what_is_not_printed_takes_a_line(value: Any, part: str) -> None:
    assert part in repr(value)
    assert len(repr(value)) < 150


def test_tables() -> None:
    assert as_text([["a", "bb"], ["ccc", ""]]) == "  a  bb\nccc"
    assert as_html([["<"]]) == "<table><thead><tr><th>&lt;</th></tr></thead><tbody></tbody></table>"
    assert as_html([], ["a > b"]) == "<p>a &gt; b</p>"
    assert [in_units(n) for n in (0, 4_300_000, 16_380_000_000)] == ["0", "4.3 MB", "16.38 GB"]
