"""Made-up records of every run give a row for every claim, and every plot."""

import json
import re

import numpy as np
import pytest
from benchmarks.claims import adapted, decoders, inside, judges, page, plots, runs, scratch, small
from benchmarks.claims.runs import Folders

BLOCKS = {"small": small, "scratch": scratch, "adapted": adapted, "decoders": decoders, "inside": inside}
LAYERS, HEADS = 6, 4


def made_up(name):
    """What the page and the plots read of a record, with noise."""
    random = np.random.default_rng([*name.encode()])
    block, form = name.split("_")[:2]
    if block == "small":
        angles = {
            when: {
                key: random.uniform(*(1, 2) if when == "after" else (20, 25))
                for key in ("angle_to_own_line", "angle_to_nearest_other_line")
            }
            | {"separation": random.uniform(*(30, 31) if when == "after" else (7, 8))}
            for when in ("before", "after")
        }
        return {**angles, "inside": looked_inside(random)}
    if name in ("scratch_speed", "adapted_cost"):
        return {
            "rows": [
                {
                    **{"form": one, "name": one, "image_size": side, "training": training},
                    **{"images_per_second": 1000 / time, "quartiles": [0.99 * time, 1.01 * time]},
                    **{"flops": time * 1e9, "peak_mib": time},
                }
                for one in (*scratch.FORMS, "original", *adapted.COST_VARIANTS)
                for side in adapted.COSTS
                for training in (False, True)
                for time in [random.uniform(90, 110)]
            ]
        }
    if name == "decoders_cost":
        costs = {form: 8e6 if form == "mhsa" else 1e6 for form in decoders.FORMS}
        return {
            "sides": [
                {
                    "side": side,
                    "encoder_flops": side**2 * 1e5,
                    "decoders": {
                        form: {"flops": side**2 * cost / 50, "similarities": side**2 * cost / 1e4}
                        for form, cost in costs.items()
                    },
                }
                for side in decoders.SIDES
            ]
        }
    accuracy = float(random.normal(0.65, 0.005))
    record = {"test_top1": accuracy, "mean_iou": accuracy / 3, "mean_iou_latter_half": accuracy / 4}
    if block == "scratch":
        return {
            **record,
            "flops": 2.4e7 + 1e5 * len(form),
            "similarities": 1e4 * len(form),
            "inside": looked_inside(random),
        }
    if block == "decoders":
        kept = np.exp(-np.array(decoders.SIGMAS) * 10)[:, None] * random.normal(1, 0.01, (1, 3))
        noise = {"sigmas": list(decoders.SIGMAS), "clean": accuracy, "values": (accuracy * kept).tolist()}
        return {**record, "test": {"miou": accuracy}, "robustness": noise}
    return {**record, "disc": 0.6, "zero_shot": {"chosen": {"foreground": {"iou": accuracy}}}}


def looked_inside(random):
    """As of :func:`benchmarks.inside.measure`."""
    before = 100 + 10 * np.arange(LAYERS)
    layers = [
        {
            kind: {"before": b + float(random.normal()), "after": b - 8.0, "fell": 95, "cases": 100}
            for kind in ("tokens", "representatives")
        }
        | {"certificate": {"median_fall": float(random.normal(8, 0.5)), "median_guaranteed": 5.0}}
        for b in before.tolist()
    ]
    return {
        "rate": before[::-1].tolist(),
        "gap": [[1.0] * HEADS] * LAYERS,
        "ranks": {"rank": [[16.0] * HEADS] * LAYERS, "effective": [[5.0] * HEADS] * LAYERS},
        "figure_6": {"W - A C": float(random.normal(0.8, 0.05)), "A C": float(random.normal(0, 0.05))},
        "step": {"layers": layers},
        "certificates": {"float64": {"cases": 100, "holding": 100, "share": 0.5}},
    }


@pytest.fixture
def complete(tmp_path, monkeypatch):
    for module in (runs, judges, plots):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    for block in BLOCKS.values():
        for run in block.runs(Folders()):
            record = made_up(run.name)
            runs.record_of(run.name).write_text(json.dumps({**record, "seed": run.seed}))


def test_every_claim_is_judged(complete):
    rows = [row.split(" | ") for row in page.table().splitlines()[2:]]
    assert len(rows) == len(page.CLAIMS)
    for *_, where, block, figure, verdict in rows:
        assert "not run yet" not in figure, (where, block)
        assert verdict.removesuffix(" |") in ("holds", "does not hold", "cannot be told")
    assert {re.search(r"\(`(\w+)`\)", row[3]).group(1) for row in rows} >= set(BLOCKS)


def test_runs_have_names_of_their_own_and_needs_that_exist():
    plan = [run for block in BLOCKS.values() for run in block.runs(Folders())]
    names = [run.name for run in plan]
    assert len(set(names)) == len(names)
    assert {need for run in plan for need in run.needs} <= set(names)


def test_every_plot_is_drawn(complete, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    assert plots.pictures() == ""
    assert [path.stem for path in plots.write()] == list(plots.PLOTS)
    assert plots.pictures().count("](../images/claims_") == len(plots.PLOTS)


def test_without_records_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    assert plots.write() == []
