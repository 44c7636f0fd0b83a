"""support/around.py: numbers blended with those of the tokens around, marks made so, and
predictors that read their neighbours' states."""
from dataclasses import replace

import pytest
import torch

from conftest import SCHEDULE, close, fresh_predictors, predictors_for
from model import PAD, positions
from predictor import Predictor
from prune import prefill, predictor_scorer
from support.around import blended, mean_around
from support.data import Example, pad
from support.saved import load_predictors, save_predictors
from train import Recipe, fit, marking


@pytest.mark.parametrize("share, window", [(0.5, 5), (1.0, 9), (0.7, 65)])
def test_every_token_by_hand(share, window):
    torch.manual_seed(0)
    values, counted = torch.rand(2, 40), torch.rand(2, 40) > 0.3
    found = blended(values, counted, share, window)
    for b in range(2):
        for i in range(40):
            span = slice(max(0, i - window // 2), i + window // 2 + 1)
            near = values[b, span][counted[b, span]]
            mixed = (1 - share) * values[b, i] + share * near.mean()
            right = mixed if counted[b, i] else values[b, i]
            assert abs(found[b, i] - right) < 1e-6


def test_alone_nothing_changes():
    values = torch.rand(2, 40)
    everyone = torch.ones(2, 40, dtype=torch.bool)
    assert torch.equal(blended(values, everyone, 0.0), values)
    assert torch.allclose(blended(values, everyone, 0.8, 1), values)


def test_marks_are_blended_within_the_tokens_that_compete(tiny, tokens):
    rows = [Example(tokens[0], 50), Example(tokens[1, :40], 30)]
    batch = pad(rows, "cpu")
    plain = marking(tiny, batch, SCHEDULE, Recipe())
    found = marking(tiny, batch, SCHEDULE, replace(Recipe(), around=0.5))
    alone = marking(tiny, pad(rows[1:], "cpu"), SCHEDULE, replace(Recipe(), around=0.5))
    for s, t, single in zip(plain.saliency, found.saliency, alone.saliency):
        assert torch.equal(s[:, :4], t[:, :4]), "the first tokens do not compete"
        assert torch.equal(s[0, 45:], t[0, 45:]), "nor do the prompt's last and the response"
        assert not torch.allclose(s[0, 4:45], t[0, 4:45])
        assert torch.allclose(t[1, :40], single[0], atol=1e-5, rtol=1e-3)


def test_the_mean_of_the_tokens_around_by_hand():
    """Ragged positions, tokens that do not count, padding: each window is averaged by a loop."""
    generator = torch.Generator().manual_seed(0)
    pos = torch.stack([torch.randperm(60, generator=generator)[:30] for _ in range(2)])
    pos = pos.sort(1).values
    pos[1, 25:] = PAD
    x = torch.randn(2, 30, 3, generator=generator)
    there = torch.rand(2, 30, generator=generator) > 0.3
    for counted in (None, there):
        found = mean_around(x, pos, counted, reach=4)
        for b in range(2):
            for i in range(30 if b == 0 else 25):
                near = (pos[b] - pos[b, i]).abs() <= 4
                if counted is not None:
                    near &= counted[b]
                right = x[b, near].mean(0) if near.any() else torch.zeros(3)
                assert close(found[b, i], right, 1e-6)


def test_a_running_sum_over_a_long_prompt_is_exact():
    x = torch.randn(1, 20000, 2, generator=torch.Generator().manual_seed(0)) + 100
    found = mean_around(x, torch.arange(20000)[None])
    assert close(found[0, -1], x[0, -17:].double().mean(0).float(), 1e-4)


def test_rows_side_by_side_give_no_warning(tokens, recwarn):
    """Their positions are one row of memory, which torch.searchsorted warns of, once a process."""
    torch.set_warn_always(True)
    try:
        mean_around(torch.rand(2, 60, 3), positions(tokens))
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


def test_the_neighbours_state_moves_a_score_and_only_theirs():
    torch.manual_seed(0)
    predictor, x = Predictor(48, near=True), torch.randn(1, 60, 48)
    pos = positions(x[..., 0])
    moved = x.clone()
    moved[0, 30] += torch.randn(48)
    changed = (predictor(x, pos) != predictor(moved, pos)).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == list(range(14, 47))


def test_a_padded_row_is_scored_as_if_it_were_alone(tiny, tokens):
    scorer = predictor_scorer(predictors_for(tiny, near=True))
    _, _, together = prefill(tiny, tokens, SCHEDULE, scorer, lengths=[60, 41])
    _, _, alone = prefill(tiny, tokens[1:, :41], SCHEDULE, scorer)
    for a, b in zip(together, alone):
        n, k = b.seen.shape[1], b.kept.shape[1]
        assert close(a.score[1, :n], b.score[0], 1e-4)
        assert torch.equal(a.kept[1, :k], b.kept[0])


@pytest.mark.parametrize("states", ["pruned", "marked"])
def test_predictors_that_read_their_neighbours_are_trained_saved_and_read(tiny, tmp_path, states):
    rows = [Example(torch.randint(0, 90, (40,)), 30) for _ in range(4)]
    out = tmp_path / "near.safetensors"
    before = fresh_predictors(near=True)
    recipe = Recipe(near=True, around=0.5, states=states, steps=3)
    run = fit(tiny, rows, SCHEDULE, recipe, out)
    read, _ = load_predictors(out, tiny, SCHEDULE)
    for fresh, trained, again in zip(before, run.predictors, read):
        assert torch.equal(trained.near.weight, again.near.weight)
        assert not torch.equal(fresh.near.weight, again.near.weight)
    plain = tmp_path / "plain.safetensors"
    save_predictors(plain, fresh_predictors(), tiny.config, SCHEDULE)
    assert load_predictors(plain, tiny)[0][0].near is None
