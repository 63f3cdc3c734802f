"""The sheet of curves: one panel a metric of the stages that ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minirlhf import report


def test_panels_show_the_metrics_of_the_stages_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {
        "sft": [{"step": 0, "loss": 3.0}, {"step": 5, "loss": 2.0, "validation_loss": 2.5}],
        "dpo": [{"step": 0, "loss": 0.7, "reward_chosen": 0.0, "reward_rejected": -1.0, "validation_accuracy": 0.5}],
    }
    for stage, values in rows.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)  # keep the figure to look at
    picture = report.plot_curves(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    curves = {a.get_title(): [tuple(p) for p in a.lines[0].get_xydata()] for a in figure.axes if a.lines}
    assert curves == {
        "SFT: loss (nats a token)": [(0, 3.0), (5, 2.0)],
        "SFT: held-out loss (nats a token)": [(5, 2.5)],
        "DPO: loss": [(0, 0.7)],
        "DPO: held-out accuracy": [(0, 0.5)],
        "DPO: implicit reward, chosen": [(0, 0.0)],
        "DPO: implicit reward, rejected": [(0, -1.0)],
    }
    monkeypatch.undo()
    plt.close(figure)
