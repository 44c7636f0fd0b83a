"""prune.py: schedule, selection, drop, ragged caches, accounting: what the rest is built on."""
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import SCHEDULE, batch_of, close, command, predictors_for, tiny_model
from lab.plan import SHAPES
from lab.schedules import with_shares
from lab.scorers import random_scorer
from model import PAD, masked_attention, positions
from predictor import score
from prune import (UNPRUNED, Schedule, candidates, drop, extend, flops, kv_bytes, local_tokens,
                   nll, predictor_scorer, prefill, select)
from train import masked_pass

# ---------------------------------------------------------------------------------------- schedule


def test_paper_schedule_drops_65_percent():
    schedule = Schedule()
    assert schedule.after(32) == [4, 7, 10, 13, 16, 19, 22, 25, 28, 31]
    counts = schedule.counts(1000, 32)
    assert counts[:4] == [1000] * 4
    assert counts[4::3] == [900, 810, 729, 656, 590, 531, 478, 430, 387, 349]
    for i in range(4, 31, 3):
        assert counts[i] == counts[i + 1] == counts[i + 2]
    assert schedule.share(10) == 0.9 ** 10 and round(schedule.share(10), 3) == 0.349


def test_stages_past_the_last_block_fall_away():
    schedule = Schedule(2, 2, 9, 0.5)
    assert schedule.after(6) == [2, 4]
    assert schedule.counts(100, 6) == [100, 100, 50, 50, 25, 25]
    assert replace(schedule, stages=2) == Schedule(2, 2, 2, 0.5)
    assert replace(schedule, stages=2).counts(100, 6) == schedule.counts(100, 6)
    late = Schedule(6, 1, 1, 0.5)
    assert late.counts(100, 6) == [100] * 6, "a stage after the last block shortens nothing"


def test_counts_never_fall_below_the_protected():
    schedule = Schedule(1, 1, 5, 0.3, sink=4, local=0.1)
    assert schedule.counts(50, 6) == [50, 15, 9, 9, 9, 9]
    for n in (1, 2, 5, 11, 999):
        counts = schedule.counts(n, 6)
        assert counts[0] == n
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] >= 1


def test_scaled_schedule_is_the_papers_at_32_blocks():
    assert Schedule.scaled(32) == Schedule()
    assert Schedule.scaled(30) == Schedule(4, 3, 9, 0.89)
    for blocks in (4, 12, 16, 24, 48, 80):
        assert Schedule.scaled(blocks).after(blocks)
        schedule = Schedule.scaled(blocks)
        assert 0.3 < schedule.share(schedule.stages) < 0.4


@pytest.mark.parametrize("name, value", [
    ("first", 0),
    ("step", 0),
    ("stages", -1),
    ("keep", 0),
    ("keep", 1.1),
    ("local", 2),
    ("sink", -1),
])
def test_bad_schedule(name, value):
    with pytest.raises(ValueError):
        Schedule(**{name: value})


def test_explicit_shares():
    places = Schedule(1, 2, 3, sink=1, local=0.01)
    schedule = with_shares(places, [0.9, 0.9, 0.25])
    assert schedule.counts(100, 7) == [100, 90, 90, 90, 90, 25, 25]
    assert schedule.share(3) == 0.25
    assert replace(schedule, stages=2).counts(100, 7) == [100] + [90] * 6
    assert replace(schedule, stages=2).share(2) == 0.9


@pytest.mark.parametrize("shares", [
    [0.9],
    [0.9, 0.8, 0.85],
    [1.1, 1, 1],
    [0.5, 0.2, 0],
])
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="shares are one number"):
        with_shares(Schedule(1, 2, 3), shares)


# --------------------------------------------------------------------------------------- selection


def chosen(scores, k, prompt_len, pos=None, sink=4, local=0.1):
    """select for one row, lists in and out; without pos nothing was dropped before."""
    scores = torch.tensor([scores])
    pos = positions(scores) if pos is None else torch.tensor([pos])
    return select(scores, pos, k, prompt_len, sink, local)[0].tolist()


def test_select_keeps_protected_then_top_scored_in_order():
    scores = [0.0, 0.1, 9.0, 0.2, 8.0, 0.3, 7.0, 0.0, 0.0, 0.0]
    assert chosen(scores, 5, 10, sink=1, local=0.2) == [0, 2, 4, 8, 9]
    assert chosen(scores, 3, 10, sink=1, local=0.2) == [0, 8, 9]
    assert chosen(scores, 10, 10) == list(range(10))


def test_select_knows_original_positions_and_the_response():
    pos = [0, 3, 5, 8, 9, 10, 11]           # after earlier drops; the prompt had 10 tokens
    scores = [0.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0]
    assert chosen(scores, 5, 10, pos, sink=1) == [0, 2, 4, 5, 6]


def test_ties_go_to_the_earlier_token_and_the_last_token_stays():
    assert chosen([0.0] * 8, 4, 8, sink=0, local=0.0) == [0, 1, 2, 7]


def test_the_local_share_is_rounded_up_and_never_nothing():
    assert local_tokens(100, 0.1) == 10
    assert local_tokens(101, 0.1) == 11
    assert local_tokens(30, 0.1) == 3
    assert local_tokens(5, 0) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_never_pushes_out_a_protected_token(bad):
    scores = [0.0] * 4 + [bad] * 3 + [1.0] * 3 + [0.0] * 2
    assert chosen(scores, 6, 12) == [0, 1, 2, 3, 10, 11]


def test_one_number_for_all_rows_or_a_list_with_one_for_each():
    s = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    pos = positions(s)
    both = select(s, pos, 12, 18)
    assert torch.equal(both, select(s, pos, [12] * 3, [18] * 3))
    assert torch.equal(both, select(s, pos, 12, [18] * 3))
    assert torch.equal(both, select(s, pos, [12] * 3, 18))


def test_each_row_has_its_own_count_and_prompt():
    """What stands behind a row's own count only fills the batch."""
    s = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    lengths, k = [20, 14, 9], [11, 9, 8]
    together = select(s, positions(s, lengths), k, lengths)
    assert together.shape == (3, 11)
    for row, n, kept in zip(range(3), lengths, k):
        alone = chosen(s[row, :n].tolist(), kept, n)
        assert together[row, :kept].tolist() == alone


def test_candidates_are_neither_protected_nor_padding():
    pos = positions(torch.zeros(2, 10), lengths=[10, 7])
    free = candidates(pos, [8, 5], Schedule(sink=2, local=0.2))
    assert pos[0, free[0]].tolist() == [2, 3, 4, 5]
    assert pos[1, free[1]].tolist() == [2, 3]
    assert pos[1, 7:].tolist() == [PAD] * 3


def test_drop_keeps_states_and_positions_together(tokens):
    x, pos = torch.randn(2, 60, 7), positions(tokens)
    index = torch.tensor([[0, 5, 59], [1, 2, 3]])
    y, kept = drop(x, pos, index)
    assert torch.equal(kept, index)
    for b in range(2):
        assert torch.equal(y[b], x[b, index[b]])


# --------------------------------------------------------------------------------------- exactness


def same_caches(a, b, n=60):
    """Whether caches hold the same n keys and values, bit for bit."""
    def held(cache):
        assert cache.n == n
        return torch.cat((cache.k, cache.v))[:, :, :n]

    return all(torch.equal(held(x), held(y)) for x, y in zip(a, b, strict=True))


def test_keep_everything_is_the_unpruned_model_bit_for_bit(tiny, tokens):
    scorer = predictor_scorer(predictors_for(tiny))
    everything = Schedule(1, 1, 4, 1.0)
    logits, caches, trace = prefill(tiny, tokens, everything, scorer, room=1)
    full, full_caches, none = prefill(tiny, tokens, room=1)
    assert len(trace) == 4
    assert none == []
    assert torch.equal(logits, full)
    assert same_caches(caches, full_caches)
    assert close(full, tiny(tokens)[:, -1], 1e-5)


def test_no_schedule_is_unpruned_bit_for_bit(tiny, tokens):
    """None, UNPRUNED and a scorer that nobody asks: the same prefill, decode and likelihood."""
    prompt, more = tokens[:, :48], tokens[:, 48:50]
    full, full_caches, _ = prefill(tiny, prompt, room=2)
    after = extend(tiny, more, 48, full_caches)
    cost = nll(tiny, tokens, 48)
    unasked = random_scorer()
    for arm in ((UNPRUNED, None), (UNPRUNED, unasked), (None, unasked)):
        logits, caches, trace = prefill(tiny, prompt, *arm, room=2)
        assert trace == []
        assert torch.equal(logits, full)
        assert torch.equal(extend(tiny, more, 48, caches), after)
        assert same_caches(caches, full_caches, 50)
        assert torch.equal(nll(tiny, tokens, 48, *arm), cost)


def test_a_scorer_is_any_function(tiny, tokens):
    """It is asked once a stage, for every token that is left; here even positions stay longest."""
    asked = []

    def even(stage, x, pos):
        asked.append((stage, x.shape, pos.shape))
        return 1.0 - pos % 2

    schedule = Schedule(2, 1, 2, 0.6, sink=1, local=0.0)
    _, _, trace = prefill(tiny, tokens, schedule, even)
    assert asked == [(0, (2, 60, 48), (2, 60)), (1, (2, 36, 48), (2, 36))]
    first, second = (stage.kept[0].tolist() for stage in trace)
    odd = [1, 3, 5, 7, 9]                       # ties go to the earlier
    assert first == sorted([*range(0, 60, 2), *odd, 59])
    assert second == [*range(0, 42, 2), 59]


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("window", [None, 17])
def test_mask_equals_drop_at_every_survivor(tokens, window, near):
    model = tiny_model(window=window)
    predictors = predictors_for(model, near=near)
    N = tokens.shape[1]
    x, logits, masks = masked_pass(model, predictors, batch_of(tokens, N), SCHEDULE, mask="topk")
    _, _, trace = prefill(model, tokens, SCHEDULE, predictor_scorer(predictors))
    assert len(trace) == len(logits) == 4
    for stage, mask, predicted in zip(trace, masks[1:], logits):
        for b in range(2):
            assert torch.equal(stage.kept[b], mask[b].nonzero()[:, 0]), "the same tokens survive"
        masked_score = score(predicted).gather(1, stage.seen)
        assert close(stage.score, masked_score, 1e-4), "with the same scores"
    y, pos = last_state(model, tokens, trace)
    rows = torch.arange(2)[:, None]
    assert close(x[rows, pos], y, 1e-4)


def last_state(model, tokens, trace):
    """The pruned loop once more, up to the state (B, k, D) that leaves the last block."""
    pos, x = positions(tokens), model.embed(tokens)
    for i, block in enumerate(model.blocks, start=1):
        x = block(x, model.rope(pos, tokens.shape[1]))
        if i <= len(trace):
            kept = trace[i - 1].kept.contiguous()
            index = torch.searchsorted(pos.contiguous(), kept)
            x, pos = drop(x, pos, index)
    return x, pos


def likelihood(logits, tokens):
    """NLL of the last tokens, told by logits (B, R, V)."""
    told = tokens[:, -logits.shape[1]:, None]
    return -logits.log_softmax(-1).gather(2, told)[..., 0]


@pytest.mark.parametrize("near", [False, True])
def test_masked_response_equals_teacher_forcing_on_ragged_caches(tiny, tokens, near):
    predictors = predictors_for(tiny, near=near)
    x, _, _ = masked_pass(tiny, predictors, batch_of(tokens, 48), SCHEDULE, mask="topk")
    masked = likelihood(tiny.logits(x[:, 47:-1]), tokens)
    pruned = nll(tiny, tokens, 48, SCHEDULE, predictor_scorer(predictors))
    assert close(masked, pruned, 1e-4)
    full = likelihood(tiny(tokens)[:, 47:-1], tokens)
    assert close(full, nll(tiny, tokens, 48), 1e-4)
    assert not close(masked, full, 0.01), "65% fewer tokens do change something here"
    assert nll(tiny, tokens[:, :49], 48).shape == (2, 1)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("chunk", [1, 3])
def test_ragged_decode_equals_masked_recompute(tokens, window, chunk):
    model = tiny_model(window=window)
    prompt, rest = tokens[:, :48], tokens[:, 48:]
    _, caches, _ = prefill(model, prompt, SCHEDULE, random_scorer(5), room=12)
    held = [cache.pos[:, :cache.n].clone() for cache in caches]
    assert [h.shape[1] for h in held] == SCHEDULE.counts(48, 6)
    decoded = []
    for i, part in zip(range(48, 60, chunk), rest.split(chunk, 1)):
        decoded.append(extend(model, part, i, caches))
    # recompute everything at once; block l hides the prompt tokens that never entered it
    x = model.embed(tokens)
    rope = model.rope(positions(tokens), 60)
    for block, h in zip(model.blocks, held):
        mask = torch.zeros(2, 60).scatter(1, h, 1.0)
        mask[:, 48:] = 1
        x = block(x, rope, partial(masked_attention, mask=mask))
    want = model.logits(x)[:, 48:]
    assert close(torch.cat(decoded, 1), want, 2e-4)


def test_a_start_on_the_device_decodes_the_same(tiny, tokens):
    """start as a number, or as a tensor with `end`, which a batch and a compiled step need."""
    prompt, more = tokens[:, :48], tokens[:, 48:51]

    def caches():
        return prefill(tiny, prompt, SCHEDULE, random_scorer(5), room=3)[1]

    number = extend(tiny, more, 48, caches())
    tensor = extend(tiny, more, torch.full((2, 1), 48), caches(), end=51)
    assert torch.equal(number, tensor)


def test_survivors_are_the_top_scored_and_stay_dropped(tiny, tokens):
    _, caches, trace = prefill(tiny, tokens, SCHEDULE, random_scorer(1))
    alive, fixed = set(range(60)), {*range(4), *range(54, 60)}
    for stage in trace:
        seen, kept = stage.seen[0].tolist(), stage.kept[0].tolist()
        assert set(seen) == alive
        assert kept == sorted(kept)
        assert fixed <= set(kept)
        values = dict(zip(seen, stage.score[0].tolist()))
        won = [values[i] for i in set(kept) - fixed]
        lost = [values[i] for i in alive - set(kept)]
        assert max(lost) <= min(won)
        alive = set(kept)
    assert [cache.n for cache in caches] == SCHEDULE.counts(60, 6)
    held = caches[-1].pos[:, :caches[-1].n]
    assert torch.equal(held, trace[-1].kept), "original positions, not renumbered"


def test_empty_and_too_long_prompts(tiny):
    with pytest.raises(ValueError, match="a schedule needs a scorer"):
        prefill(tiny, torch.zeros(1, 9, dtype=torch.long), SCHEDULE)
    with pytest.raises(ValueError, match="the prompt is empty"):
        prefill(tiny, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="beyond this model's 512 positions"):
        prefill(tiny, torch.zeros(1, 513, dtype=torch.long))


# -------------------------------------------------------------------------------------- accounting


TABLE_2 = {
    4096: 72.51,
    8192: 158.22,
    16384: 369.22,
    32768: 949.54,
    65536: 2743.46,
    131072: 8864.49,
}


@pytest.mark.parametrize("n, tflops", TABLE_2.items())
def test_paper_baselines(n, tflops):
    found = flops(SHAPES["mistral-7b"], [n] * 32, "paper") / 1e12
    assert abs(found / tflops - 1) < 1e-3


def test_exact_flops_equal_a_count_of_every_matrix_product():
    c, counts = tiny_model().config, [10, 10, 7, 7, 4, 4]
    D, F, q, kv = 48, 96, 48, 24
    matrices = [(D, q), (D, kv), (D, kv), (q, D)]
    matrices += [(D, F), (D, F), (F, D)]
    total = 2 * D * 90                      # the head
    for n in counts:
        for inner, columns in matrices:
            total += 2 * n * inner * columns
        for query in range(n):
            keys = query + 1
            total += 4 * keys * 12 * 2 * 2  # 4 heads of 12, q k^T and the sum of v
    assert flops(c, counts) == total
    modules = sum(2 * n * (48 * 32 + 32 * 2) for n in (10, 7))
    assert flops(c, counts, schedule=Schedule(2, 2, 2, 0.7)) == total + modules
    assert flops(c, counts, schedule=UNPRUNED) == total
    with pytest.raises(ValueError):
        flops(c, counts, "rough")


def test_ten_stages_save_a_third_to_a_half():
    schedule = Schedule()
    for shape in ("llama-7b", "mistral-7b", "llama-3-8b"):
        c = SHAPES[shape]
        for n in TABLE_2:
            pruned = flops(c, schedule.counts(n, 32), schedule=schedule)
            assert 0.33 < 1 - pruned / flops(c, [n] * 32) < 0.50


def test_the_modules_cost_under_a_percent():
    for shape in ("llama-7b", "mistral-7b", "llama-3-8b"):
        c, counts = SHAPES[shape], [4096] * 32
        modules = flops(c, counts, schedule=Schedule()) - flops(c, counts)
        assert modules < 0.01 * flops(c, counts)


def test_kv_bytes_of_a_long_prompt():
    want = 131072 * 32 * 2 * 8 * 128 * 2
    assert kv_bytes(SHAPES["mistral-7b"], [131072] * 32) == want


# ------------------------------------------------------------------------------------- the command


def test_the_command_tells_table_2():
    code, out, err = command("prune.py", "--shape", "llama-7b", "--lengths", 4096, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert abs(result["pruned"] - 0.651) < 1e-3


def test_a_length_of_zero_is_refused(leaves, capsys):
    assert leaves("prune.py", "--lengths", 0) == 2
    assert "expected a whole number, at least" in capsys.readouterr().err
