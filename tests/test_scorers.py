"""lab/scorers.py: every scorer against a slow loop, and one cut that costs what stages cost."""
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import SCHEDULE, TOKENS, close, frozen_predictors, tiny_model
from infer import generate
from lab.scorers import (AHEAD, Fronted, attention_scorer, by_chunks, by_mass, early_layer,
                         enough, known_scorer, lookahead, make_scorer, one_cut, scorer_flops,
                         with_neighbours)
from predictor import score
from prune import Schedule, extend, prefill, protected

MODEL = tiny_model()
PREDICTORS = frozen_predictors()
N = 60


def states(seed=0):
    """Hidden states, and their ragged positions, of which the last is N - 1."""
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randperm(N - 1, generator=generator)[:40].sort().values
    return (torch.randn(1, 41, 48, generator=generator),
            torch.cat((pos, torch.tensor([N - 1])))[None])


def made(name, seed=0):
    return make_scorer(name, MODEL, SCHEDULE, PREDICTORS, seed)


def rank_by_counting(scores):
    """For each of (n,) scores the share of those below it, or equal and earlier."""
    return [sum(other < s or other == s and j < i for j, other in enumerate(scores)) / len(scores)
            for i, s in enumerate(scores)]


def pooled(values, window):
    """The mean of each value and its neighbours."""
    around = [values[max(0, i - window // 2):i + window // 2 + 1] for i in range(len(values))]
    return [sum(each) / len(each) for each in around]


def test_rules():
    x, pos = states()
    length = x.square().sum(-1).sqrt()
    for name, expected in (("recent", pos), ("earliest", -pos), ("norm", length)):
        assert torch.allclose(made(name)(1, x, pos), expected.float(), rtol=1e-5)


def test_the_seed_of_the_random_scorer_fixes_its_scores():
    first, again, other = (made("random", seed) for seed in (1, 1, 2))
    for _ in range(2):              # a second stage draws anew
        scores, same, others = (scorer(1, *states()) for scorer in (first, again, other))
        assert torch.equal(scores, same) and not torch.equal(scores, others)


@pytest.mark.parametrize("share, window", [(0.6, 33), (1.0, 5), (0.0, 9)])
def test_neighbours_are_averaged_one_by_one(share, window):
    x, pos = states()
    ranks = rank_by_counting(score(PREDICTORS[0](x))[0].tolist())
    slow = [(1 - share) * rank + share * mean for rank, mean in zip(ranks, pooled(ranks, window))]
    found = with_neighbours(made("predictor"), share, window)(1, x, pos)
    assert found[0].tolist() == pytest.approx(slow, abs=1e-6)
    assert share != 0.6 or torch.equal(found, made("neighbours")(1, x, pos))


def given(q, k, at, window=None):
    """The attention of the last of the queries (n, d) to each key (n, d), at positions: a list."""
    i = len(at) - 1
    seen = [j for j in range(i + 1) if window is None or at[i] - at[j] < window]
    e = {j: math.exp(q[i] @ k[j] / math.sqrt(12)) for j in seen}
    return [e.get(j, 0.0) / sum(e.values()) for j in range(len(at))]


@pytest.mark.parametrize("name, last, pool", [
    ("attention", None, 1), ("progressive", 1, 1), ("middle", 8, 7)])
@pytest.mark.parametrize("window", [None, 11])
def test_attention_that_a_token_receives(name, last, pool, window):
    """By a loop over heads and queries, in the block that is next: the third behind stage 2."""
    model, (x, pos) = tiny_model(window=window), states()
    q, k, _ = model.blocks[2].qkv(x, model.rope(pos, N))
    slow, at = [0.0] * 41, pos[0].tolist()
    for h in range(4):
        for i in range(41 - (last or 41), 41):
            for j, value in enumerate(given(q[0, h], k[0, h // 2], at[:i + 1], window)):
                slow[j] += value
    found = make_scorer(name, model, SCHEDULE)(2, x, pos)[0]
    assert found.tolist() == pytest.approx(pooled(slow, pool), rel=1e-4, abs=1e-5)
    pieces = attention_scorer(model, SCHEDULE, last, pool, chunk=7)(2, x, pos)[0]
    assert close(pieces, found, 1e-5)


def test_a_lookahead_is_what_the_next_tokens_look_at():
    """By loops over a whole pass of prompt and next tokens: no cache, no batch of queries."""
    row, prompt = TOKENS[:, :43], TOKENS[:, :40]
    said = torch.tensor([generate(MODEL, prompt, AHEAD, eos=()).tokens])
    assert close(lookahead(MODEL, prompt), lookahead(MODEL, prompt, said), 1e-6)
    x, rope = MODEL.embed(row), MODEL.rope(torch.arange(43)[None], 43)
    slow = [[0.0] * 40 for _ in range(3)]
    for block in MODEL.blocks:
        q, k, _ = block.qkv(x, rope)
        for h in range(4):
            for i, best in enumerate(slow):
                end = 41 + i
                each = pooled(given(q[0, h], k[0, h // 2], list(range(end)))[:40], 13)
                slow[i] = [max(pair) for pair in zip(best, each)]
        x = block(x, rope)
    found = lookahead(MODEL, prompt, row[:, 40:])[0]
    assert found.tolist() == pytest.approx([sum(each) / 3 for each in zip(*slow)], rel=1e-4)
    chunks = by_chunks(found[None], 16)[0]
    for start in (0, 16, 32):
        part = slice(start, start + 16)
        assert close(chunks[part], found[part].mean().expand(len(found[part])), 1e-6)


@pytest.mark.parametrize("last", [1, 9])
def test_the_early_layer_asks_the_last_tokens_in_one_block(last):
    """As the attention rule above, at a stage before this block that drops nothing."""
    stage = Schedule(2, 1, 1, 1.0)
    _, _, trace = prefill(MODEL, TOKENS, stage, attention_scorer(MODEL, stage, last))
    assert close(early_layer(MODEL, TOKENS, 2, last), trace[0].scores, 1e-5)


def test_a_share_of_the_mass_is_reached_by_the_fewest():
    scores = torch.tensor([[0.1, 0.4, 0.0, 0.3, 0.2]])
    found = [enough(scores, mass) for mass in (0.3, 0.5, 0.75, 0.95, 1.0)]
    assert found == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_each_stage_keeps_the_fewest_tokens_that_hold_the_mass(mass):
    """The softmax is taken over those that compete; the protected stay beside them."""
    tokens, scorer = TOKENS[:, :48], made("predictor")
    schedule = by_mass(MODEL, tokens, SCHEDULE, scorer, mass)
    for stage in prefill(MODEL, tokens, schedule, scorer)[2]:
        fixed = protected(stage.seen, 48, SCHEDULE)[0].tolist()
        weights = [math.exp(s) for s, safe in zip(stage.scores[0].tolist(), fixed) if not safe]
        wanted, count = mass * sum(weights), 0
        while sum(sorted(weights)[-count:]) < wanted or not count:
            count += 1
        assert stage.kept.shape[1] == sum(fixed) + count


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_cut_before_the_first_block_reads_the_survivors_at_their_positions(keep):
    """keep 1.0 is the whole model, bit for bit; else all blocks see the chosen tokens alone."""
    scores, model = torch.rand(1, 48, generator=torch.Generator().manual_seed(3)), Fronted(MODEL)
    cut = Schedule(1, 1, 1, keep)
    logits, caches, trace = prefill(model, TOKENS[:, :48], cut, known_scorer(scores), room=4)
    pos = torch.cat((trace[0].kept, torch.arange(48, 52)[None]), 1)
    x, rope = MODEL.embed(TOKENS[:, pos[0]]), MODEL.rope(pos, 52)
    for block in MODEL.blocks:
        x = block(x, rope)
    found = torch.cat((logits[:, None], extend(model, TOKENS[:, 48:52], 48, caches)), 1)
    assert close(found, MODEL.logits(x[:, -5:]), 1e-5) and trace[0].kept.shape[1] == 48 * keep
    if keep == 1.0:
        assert torch.equal(logits, prefill(MODEL, TOKENS[:, :48])[0])


@pytest.mark.parametrize("name", ["attention", "progressive", "middle", "norm"])
def test_flops_of_a_rule_are_those_of_its_products(name):
    schedule, n, counter = Schedule(2, 1, 1, 0.5), 48, FlopCounterMode(display=False)
    x, pos = torch.randn(1, n, 48), torch.arange(n)[None]
    with counter:
        make_scorer(name, MODEL, schedule)(1, x, pos)
    assert scorer_flops(name, MODEL.config, schedule, [n] * 6) == counter.get_total_flops()


def test_missing_predictors_are_said():
    for name in ("predictor", "neighbours"):
        with pytest.raises(ValueError, match="no trained predictors"):
            make_scorer(name, MODEL, SCHEDULE)


@pytest.mark.parametrize("schedule, blocks", [(Schedule(), 32), (SCHEDULE, 6)])
def test_one_cut_costs_as_much_as_the_stages(schedule, blocks):
    cut = one_cut(schedule, blocks)
    assert cut.after(blocks) == schedule.after(blocks)[:1]
    for n in (400, 1000):
        ours, theirs = sum(cut.counts(n, blocks)), sum(schedule.counts(n, blocks))
        assert abs(ours - theirs) <= blocks
    assert one_cut(Schedule(stages=0), blocks) == Schedule(stages=0)
    for after in (0, blocks // 3):
        cut = one_cut(schedule, blocks, after)
        share = (after + cut.keep * (blocks - after)) / blocks
        assert share == pytest.approx(sum(schedule.counts(10**6, blocks)) / blocks / 10**6)
        assert cut.first == max(1, after)
    with pytest.raises(ValueError, match=f"one cut after block {blocks - 1} of {blocks} leaves"):
        one_cut(replace(schedule, keep=0.1), blocks, blocks - 1)
