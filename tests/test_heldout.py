"""lab/heldout.py: rank correlation, likelihood under every scorer, the prior's calibration."""
import math

import pytest
import torch

from conftest import SCHEDULE, fresh_predictors, random_rows
from lab import heldout


def test_spearman():
    a = torch.tensor([1.0, 5.0, 2.0, 9.0])
    assert heldout.spearman(a, a.exp()) == pytest.approx(1)
    assert heldout.spearman(a, -a) == pytest.approx(-1)


def test_overlap_of_the_top():
    a = torch.tensor([4.0, 3.0, 2.0, 1.0])
    b = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert heldout.overlap(a, b, 0.25) == 1.0
    assert heldout.overlap(a, b, 0.5) == 0.5


def test_calibration_finds_the_prior_that_the_rows_want(tiny, monkeypatch):
    def cost(model, tokens, prompt_len, schedule, prior):
        return torch.full((1, 3), abs(prior + 0.25))

    monkeypatch.setattr(heldout, "with_prior", lambda scorer, prior: prior)
    monkeypatch.setattr(heldout, "nll", cost)
    assert heldout.calibrate(tiny, None, random_rows(2), SCHEDULE) == -0.25


def test_report_measures_every_arm(tiny):
    found = heldout.report(tiny, random_rows(2), SCHEDULE, "norm_gx", fresh_predictors().eval())
    assert set(found) == {"spearman", "overlap", "nll_full", "nll_sdtp", "nll_random",
                          "nll_recent", "nll_oracle"}
    assert all(math.isfinite(value) for value in found.values())
    assert -1 <= found["spearman"] <= 1
    assert 0 < found["overlap"] <= 1
