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


def test_calibration_stops_when_it_is_asked_to(tiny, monkeypatch):
    stop = []

    def cost(*args):
        stop.append(15)
        return torch.zeros(1, 3)

    monkeypatch.setattr(heldout, "nll", cost)
    with pytest.raises(KeyboardInterrupt, match="calibrating: the predictors are saved"):
        heldout.calibrate(tiny, fresh_predictors(), random_rows(3), SCHEDULE, stop=stop)
    assert len(stop) == 1, "one row later"


def test_a_report_says_no_correlation_where_there_is_none(tiny):
    rows = random_rows(1, length=10, prompt_len=5)      # all of the prompt is protected
    found = heldout.report(tiny, rows, SCHEDULE, "norm_gx", fresh_predictors().eval())
    assert not {"spearman", "overlap"} & set(found) and found["nll_sdtp"] == found["nll_full"]


def test_report_measures_every_arm(tiny):
    found = heldout.report(tiny, random_rows(2), SCHEDULE, "norm_gx", fresh_predictors().eval())
    assert set(found) == {"spearman", "overlap", "nll_full", "nll_sdtp", "nll_random",
                          "nll_recent", "nll_oracle"}
    assert all(math.isfinite(value) for value in found.values())
    assert -1 <= found["spearman"] <= 1
    assert 0 < found["overlap"] <= 1
