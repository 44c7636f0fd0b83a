"""The measures on held-out rows: rank correlation, likelihood under every scorer, the prior's calibration."""
import pytest
import torch

import heldout
from prune import Schedule
from test_train import fresh_predictors, rows

SCHEDULE = Schedule(1, 1, 4, 0.8)


def test_spearman():
    a = torch.tensor([1.0, 5.0, 2.0, 9.0])
    assert heldout.spearman(a, a.exp()) == pytest.approx(1) and heldout.spearman(a, -a) == pytest.approx(-1)


def test_calibration_finds_the_prior_that_the_rows_want(tiny, monkeypatch):
    monkeypatch.setattr(heldout, "predictor_scorer", lambda predictors, prior: prior)
    monkeypatch.setattr(heldout, "nll", lambda model, tokens, n, schedule, prior: torch.full((1, 3), abs(prior + 0.25)))
    assert heldout.calibrate(tiny, None, rows(2), SCHEDULE) == -0.25


def test_report_measures_every_arm(tiny):
    found = heldout.report(tiny, fresh_predictors().eval(), rows(2), SCHEDULE, "norm_gx")
    assert set(found) == {"spearman", "overlap", "nll_full", "nll_sdtp", "nll_random", "nll_recent", "nll_oracle"}
    assert all(v == v for v in found.values()) and -1 <= found["spearman"] <= 1 and 0 < found["overlap"] <= 1
