"""The report as numbers, as text and as a picture, of a run whose answers are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rich.cells import cell_len

from stablemoe_ds.errors import UserError
from stablemoe_ds.evaluation.plots import draw
from stablemoe_ds.evaluation.report import routing_report
from stablemoe_ds.evaluation.report_text import WIDTH, render_text
from stablemoe_ds.evaluation.specialisation import use_of_pairs, use_of_table
from stablemoe_ds.run_directory.metrics import MetricsLog
from stablemoe_ds.run_directory.probe_records import RouteRecords
from stablemoe_ds.tables.table import RoutingTable

PIECES = ["▁the", ",", "▁self", "\\n", "▁日本語の長い単語", "x" * 120]


def metrics(tmp_path) -> list[dict]:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(10, 110, 10):
        stage = 1 if step <= 40 else 2
        agreement = step / 50 if stage == 1 else None
        log.append("train", step, loss=8 - step / 20, stage=stage, tokens_per_second=1000.0 + step, agreement=agreement)
    log.append("train", 100, loss=math.nan, stage=2)
    log.append("valid", 20, stage=1, tokens=512, perplexity=400.0, perplexity_distilled=500.0)
    log.append("valid", 40, stage=1, tokens=9000, perplexity=90.0, perplexity_distilled=95.0)
    log.append("switch", 40, agreement=0.875, load=[1.5, 1.25], least_load=1.2, table_sha256="cafe" * 16)
    log.append("valid", 60, stage=2, perplexity=60.0, tokens=512)
    log.append("valid", 100, stage=2, perplexity=30.5, tokens=9000)
    log.append("test", 100, stage=2, perplexity=29.75)
    for step, seconds in ((20, 3.0), (40, 2.0)):
        log.append("probe", step, churn=None, seconds=seconds)
    return log.read()


def records(moves_late: bool = False) -> RouteRecords:
    """Four tokens in two layers, so eight cases: three move up to the switch, and one after it if asked."""
    expert_HLP = np.zeros((6, 2, 4), dtype=np.int16)
    expert_HLP[0, 0, :2] = 1  # 2 of 8 differ from the end at update 0
    expert_HLP[:2, 1, 3] = 2  # 1 of 8 still differs at update 20
    if moves_late:
        expert_HLP[5, 1, 0] = 3  # so the record at 80 is its last that differs
    return RouteRecords(np.array([0, 20, 40, 60, 80, 100]), expert_HLP)


@pytest.fixture
def uses():
    vocab = len(PIECES)
    table = RoutingTable(np.array([[[i % 2] for i in range(vocab)], [[0]] * vocab], dtype=np.int32), 2, (3, 6))
    return [use_of_table(table, layer, np.array([50, 20, 10, 10, 5, 5])) for layer in range(2)]


@pytest.fixture
def report(tmp_path, uses):
    return routing_report(
        name="known",
        steps=100,
        tokens_per_step=1000,
        metrics=metrics(tmp_path),
        records=records(),
        uses=uses,
        piece=PIECES.__getitem__,
    )


@pytest.fixture
def bare():
    """A dense run that was killed before anything was recorded."""
    return routing_report(name="bare", steps=100, tokens_per_step=1000, metrics=[], records=None, uses=[], piece=str)


def test_report_holds_the_known_numbers(report):
    assert report["valid_ppl"] == {"stage1": 90.0, "stage1_distilled": 95.0, "final": 30.5}
    assert report["test_ppl"] == 29.75
    assert report["tokens_per_second"] == 1055.0
    assert report["switch"]["step"] == 40
    spent = sum(10 * 1000 / (1000 + step) for step in range(10, 110, 10))
    assert report["probe_share"] == pytest.approx(5 / (5 + spent))
    assert report["changed_after_switch"] == 0.0
    assert report["history"]["churn"] == [[20, 0.25], [40, 0.125], [60, 0.0], [80, 0.0], [100, 0.0]]
    assert report["history"]["agreement"] == [[10, 0.2], [20, 0.4], [30, 0.6], [40, 0.8]]
    assert report["history"]["valid_ppl"] == [[20, 400.0], [60, 60.0]]
    assert report["history"]["other_valid_ppl"] == [[40, 90.0], [100, 30.5]], "all of the text, not a part"
    assert len(report["history"]["loss"]) == 10, "a NaN is no point of the curve"
    fluctuation = report["fluctuation"]
    assert fluctuation["exceeds"] == {"20%": 0.0, "50%": 0.0, "80%": 0.0}
    assert (fluctuation["records"], fluctuation["records_after_switch"], fluctuation["tokens"]) == (6, 4, 4)
    curve = dict((round(x, 2), share) for x, share in fluctuation["curve"])
    assert (curve[0.0], curve[0.18], curve[0.2], curve[1.0]) == (0.125, 0.125, 0.0, 0.0)


def test_layers_hold_load_bound_and_pieces(report):
    first, second = report["layers"]
    assert (first["block"], second["block"]) == (3, 6)
    assert first["load"] == pytest.approx([1.3, 0.7])
    assert (first["max_load"], first["least_load"]) == pytest.approx((1.3, 1.0))
    assert (second["load"], second["load_entropy"]) == ([2.0, 0.0], 0.0)
    assert [use["piece"] for use in first["experts"][0]["pieces"]] == ["▁the", "▁self", PIECES[4]]
    assert second["experts"][1]["pieces"] == []


def test_report_is_strict_json(report, bare):
    for one in (report, bare):
        assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_a_token_that_moves_after_the_switch_is_reported(tmp_path, uses):
    report = routing_report(
        name="moves",
        steps=100,
        tokens_per_step=1000,
        metrics=metrics(tmp_path),
        records=records(moves_late=True),
        uses=uses,
        piece=str,
    )
    assert report["changed_after_switch"] == 0.125
    assert report["fluctuation"]["exceeds"] == {"20%": 0.125, "50%": 0.125, "80%": 0.0}
    assert "12.50% of 4 probe tokens in 4 records changed their expert" in render_text(report)


def test_text_says_it_all_in_a_hundred_columns(report):
    text = render_text(report)
    assert max(map(cell_len, text.splitlines())) <= WIDTH
    for part in (
        "known · 100 updates · stage 2 since update 40",
        "30.50 at the end",
        "90.00 in stage 1 with the learned router, 95.00 with the distilled one",
        "Test perplexity          29.75",
        "on 87.5% of tokens at the switch",
        "25.0% at first, 0.0% at last",
        "20% of the run: 0.0%",
        "none of 4 probe tokens in 4 records changed its expert",
        "1,055 tokens/s; 5.0% of the time for the probe",
        "cafe" * 16,
        "MoE layer at block 6: 2 experts, the busiest at 2.00 times the mean; no table goes below 1.00",
        "(serves no token)",
        "▁the  ▁self  ▁日本語の長い単語",
    ):
        assert part in text
    assert "xxx" not in text, "a piece that does not fit is left out whole"


@pytest.mark.parametrize(("top_k", "said"), [(1, False), (2, True)])
def test_records_of_first_experts_are_called_that(top_k, said, tmp_path):
    """Of several experts that a router chooses for a token, records of the probe have the first."""
    use = use_of_pairs(np.array([0, 1, 1]), np.array([0, 0, 1]), 4, 1)
    report = routing_report(
        name="pairs", steps=9, tokens_per_step=9, metrics=[], records=None, uses=[use], piece=str, top_k=top_k
    )
    assert (f"Counted by the first of the {top_k} experts of each token" in render_text(report)) == said
    draw(report, tmp_path / "pairs.png")


def test_text_and_picture_of_a_run_without_records(bare, tmp_path):
    assert render_text(bare).splitlines()[0] == "bare · 100 updates"
    draw(bare, tmp_path / "bare.png")
    assert (tmp_path / "bare.png").stat().st_size > 1000


@pytest.fixture
def drawn(monkeypatch):
    """The figures that ``draw`` closes, kept open to be looked at."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        plt.close(figure)


def test_picture_shows_the_numbers_of_the_report(report, tmp_path, drawn):
    draw(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loss, restless, load, last = drawn[0].axes[:4]
    assert loss.lines[1].get_ydata().tolist() == pytest.approx(np.log([400.0, 60.0]))
    assert loss.lines[2].get_ydata().tolist() == pytest.approx(np.log([90.0, 30.5]))
    assert loss.lines[2].get_linestyle() == "None", "what is not of the same text is not joined"
    assert restless.lines[1].get_ydata().tolist() == [25.0, 12.5, 0.0, 0.0, 0.0]
    assert load.lines[0].get_ydata() == pytest.approx([1.3, 0.7])
    assert last.lines[0].get_ydata()[0] == 12.5
    switches = [
        [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"] for axis in drawn[0].axes[:4]
    ]
    assert switches == [[40], [40], [], [40.0]]


def test_no_label_lies_on_another(report, tmp_path, drawn):
    draw(report, tmp_path / "report.png")
    drawn[0].canvas.draw()
    for axis in drawn[0].axes:
        texts = [
            axis.title,
            axis.xaxis.label,
            axis.yaxis.label,
            *axis.texts,
            *axis.get_xticklabels(),
            *axis.get_yticklabels(),
        ]
        boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
        if axis.get_legend():
            boxes.append(axis.get_legend().get_window_extent())
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index])


def test_a_place_that_cannot_be_written_is_named(report, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.report\.png"):
        draw(report, tmp_path / "nowhere" / "report.png")
