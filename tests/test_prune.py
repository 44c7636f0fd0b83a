"""Schedule, selection, drop, ragged caches, scorers, accounting: the exactness the rest is built on."""
import math

import pytest
import torch
from torch import nn

import model as model_module
from conftest import tiny_model
from model import SHAPES, positions
from predictor import Predictor, score
from prune import (H2O, SCORERS, Schedule, attention_scorer, drop, extend, flops, kv_bytes, local_tokens, make_scorer, nll, norm_scorer, oracle_scorer,
                   predictor_scorer, prefill, random_scorer, select)
from saliency import saliency
from train import masked_pass

SCHEDULE = Schedule(1, 1, 4, 0.8)


def predictors_for(model, stages=4, seed=3):
    torch.manual_seed(seed)
    return nn.ModuleList(Predictor(model.config.dim) for _ in range(stages)).requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ schedule


def test_paper_schedule_drops_65_percent():
    schedule = Schedule()
    assert schedule.after(32) == [4, 7, 10, 13, 16, 19, 22, 25, 28, 31]
    counts = schedule.counts(1000, 32)
    assert counts == [1000] * 4 + [n for n in (900, 810, 729, 656, 590, 531, 478, 430, 387) for _ in range(3)] + [349]
    assert round(schedule.pruned, 3) == 0.651 and schedule.pruned == 1 - 0.9 ** 10


def test_stages_past_the_last_block_fall_away():
    assert Schedule(2, 2, 9, 0.5).after(6) == [2, 4]
    assert Schedule(2, 2, 9, 0.5).counts(100, 6) == [100, 100, 50, 50, 25, 25]
    assert Schedule(6, 1, 1, 0.5).counts(100, 6) == [100] * 6, "a stage after the last block has nothing to shorten"


def test_counts_never_fall_below_the_protected():
    schedule = Schedule(1, 1, 5, 0.3, sink=4, local=0.1)
    assert schedule.counts(50, 6) == [50, 15, 9, 9, 9, 9]
    for n in (1, 2, 5, 11, 999):
        counts = schedule.counts(n, 6)
        assert counts[0] == n and counts == sorted(counts, reverse=True) and counts[-1] >= 1


def test_scaled_schedule_is_the_papers_at_32_blocks():
    assert Schedule.scaled(32) == Schedule()
    assert Schedule.scaled(30) == Schedule(4, 3, 9, 0.89)
    for blocks in (4, 12, 16, 24, 48, 80):
        assert Schedule.scaled(blocks).after(blocks) and 0.6 < Schedule.scaled(blocks).pruned < 0.7


@pytest.mark.parametrize("bad", [dict(first=0), dict(step=0), dict(stages=-1), dict(keep=0), dict(keep=1.1), dict(local=2), dict(sink=-1)])
def test_bad_schedule(bad):
    with pytest.raises(ValueError):
        Schedule(**bad)


# ----------------------------------------------------------------------------------------------------------- selection


def test_explicit_shares():
    schedule = Schedule(1, 2, 3, 0.9, sink=1, local=0.01, shares=[0.9, 0.9, 0.25])
    assert schedule.counts(100, 7) == [100, 90, 90, 90, 90, 25, 25] and schedule.pruned == 0.75
    for bad in ([0.9], [0.9, 0.8, 0.85], [1.1, 1, 1], [0.5, 0.2, 0]):
        with pytest.raises(ValueError, match="shares are one number"):
            Schedule(1, 2, 3, shares=bad)


def test_select_keeps_protected_then_top_scored_in_order():
    s = torch.tensor([[0.0, 0.1, 9.0, 0.2, 8.0, 0.3, 7.0, 0.0, 0.0, 0.0]])
    pos = positions(s)
    assert select(s, pos, 5, 10, sink=1, local=0.2).tolist() == [[0, 2, 4, 8, 9]]
    assert select(s, pos, 3, 10, sink=1, local=0.2).tolist() == [[0, 8, 9]]
    assert select(s, pos, 10, 10).tolist() == [list(range(10))]


def test_select_knows_original_positions_and_the_response():
    pos = torch.tensor([[0, 3, 5, 8, 9, 10, 11]])                    # after earlier drops; the prompt had 10 tokens
    s = torch.tensor([[0.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0]])
    assert select(s, pos, 5, 10, sink=1, local=0.1).tolist() == [[0, 2, 4, 5, 6]]


def test_ties_go_to_the_earlier_token_and_the_last_token_stays():
    s = torch.zeros(1, 8)
    assert select(s, positions(s), 4, 8, sink=0, local=0.0).tolist() == [[0, 1, 2, 7]]
    assert local_tokens(100, 0.1) == 10 and local_tokens(101, 0.1) == 11 and local_tokens(30, 0.1) == 3 and local_tokens(5, 0) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_never_pushes_out_a_protected_token(bad):
    s = torch.tensor([[0.0, 0.0, 0.0, 0.0, bad, bad, bad, 1.0, 1.0, 1.0, 0.0, 0.0]])
    assert select(s, positions(s), 6, 12).tolist() == [[0, 1, 2, 3, 10, 11]]


def test_drop_keeps_states_and_positions_together(tokens):
    x, pos = torch.randn(2, 60, 7), positions(tokens)
    index = torch.tensor([[0, 5, 59], [1, 2, 3]])
    y, p = drop(x, pos, index)
    assert torch.equal(p, index) and all(torch.equal(y[b, i], x[b, index[b, i]]) for b in range(2) for i in range(3))


# ----------------------------------------------------------------------------------------------------------- exactness


def test_keep_everything_is_the_unpruned_model_bit_for_bit(tiny, tokens):
    everything = Schedule(1, 1, 4, 1.0)
    logits, caches, trace = prefill(tiny, tokens, everything, predictor_scorer(predictors_for(tiny)), room=1)
    full, full_caches, _ = prefill(tiny, tokens, room=1)
    assert len(trace) == 4 and torch.equal(logits, full)
    assert all(torch.equal(a.k[:, :, :60], b.k[:, :, :60]) and torch.equal(a.v[:, :, :60], b.v[:, :, :60]) for a, b in zip(caches, full_caches))
    assert torch.allclose(full, tiny(tokens)[:, -1], atol=1e-5)


@pytest.mark.parametrize("window", [None, 17])
def test_mask_equals_drop_at_every_survivor(tokens, window):
    model = tiny_model(window=window)
    predictors = predictors_for(model)
    N = tokens.shape[1]
    x, logits, masks = masked_pass(model, predictors, tokens, N, SCHEDULE, mask="topk")
    _, caches, trace = prefill(model, tokens, SCHEDULE, predictor_scorer(predictors))
    for stage, m, lg in zip(trace, masks[1:], logits):
        assert all(torch.equal(stage.kept[b], m[b].nonzero()[:, 0]) for b in range(2)), "the same tokens survive"
        assert torch.allclose(stage.score, score(lg).gather(1, stage.seen), atol=1e-4), "with the same scores"
    # and the survivors leave the last block with the same states: run the pruned loop once more, up to its last state
    pos, y = positions(tokens), model.embed(tokens)
    for i, block in enumerate(model.blocks, start=1):
        y = block(y, model.rope(pos, N))
        if i in SCHEDULE.after(6):
            kept = trace[i - 1].kept
            y, pos = drop(y, pos, torch.searchsorted(pos.contiguous(), kept.contiguous()))
    assert torch.allclose(x.gather(1, pos[:, :, None].expand(-1, -1, x.shape[2])), y, atol=1e-4)


def test_masked_response_equals_teacher_forcing_on_ragged_caches(tiny, tokens):
    predictors = predictors_for(tiny)
    x, _, _ = masked_pass(tiny, predictors, tokens, 48, SCHEDULE, mask="topk")
    masked = -tiny.logits(x[:, 47:-1]).log_softmax(-1).gather(2, tokens[:, 48:, None])[..., 0]
    assert torch.allclose(masked, nll(tiny, tokens, 48, SCHEDULE, predictor_scorer(predictors)), atol=1e-4)
    full = -tiny(tokens)[:, 47:-1].log_softmax(-1).gather(2, tokens[:, 48:, None])[..., 0]
    assert torch.allclose(full, nll(tiny, tokens, 48), atol=1e-4)
    assert (masked - full).abs().max() > 0.01, "65% fewer tokens do change something here"
    assert nll(tiny, tokens[:, :49], 48).shape == (2, 1)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("chunk", [1, 3])
def test_ragged_decode_equals_masked_recompute(tokens, window, chunk):
    model = tiny_model(window=window)
    _, caches, _ = prefill(model, tokens[:, :48], SCHEDULE, random_scorer(5), room=12)
    held = [cache.pos[:, :cache.n].clone() for cache in caches]
    assert [h.shape[1] for h in held] == SCHEDULE.counts(48, 6)
    decoded = torch.cat([extend(model, tokens[:, i:i + chunk], i, caches) for i in range(48, 60, chunk)], dim=1)
    # recompute everything at once; block l hides the prompt tokens that never entered it
    x = model.embed(tokens)
    rope = model.rope(positions(tokens), 60)
    for block, h in zip(model.blocks, held):
        keep = torch.zeros(2, 60).scatter(1, h, 1.0)
        keep[:, 48:] = 1
        x = block(x, rope, keep=keep)
    assert torch.allclose(decoded, model.logits(x)[:, 48:], atol=2e-4)


@pytest.mark.parametrize("heavy", [0.5, 0.0])
def test_h2o_equals_a_slow_specification(tiny, tokens, heavy):
    """Every block and KV head keeps a dictionary of its keys; each new token attends to it in plain loops."""
    schedule, h2o, prompt = Schedule(1, 1, 4, 0.8), H2O(0.4, heavy), tokens[:1, :48]
    logits, caches, trace = prefill(tiny, prompt, schedule, norm_scorer(), 12, h2o)
    kept = {stage.block: stage.kept for stage in trace}
    G, group, d = 2, 2, 12

    def attend(store, q, k, v, position):
        """One token of one KV head: remember its key, attend, add what each key received -> outputs of the head's queries."""
        store[position] = [k, v, 0.0]
        outputs = []
        for one in q:
            e = {p: math.exp((one @ entry[0]).item() / math.sqrt(d)) for p, entry in store.items()}
            for p in store:
                store[p][2] += e[p] / sum(e.values())
            outputs.append(sum(e[p] / sum(e.values()) * store[p][1] for p in store))
        return torch.stack(outputs)

    def shrink(store, entered):
        budget = math.ceil(0.4 * entered - 1e-9)
        order = sorted(store)
        latest = order[len(order) - (budget - int(heavy * budget)):] if budget < len(order) else order
        others = sorted((p for p in order if p not in latest), key=lambda p: -store[p][2])
        for p in others[budget - len(latest):]:
            del store[p]

    stores, entered, pos, x = [], [], positions(prompt), tiny.embed(prompt)
    for i, block in enumerate(tiny.blocks, start=1):                 # the prompt, token by token
        q, k, v = block.qkv(x, tiny.rope(pos, 48))
        heads = [{} for _ in range(G)]
        y = torch.cat([torch.cat([attend(heads[g], q[0, g * group:(g + 1) * group, t], k[0, g, t], v[0, g, t], p) for g in range(G)])[None, :, None]
                       for t, p in enumerate(pos[0].tolist())], 2)   # (1, H, n, d)
        stores.append(heads)
        entered.append(pos.shape[1])
        for store in heads:
            shrink(store, entered[-1])
        x = block.mix(x, y)
        if i in kept:
            index = torch.searchsorted(pos, kept[i])
            x, pos = drop(x, pos, index)
    assert torch.allclose(tiny.logits(x[:, -1:])[:, 0], logits, atol=1e-4)
    for step in range(8):
        token = tokens[:1, 48 + step:49 + step]
        found = extend(tiny, token, 48 + step, caches, h2o)
        x, pos = tiny.embed(token), torch.tensor([[48 + step]])
        for block, heads, i in zip(tiny.blocks, stores, range(6)):
            q, k, v = block.qkv(x, tiny.rope(pos, 49 + step))
            y = torch.cat([attend(heads[g], q[0, g * group:(g + 1) * group, 0], k[0, g, 0], v[0, g, 0], 48 + step) for g in range(G)])[None, :, None]
            entered[i] += 1
            for store in heads:
                shrink(store, entered[i])
            x = block.mix(x, y)
        assert torch.allclose(tiny.logits(x), found, atol=1e-4)
        for cache, heads in zip(caches, stores):
            held = torch.stack([torch.stack([store[p][0] for p in sorted(store)]) for store in heads])
            assert torch.allclose(cache.k[0, :, :cache.n], held, atol=1e-4)
    with pytest.raises(ValueError, match="one token at a time"):
        extend(tiny, tokens[:1, :2], 60, caches, h2o)


def test_long_prompts_go_through_the_mlp_in_pieces(tiny, tokens, monkeypatch):
    whole = prefill(tiny, tokens)[0]
    monkeypatch.setitem(model_module.MLP_CHUNK, "cpu", 16)
    assert torch.allclose(prefill(tiny, tokens)[0], whole, atol=1e-5)


def test_survivors_are_the_top_scored_and_stay_dropped(tiny, tokens):
    _, caches, trace = prefill(tiny, tokens, SCHEDULE, random_scorer(1))
    alive = set(range(60))
    for stage in trace:
        seen, kept = stage.seen[0].tolist(), stage.kept[0].tolist()
        assert set(seen) == alive and kept == sorted(kept) and set(range(4)) | set(range(54, 60)) <= set(kept)
        values = dict(zip(seen, stage.score[0].tolist()))
        lost = alive - set(kept)
        assert max(values[i] for i in lost) <= min(values[i] for i in kept if 4 <= i < 54)
        alive = set(kept)
    assert [c.n for c in caches] == SCHEDULE.counts(60, 6)
    assert torch.equal(caches[-1].pos[:, :caches[-1].n], trace[-1].kept), "original positions, not renumbered"


def test_empty_and_too_long_prompts(tiny):
    with pytest.raises(ValueError, match="a schedule needs a scorer"):
        prefill(tiny, torch.zeros(1, 9, dtype=torch.long), SCHEDULE)
    with pytest.raises(ValueError, match="the prompt is empty"):
        prefill(tiny, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="beyond this model's 512 positions"):
        prefill(tiny, torch.zeros(1, 513, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------------- scorers


def test_every_scorer_has_the_same_signature(tiny, tokens):
    x, pos = torch.randn(2, 60, 48), positions(tokens)
    for name in SCORERS:
        s = make_scorer(name, tiny, SCHEDULE, predictors_for(tiny))(0, x, pos)
        assert s.shape == (2, 60) and torch.isfinite(s).all(), name
    with pytest.raises(ValueError, match="unknown scorer"):
        make_scorer("best", tiny, SCHEDULE)
    with pytest.raises(ValueError, match="no trained predictors"):
        make_scorer("predictor", tiny, SCHEDULE)


def test_a_prior_is_added_to_the_ranks(tiny, tokens):
    x, pos, predictors = torch.randn(2, 60, 48), positions(tokens), predictors_for(tiny)
    s = score(predictors[0](x))
    assert torch.equal(predictor_scorer(predictors)(0, x, pos), s)
    with_prior = predictor_scorer(predictors, 0.5)(0, x, pos)
    for b in range(2):
        for i in (0, 17, 59):
            rank = (s[b] < s[b, i]).sum() / 60
            assert abs(with_prior[b, i] - (rank + 0.5 * (1 - i / 60))) < 1e-6
    assert torch.equal(predictor_scorer(predictors, 1e6)(0, x, pos).argsort(1, descending=True), pos), "a huge prior keeps the earliest"
    assert torch.equal(make_scorer("prior", tiny, SCHEDULE, predictors, prior=0.5)(0, x, pos), with_prior)
    assert torch.equal(make_scorer("predictor", tiny, SCHEDULE, predictors, prior=0.5)(0, x, pos), s)


def test_attention_received_sums_to_heads_times_queries(tiny, tokens):
    x, pos = tiny.embed(tokens), positions(tokens)
    everything, last = (attention_scorer(tiny, SCHEDULE, n)(0, x, pos) for n in (None, 16))
    assert torch.allclose(everything.sum(1), torch.tensor(4.0 * 60)) and torch.allclose(last.sum(1), torch.tensor(4.0 * 16))


def test_oracle_reads_the_saliency_at_original_positions(tiny, tokens):
    s = saliency(tiny, tokens, 48, SCHEDULE.after(6))
    _, _, trace = prefill(tiny, tokens[:, :48], SCHEDULE, oracle_scorer(s))
    for i, stage in enumerate(trace):
        assert torch.equal(stage.score, s[i].gather(1, stage.seen))


# ---------------------------------------------------------------------------------------------------------- accounting


TABLE_2 = {4096: 72.51, 8192: 158.22, 16384: 369.22, 32768: 949.54, 65536: 2743.46, 131072: 8864.49}


@pytest.mark.parametrize("n, tflops", TABLE_2.items())
def test_paper_baselines(n, tflops):
    assert abs(flops(SHAPES["mistral-7b"], [n] * 32, "paper") / 1e12 / tflops - 1) < 1e-3


def test_exact_flops_equal_a_count_of_every_matrix_product():
    c, counts = tiny_model().config, [10, 10, 7, 7, 4, 4]
    total = 2 * c.dim * c.vocab
    for n in counts:
        for rows, inner, columns in ((n, c.dim, 48), (n, c.dim, 24), (n, c.dim, 24), (n, 48, c.dim), (n, c.dim, c.ffn), (n, c.dim, c.ffn), (n, c.ffn, c.dim)):
            total += 2 * rows * inner * columns
        for query in range(n):
            total += c.n_heads * (query + 1) * c.head_dim * 2 * 2
    assert flops(c, counts) == total
    module = sum(2 * n * (48 * 32 + 32 * 2) for n in (10, 7))
    assert flops(c, counts, schedule=Schedule(2, 2, 2, 0.7)) == total + module
    with pytest.raises(ValueError):
        flops(c, counts, "rough")


def test_ten_stages_save_a_third_to_a_half():
    for shape in ("llama-7b", "mistral-7b", "llama-3-8b"):
        c = SHAPES[shape]
        for n in TABLE_2:
            saved = 1 - flops(c, Schedule().counts(n, 32), schedule=Schedule()) / flops(c, [n] * 32)
            assert 0.33 < saved < 0.50
    module = flops(c, [4096] * 32, schedule=Schedule()) - flops(c, [4096] * 32)
    assert module < 0.01 * flops(c, [4096] * 32), "the modules cost under 1%"
    assert kv_bytes(SHAPES["mistral-7b"], [131072] * 32) == math.prod((131072, 32, 2, 8, 128, 2))
