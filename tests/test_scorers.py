"""lab/scorers.py: what else may rank the tokens, and how a prior is added."""
import copy
from itertools import product

import pytest
import torch

from conftest import SCHEDULE, close, predictors_for
from lab.scorers import (SCORERS, attention_scorer, expected_scorer, make_scorer, oracle_scorer,
                         random_scorer, ranks, with_neighbours, with_prior)
from model import PAD, positions, rotate
from predictor import score
from prune import predictor_scorer, prefill
from saliency import saliency


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_has_the_same_signature(tiny, tokens, name):
    x, pos = torch.randn(2, 60, 48), positions(tokens)
    scorer = make_scorer(name, tiny, SCHEDULE, predictors_for(tiny))
    s = scorer(0, x, pos)
    assert s.shape == (2, 60)
    assert torch.isfinite(s).all()


def test_an_unknown_scorer_and_missing_predictors_are_said(tiny):
    with pytest.raises(ValueError, match="unknown scorer"):
        make_scorer("best", tiny, SCHEDULE)
    with pytest.raises(ValueError, match="no trained predictors"):
        make_scorer("predictor", tiny, SCHEDULE)


def test_the_rules_order_by_place_and_by_size(tiny):
    size = torch.tensor([3.0, 1.0, 2.0])
    x = size[None, :, None].expand(1, 3, 48)
    pos = torch.tensor([[0, 4, 9]])
    best_first = {"recent": [2, 1, 0], "earliest": [0, 1, 2], "norm": [0, 2, 1]}
    for name, order in best_first.items():
        scorer = make_scorer(name, tiny, SCHEDULE)
        s = scorer(0, x, pos)[0]
        assert s.argsort(descending=True).tolist() == order, name


def test_the_seed_of_the_random_scorer_fixes_its_scores(tokens):
    x, pos = torch.zeros(2, 60, 48), positions(tokens)
    first, again, other = (random_scorer(seed)(0, x, pos) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------- prior


@pytest.fixture
def states(tiny, tokens):
    """Hidden states, their positions, and predictors for them."""
    return torch.randn(2, 60, 48), positions(tokens), predictors_for(tiny)


def test_a_prior_is_added_to_the_ranks(states):
    x, pos, predictors = states
    s = score(predictors[0](x))
    assert torch.equal(predictor_scorer(predictors)(0, x, pos), s)
    found = with_prior(predictor_scorer(predictors), 0.5)(0, x, pos)
    for b, i in product(range(2), (0, 17, 59)):
        rank = (s[b] < s[b, i]).sum() / 60
        early = 0.5 * (1 - i / 60)
        assert abs(found[b, i] - (rank + early)) < 1e-6


def test_a_huge_prior_keeps_the_earliest(states):
    x, pos, predictors = states
    found = with_prior(predictor_scorer(predictors), 1e6)(0, x, pos)
    assert torch.equal(found.argsort(1, descending=True), pos)


def test_no_prior_is_the_scorer_itself(states):
    scorer = predictor_scorer(states[2])
    assert with_prior(scorer, 0.0) is scorer


def test_the_prior_belongs_to_the_scorer_of_that_name(tiny, states):
    x, pos, predictors = states
    trained = predictor_scorer(predictors)
    pairs = {"predictor": trained, "prior": with_prior(trained, 0.5)}
    for name, scorer in pairs.items():
        made = make_scorer(name, tiny, SCHEDULE, predictors, prior=0.5)
        assert torch.equal(made(0, x, pos), scorer(0, x, pos)), name


def test_padding_takes_the_lowest_ranks(states):
    x, pos, predictors = states
    scorer = with_prior(predictor_scorer(predictors), 0.5)
    padded = pos.clone()
    padded[1, 37:] = PAD
    found = scorer(0, x, padded)
    whole = scorer(0, x[:1], pos[:1])
    short = scorer(0, x[1:, :37], pos[1:, :37])
    assert torch.equal(found[0], whole[0])
    assert torch.equal(found[1, :37], short[0])
    assert found[1, 37:].max() < short.min()


# -------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("share, window", [(0.6, 33), (1.0, 5), (0.3, 61)])
def test_neighbours_are_averaged_one_by_one(states, share, window):
    x, pos, predictors = states
    scorer = predictor_scorer(predictors)
    rank = ranks(scorer(0, x, pos), pos)
    found = with_neighbours(scorer, share, window)(0, x, pos)
    for b, i in product(range(2), (0, 3, 31, 59)):
        low = max(0, i - window // 2)
        around = rank[b, low:i + window // 2 + 1]
        mixed = (1 - share) * rank[b, i] + share * around.mean()
        assert abs(found[b, i] - mixed) < 1e-6


def test_alone_a_score_keeps_its_rank(states):
    x, pos, predictors = states
    scorer = predictor_scorer(predictors)
    for alone in (with_neighbours(scorer, share=0.0), with_neighbours(scorer, window=1)):
        order = alone(0, x, pos).argsort(dim=1, stable=True)
        assert torch.equal(order, scorer(0, x, pos).argsort(dim=1, stable=True))


def test_padding_is_nobodys_neighbour(states):
    x, pos, predictors = states
    scorer = with_neighbours(predictor_scorer(predictors))
    padded = pos.clone()
    padded[1, 37:] = PAD
    found = scorer(0, x, padded)
    short = scorer(0, x[1:, :37], pos[1:, :37])
    assert close(found[1, :37], short[0], 1e-6)
    assert found[1, 37:].max() < short.min()


# ------------------------------------------------------------------------------ attention, saliency


@pytest.mark.parametrize("last, queries", [(None, 60), (16, 16)])
def test_attention_received_sums_to_heads_times_queries(tiny, tokens, last, queries):
    x, pos = tiny.embed(tokens), positions(tokens)
    received = attention_scorer(tiny, SCHEDULE, last)(0, x, pos)
    assert received.sum(1).tolist() == pytest.approx([4.0 * queries] * 2, rel=1e-5)


@pytest.mark.parametrize("last", [None, 16])
def test_attention_is_the_same_in_chunks(tiny, tokens, last):
    x, pos = tiny.embed(tokens), positions(tokens)
    whole = attention_scorer(tiny, SCHEDULE, last)(0, x, pos)
    chunks = attention_scorer(tiny, SCHEDULE, last, chunk=7)(0, x, pos)
    assert close(whole, chunks, 1e-5)


def test_expected_attention_is_the_mean_over_many_queries(tiny, tokens):
    """Drawn from the Gaussian, queries at one future position give the same scores."""
    model, after = copy.deepcopy(tiny), SCHEDULE.after(6)[0]
    block = model.blocks[after]
    block.q.weight.data *= 0.3      # large logits would need too many queries
    x, pos = model.embed(tokens[:1]), positions(tokens[:1])
    found = expected_scorer(model, SCHEDULE, future=1)(0, x, pos)
    _, k, v = block.qkv(x, model.rope(pos, 60))
    q = block.q(block.attn_norm(x)).unflatten(-1, (4, -1)).transpose(1, 2)[0]      # (H, n, d)
    rope = model.rope(torch.tensor([[60]]), 61)
    generator, scores = torch.Generator().manual_seed(0), 0.0
    for h in range(4):
        deviation = q[h] - q[h].mean(0)
        noise = torch.randn(200_000, 60, generator=generator) @ deviation / 60 ** 0.5
        drawn = rotate((q[h].mean(0) + noise)[None, None], rope.cos, rope.sin)[0, 0]
        key, value = k[0, h * k.shape[1] // 4], v[0, h * k.shape[1] // 4]
        weight = torch.exp(drawn @ key.T / q.shape[-1] ** 0.5).mean(0)
        scores = scores + weight / weight.sum() * value.norm(dim=-1)
    assert close(found[0], scores, 1e-3)


def test_oracle_reads_the_saliency_at_original_positions(tiny, tokens):
    s = saliency(tiny, tokens, 48, SCHEDULE.after(6))
    _, _, trace = prefill(tiny, tokens[:, :48], SCHEDULE, oracle_scorer(s))
    assert len(trace) == 4
    for i, stage in enumerate(trace):
        assert torch.equal(stage.score, s[i].gather(1, stage.seen))
