"""Checks the eight exercises of exercises.py against slow specifications in plain Python, and names the likely mistake.

    python -m pytest tests/test_exercises.py                               # the repository's own functions: green
    python -m pytest tests/test_exercises.py --impl student                # tests/exercises.py: n/8 and hints; or --impl path/to/file.py
    python -m pytest tests/test_exercises.py --impl student --seed 7 --puzzles

Each specification has a switch `wrong`: the same loops with one classic mistake. Where an answer is wrong and equals the specification with such a
mistake in every case, the hint is the mistake's; else it names the first difference.
"""
import ast
import copy
import importlib.util
import inspect
import math
import random
import re
import textwrap
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import model as m
import predictor
import prune
import saliency
from common import Example, examples
from conftest import ROOT
from model import Config, find

# Exercise -> {mistake: hint}. The names are the values of the specifications' `wrong`.
HINTS = {
    "rotate": {
        "interleaved": "the pairs are interleaved (2i, 2i + 1); here feature i goes with feature i + d/2",
        "sign": "the sine has the wrong sign: the pair turns backwards",
        "renumbered": "the tokens are numbered anew 0 ... n - 1; a survivor keeps its original position, use pos",
        "first_row": "row 0's positions are used for every row of the batch",
        "exponent": "the exponent of theta is -2 i / d for i = 0 ... d/2 - 1; this is -i / d",
    },
    "saliency": {
        "g_alone": "norm_gx is the norm of g without x; multiply elementwise by x first",
        "sum_abs": "abs_dot sums the absolute values; Eq. 3 takes the absolute value of the sum over features",
        "signed": "abs_dot has no absolute value: a strongly negative token would rank last",
        "squared": "norm_gx is not the norm but its square: the root is missing",
        "stale": "an earlier gradient is added: backward() accumulates into x.grad; take torch.autograd.grad on a detached copy",
    },
    "ranking_loss": {
        "no_sign": "the sign of the saliency difference is missing: the loss always wants the earlier token on top",
        "flipped": "the sign is turned round: the loss wants the less salient token on top",
        "sum": "this is the sum over pairs, which grows with n squared; divide by the number of pairs",
        "all_pairs": "pairs i = j are counted too, each with log 2; only i < j are pairs",
        "no_ties": "pairs of equal saliency are left out; sign(0) = 0, so they count log 2 each",
        "no_mask": "the mask is ignored: pairs with tokens outside it are counted",
        "all_count": "the sum is divided by all n (n - 1) / 2 pairs of each row; count only the pairs inside the mask",
        "row_means": "this is the mean of the rows' means; all pairs of all rows are one heap",
        "overflow": "exp overflows at large score differences; use softplus, or logaddexp",
        "empty": "without any pair the result is 0, not 0 / 0",
    },
    "select": {
        "unsorted": "the right tokens, but not in increasing order: survivors must stay in reading order, or causal attention breaks",
        "no_sink": "the first `sink` positions are not protected",
        "no_local": "the last positions of the prompt are not protected",
        "floor": "the local share is rounded down; it is ceil(local * prompt_len - 1e-9), and at least 1",
        "floor_one": "the local share is rounded down; it is ceil(local * prompt_len - 1e-9)",
        "fuzz": "ceil without the - 1e-9: a product like 0.07 * 100 = 7.000000000000001 counts one too many",
        "local_of_left": "the local share is taken of the n tokens left; it is a share of the prompt",
        "no_response": "tokens after the prompt are not protected",
        "late_ties": "among equal scores the later token wins; the earlier should (argsort: stable=True)",
        "positions": "these are positions; wanted are indices into the n tokens that are left",
    },
    "masked_attention": {
        "no_diagonal": "a dropped query does not see itself: the mask's diagonal is 1",
        "no_renorm": "the mask is multiplied in after the softmax: the weights no longer sum to 1; mask before normalising",
        "not_causal": "later keys are seen: only j <= i",
        "no_scale": "the logits are not divided by sqrt(d)",
        "queries": "the mask hides queries (rows of the matrix); it has to hide keys (columns)",
        "hard": "the outputs are right, but a dropped key gets no gradient through keep: multiply the exponentials by the mask, instead of filling with -inf",
        "top_hidden": "the largest logit is taken over hidden keys too: all visible exponentials underflow and 0 / 0 is nan",
    },
    "tokens_per_block": {
        "early": "off by one: a stage stands AFTER its block, and the next block is the first to see fewer tokens",
        "late": "off by one: the fewer tokens are seen one block too late; the first is the block right after the stage's",
        "of_left": "keep ** s is taken of what is left; it is a share of the whole prompt",
        "iterated": "each stage rounds a share of the rounded count before it; it is round(keep ** s * n), of the prompt",
        "truncated": "the share is cut to a whole number; round it",
        "half_up": "halves are rounded up; Python's round takes them to the even number",
        "power": "off by one in the power: the first stage keeps keep ** 1",
        "no_minimum": "the counts fall below the protected tokens",
        "uncapped": "more tokens than the prompt has: the protected are never more than n",
        "floor": "the local share is rounded down; it is ceil(local * n - 1e-9), and at least 1",
        "floor_one": "the local share is rounded down; it is ceil(local * n - 1e-9)",
        "fuzz": "ceil without the - 1e-9: a product like 0.07 * 100 = 7.000000000000001 counts one too many",
        "no_local_one": "at least one local token is protected, even where local is 0",
        "wrapped": "a stage that stands after the last block falls away; here it shortens the last block",
    },
    "flops": {
        "no_gqa": "exact: k and v are counted for every query head; grouped-query attention has n_kv_heads of them",
        "not_causal": "exact: all n * n pairs are counted; causal attention has n (n + 1) / 2",
        "no_self": "exact: n (n - 1) / 2 pairs leave out each query's own key; there are n (n + 1) / 2",
        "head_everywhere": "exact: the head is counted for every token; a prefill needs it on the last one alone",
        "multiply_only": "half of it: a multiply-add is 2 FLOPs",
        "two_matrices": "exact: SwiGLU has three matrices, gate, up and down",
        "paper_gqa": "paper: Table 2's accounting ignores the grouping, each of q, k, v, o counts D x D",
        "paper_pairs": "paper: attention counts 3 D per pair, not the 4 D of two products",
        "paper_causal": "paper: all n * n pairs are counted, not the causal half",
        "paper_head": "paper: embedding and head, 4 V D, are counted for every token of the prompt",
    },
    "decode": {
        "cache_length": "the position is the number of tokens in the cache; decode goes on at N + t, the prompt's length, in every block",
        "stuck": "every new token stands at N; the t-th stands at N + t",
        "no_self": "a new token does not see itself: put it into the cache before attending",
        "not_appended": "the caches do not grow: the next token cannot see this one",
        "turned_again": "the cached keys are turned again; they already stand at their own positions",
        "all_turned_again": "the cached keys are turned again; they already stand at their own positions",
        "key_not_turned": "the new key is not turned to its position, only the query is",
        "no_residual": "the state itself is lost: x + Wo @ ..., not Wo @ ... alone",
        "sees_later": "a new token sees the ones after it: they come one by one",
        "no_scale": "the logits are not divided by sqrt(D)",
    },
}
EXERCISES = list(HINTS)
PUZZLES = ("puzzle_schedule", "puzzle_predictors", "puzzle_scorer")
TABLE_2 = {4096: 72.51, 8192: 158.22, 16384: 369.22, 32768: 949.54, 65536: 2743.46, 131072: 8864.49}   # TFLOPs, Mistral-7B


# ------------------------------------------- the specifications: lists and floats, and where torch is read, one number at a time


def turn(x, place, theta, wrong=None):
    """One vector, a list of d numbers, turned to its place."""
    d, out = len(x), list(x)
    for i in range(d // 2):
        angle = place * theta ** (-(i if wrong == "exponent" else 2 * i) / d)
        cos, sin = math.cos(angle), math.sin(angle) * (-1 if wrong == "sign" else 1)
        one, two = (2 * i, 2 * i + 1) if wrong == "interleaved" else (i, i + d // 2)
        out[one], out[two] = x[one] * cos - x[two] * sin, x[two] * cos + x[one] * sin
    return out


def spec_rotate(q, pos, theta, wrong=None):
    def place(b, t):
        return t if wrong == "renumbered" else pos[0 if wrong == "first_row" else b, t].item()
    return [[[turn(x, place(b, t), theta, wrong) for t, x in enumerate(head)] for head in row] for b, row in enumerate(q.tolist())]


def spec_saliency(f, x, reduce, wrong=None):
    """The gradient by central differences in double precision, one number at a time."""
    x, old, found = x.detach().double(), x.grad, []
    for i in range(x.shape[0]):
        gx, g = [], []
        for j in range(x.shape[1]):
            step = torch.zeros_like(x)
            step[i, j] = 1e-5
            slope = (f(x + step) - f(x - step)).item() / 2e-5
            g.append(slope + (old[i, j].item() if wrong == "stale" and old is not None else 0))
            gx.append(g[-1] * x[i, j].item())
        if reduce == "abs_dot":
            found.append(sum(map(abs, gx)) if wrong == "sum_abs" else sum(gx) if wrong == "signed" else abs(sum(gx)))
        else:
            square = sum(v * v for v in (g if wrong == "g_alone" else gx))
            found.append(square if wrong == "squared" else math.sqrt(square))
    return found


def spec_ranking_loss(score, saliency, mask, wrong=None):
    """[the loss, its gradient in score (B, n)]; a wrong one is known by the loss alone."""
    s, t, keep = score.tolist(), saliency.tolist(), mask.tolist()
    n, rows, slopes = len(s[0]), [], [[0.0] * len(s[0]) for _ in s]
    for b in range(len(s)):
        losses = []
        for i, j in product(range(n), range(n)):
            above = (t[b][i] > t[b][j]) - (t[b][i] < t[b][j])
            if i > j or i == j and wrong != "all_pairs" or wrong == "no_ties" and above == 0:
                continue
            if wrong != "no_mask" and not (keep[b][i] and keep[b][j]):
                if wrong == "all_count":
                    losses.append(0.0)
                continue
            sign = {"no_sign": 1, "flipped": -above}.get(wrong, above)
            z = -(s[b][i] - s[b][j]) * sign
            losses.append(math.inf if wrong == "overflow" and z > 88.8 else max(z, 0) + math.log1p(math.exp(-abs(z))))
            slope = -sign / (1 + math.exp(-max(z, -700)))
            slopes[b][i], slopes[b][j] = slopes[b][i] + slope, slopes[b][j] - slope
        rows.append(losses)
    count = sum(map(len, rows))
    if wrong == "row_means":
        means = [sum(losses) / len(losses) for losses in rows if losses]
        return [sum(means) / len(means) if means else 0.0, None]
    if wrong:
        total = sum(map(sum, rows))
        return [total if wrong == "sum" else total / count if count else math.nan if wrong == "empty" else 0.0, None]
    return [sum(map(sum, rows)) / max(1, count), [[v / max(1, count) for v in row] for row in slopes]]


def local_count(n, local, wrong=None):
    """The last tokens that are always kept."""
    if wrong in ("floor", "floor_one"):
        return max(wrong == "floor_one", math.floor(local * n))
    return max(wrong != "no_local_one", math.ceil(local * n - (0 if wrong == "fuzz" else 1e-9)))


def spec_select(score, pos, k, prompt_len, sink, local, wrong=None):
    found = []
    for s, p in zip(score.tolist(), pos.tolist()):
        first_local = prompt_len - local_count(len(p) if wrong == "local_of_left" else prompt_len, local, wrong)

        def rank(i):                # what is smaller comes first
            protected = p[i] < sink and wrong != "no_sink" or first_local <= p[i] < prompt_len and wrong != "no_local" \
                or p[i] >= prompt_len and wrong != "no_response"
            return (not protected, -s[i], -i if wrong == "late_ties" else i)
        kept = sorted(sorted(range(len(p)), key=rank)[:k])
        found.append([p[i] for i in kept] if wrong == "positions" else kept)
    return found


def attend(q, k, v, keep, found_keep, wrong=None):
    """One row: lists q, k, v [H][n][d], keep [n] -> [H][n][d]. found_keep: the mask that `top` is read from (keep itself, but for its gradient)."""
    n, d, out = len(keep), len(q[0][0]), []
    for h in range(len(q)):
        out.append([])
        for i in range(n):
            keys = range(n) if wrong == "not_causal" else range(i + 1)
            a = {j: sum(x * y for x, y in zip(q[h][i], k[h][j])) / (1 if wrong == "no_scale" else math.sqrt(d)) for j in keys}
            mask, found = ({j: row[i if wrong == "queries" else j] if j != i or wrong == "no_diagonal" else 1.0 for j in keys} for row in (keep, found_keep))
            top = max((a[j] for j in keys if found[j] or wrong == "top_hidden"), default=0.0)
            e = {j: math.exp(min(a[j] - top, 0)) for j in keys}
            if wrong == "no_renorm":
                top = max(a.values())
                e = {j: math.exp(a[j] - top) for j in keys}
                p = {j: e[j] / sum(e.values()) * mask[j] for j in keys}
            else:
                e = {j: 0.0 if a[j] - top < -104 else e[j] * mask[j] for j in keys}          # below e^-104 fp32 knows only 0
                total = sum(e.values())
                p = {j: e[j] / total if total else math.nan for j in keys}
            out[h].append([sum(p[j] * v[h][j][x] for j in keys) for x in range(d)])
    return out


def spec_masked_attention(q, k, v, keep, wrong=None):
    """[the output, the gradient in keep (B, n) of the sum of outputs weighted by `weights`]; a wrong one but "hard" is known by the output alone."""
    outputs, slopes, weight = [], [], weights(q).tolist()
    for b, mask in enumerate(keep.tolist()):
        row = [x[b].tolist() for x in (q, k, v)]
        outputs.append(attend(*row, mask, mask, wrong))

        def total(j, by):           # of row b, with keep_j moved
            out = attend(*row, [v + by * (i == j) for i, v in enumerate(mask)], mask)
            return sum(x * w for heads in zip(out, weight[b]) for tokens in zip(*heads) for x, w in zip(*tokens))
        if not wrong:
            slopes.append([(total(j, 1e-5) - total(j, -1e-5)) / 2e-5 for j in range(len(mask))])
    return [outputs, slopes if not wrong else [[0.0] * len(row) for row in keep.tolist()] if wrong == "hard" else None]


def spec_tokens_per_block(n, blocks, first, step, stages, keep, sink, local, wrong=None):
    protected = sink + local_count(n, local, wrong)
    protected = 0 if wrong == "no_minimum" else protected if wrong == "uncapped" else min(n, protected)
    counts, now, stage = [], n, 0
    places = [first + step * s for s in range(stages)]
    if wrong == "wrapped":
        places = [min(b, blocks - 1) for b in places]
    shift = {"early": 0, "late": 2}.get(wrong, 1)
    for block in range(1, blocks + 1):
        while stage < stages and places[stage] + shift <= block:
            stage += 1
            share = keep ** (stage - 1 if wrong == "power" else 1 if wrong == "iterated" else stage) * (now if wrong in ("of_left", "iterated") else n)
            share = math.floor(share) if wrong == "truncated" else math.floor(share + 0.5) if wrong == "half_up" else round(share)
            now = max(protected, share)
        counts.append(now)
    return counts


def spec_flops(c, counts, accounting, wrong=None):
    D, H, G, d, F, V = c.dim, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn, c.vocab
    total = 0
    for n in counts:
        if accounting == "exact":
            kv = (H if wrong == "no_gqa" else G) * d
            for inner, columns in [(D, H * d), (D, kv), (D, kv), (H * d, D), (D, F), (F, D)] + [(D, F)] * (wrong != "two_matrices"):
                total += 2 * n * inner * columns
            for query in range(n):
                total += H * {"not_causal": n, "no_self": query}.get(wrong, query + 1) * 2 * (2 * d)
        else:
            kv = G * d if wrong == "paper_gqa" else D
            total += n * 2 * (D * D + D * kv + D * kv + D * D + 3 * D * F)
            total += (4 if wrong == "paper_pairs" else 3) * D * (n * (n + 1) // 2 if wrong == "paper_causal" else n * n)
    if accounting == "exact":
        total += 2 * D * V * (counts[0] if wrong == "head_everywhere" else 1)
    else:
        total += 2 * 2 * D * V * (1 if wrong == "paper_head" else counts[0])
    return total // 2 if wrong == "multiply_only" else total


def spec_decode(states, N, blocks, caches, theta, wrong=None):
    D = states.shape[1]

    def times(W, x):
        return [sum(w * y for w, y in zip(row, x)) for row in W.tolist()]

    caches = [[list(part) for part in (k.tolist(), v.tolist(), pos.tolist())] for k, v, pos in caches]
    given, x = [len(cache[0]) for cache in caches], states.tolist()
    outer = range(len(blocks)) if wrong == "sees_later" else [range(len(blocks))]
    for order in outer:             # token by token through all blocks; by the mistake, block by block with all tokens
        if wrong == "sees_later":
            for t in range(len(x)):
                k, v, p = caches[order]
                k.append(turn(times(blocks[order][1], x[t]), N + t, theta)), v.append(times(blocks[order][2], x[t])), p.append(N + t)
        for t in range(len(x)):
            for i in [order] if wrong == "sees_later" else order:
                Wq, Wk, Wv, Wo = blocks[i]
                keys, values, places = caches[i]
                place = len(keys) if wrong == "cache_length" else N if wrong == "stuck" else N + t
                query, key, value = turn(times(Wq, x[t]), place, theta), times(Wk, x[t]), times(Wv, x[t])
                if wrong not in ("key_not_turned", "all_turned_again"):
                    key = turn(key, place, theta)
                if wrong not in ("no_self", "sees_later"):
                    keys.append(key), values.append(value), places.append(place)
                seen = [turn(k, p, theta) if wrong == "all_turned_again" or wrong == "turned_again" and j < given[i] else k
                        for j, (k, p) in enumerate(zip(keys, places))]
                e = [math.exp(sum(a * b for a, b in zip(query, k)) / (1 if wrong == "no_scale" else math.sqrt(D))) for k in seen]
                mixed = times(Wo, [sum(w * v[y] for w, v in zip(e, values)) / sum(e) for y in range(D)])
                x[t] = [a + b for a, b in zip([0] * D if wrong == "no_residual" else x[t], mixed)]
                if wrong == "no_self":
                    keys.append(key), values.append(value), places.append(place)
                if wrong == "not_appended":
                    keys.pop(), values.pop(), places.pop()
    return [x, None if wrong == "all_turned_again" else caches]


# -------------------------------------------------------------- the cases: (what is special, arguments), drawn from a generator


def normal(g, *shape):
    return torch.randn(*shape, generator=g).clamp(-2, 2)


def whole(g, low, high):
    """A whole number from low to high, both included."""
    return torch.randint(low, high + 1, (1,), generator=g).item()


def places(g, n, among, always=()):
    """n positions below `among`, increasing, with the ones in `always` among them."""
    rest = [p for p in torch.randperm(among, generator=g).tolist() if p not in always]
    return sorted([*always, *rest[:n - len(always)]])


def weights(x):
    """Fixed numbers in the shape of x, which make a scalar of an output."""
    return torch.linspace(-1, 1, x.numel()).view(x.shape)


def cases_rotate(g):
    yield "two rows with gaps", (normal(g, 2, 3, 5, 8), torch.tensor([places(g, 5, 24), places(g, 5, 24)]), 10.0 ** whole(g, 2, 4))
    yield "one token, one pair", (normal(g, 1, 1, 1, 2), torch.tensor([[whole(g, 1, 20)]]), 100.0)
    yield "positions 0 ... n - 1", (normal(g, 1, 2, 4, 6), torch.arange(4)[None], 100.0)


def cases_saliency(g):
    for label, n, reduce in (("tokens that interact", 5, "norm_gx"), ("tokens that interact", 5, "abs_dot"),
                             ("a state of zero and one that f ignores", 4, "norm_gx"), ("an x.grad of earlier work", 4, "norm_gx"), ("an x.grad of earlier work", 4, "abs_dot")):
        x, W, mix, c = normal(g, n, 3), normal(g, 3, 3), normal(g, n, n), normal(g, n, 3)
        if "zero" in label:
            x[1], mix[:, 2], c[2] = 0, 0, 0
        if "earlier" in label:
            x.requires_grad_().grad = normal(g, n, 3)
        yield label, (lambda x, W=W, mix=mix, c=c: (torch.tanh(mix.to(x) @ x @ W.to(x)) * c.to(x)).sum(), x, reduce)


def cases_ranking_loss(g):
    yield "two rows, no mask to speak of", (normal(g, 2, 6), normal(g, 2, 6).exp(), torch.ones(2, 6))
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 1]])
    for _ in range(2):
        yield "rows of different masks, equal saliencies", (normal(g, 2, 7), torch.tensor([[3.0, 1, 1, 3, 2, 1, 3], [1, 1, 2, 2, 2, 1, 1]]), mask)
    yield "score differences of hundreds", (normal(g, 1, 4) + torch.tensor([[300.0, -300, 150, 0]]), torch.tensor([[1.0, 2, 3, 4]]), torch.ones(1, 4))
    yield "no pair at all", (normal(g, 1, 3), normal(g, 1, 3).exp(), torch.tensor([[0.0, 1, 0]]))


def cases_select(g):
    def protected(N, sink, local, extra=0):
        return [*range(sink), *range(N - local_count(N, local), N + extra)]
    N = 31
    always = protected(N, 4, 0.1)
    pos = torch.tensor([places(g, 17, N, always) for _ in range(2)])
    low = normal(g, 2, 17)
    low[:, :4], low[:, -4:] = -9, -9
    yield "the protected have the lowest scores", (low, pos, 12, N, 4, 0.1)
    yield "all scores equal", (torch.zeros(1, 24), torch.tensor([places(g, 24, 40, protected(40, 2, 0.1))]), 13, 40, 2, 0.1)
    yield "few different scores", (torch.randint(0, 3, (2, 30), generator=g).float(), torch.arange(30).repeat(2, 1), whole(g, 12, 20), 30, 4, 0.1)
    falling = torch.arange(20, 0, -1.0)[None]
    yield "a response after the prompt, local 0", (falling, torch.tensor([places(g, 17, 30, protected(30, 1, 0.0)) + [30, 31, 32]]), 9, 30, 1, 0.0)
    yield "0.07 * 100 is 7.000000000000001", (40 - torch.arange(40.0)[None], torch.tensor([places(g, 40, 100, protected(100, 2, 0.08))]), 15, 100, 2, 0.07)
    yield "k is the protected alone", (normal(g, 1, 9), torch.tensor([places(g, 9, 12, protected(12, 3, 0.2))]), 6, 12, 3, 0.2)
    yield "k is everything", (normal(g, 1, 6), torch.tensor([[0, 1, 2, 4, 7, 9]]), 6, 10, 1, 0.1)


def cases_masked_attention(g):
    def qkv(n, d=4, scale=1.0):
        return normal(g, 2, 2, n, d) * scale, normal(g, 2, 2, n, d) * scale, normal(g, 2, 2, n, d)
    some = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]])
    yield "some tokens dropped", (*qkv(6), some)
    yield "nothing dropped", (*qkv(4), torch.ones(2, 4))
    yield "the first token dropped", (*qkv(5), torch.tensor([[0.0, 1, 1, 0, 1], [0, 0, 1, 1, 0]]))
    q, k, v = qkv(5)
    q[..., 0], k[:, :, 1] = 1, torch.tensor([400.0, 0, 0, 0])        # 200 for every query
    yield "a hidden key's logit hundreds above the others", (q, k, v, torch.tensor([[1.0, 0, 1, 1, 1]] * 2))


def cases_tokens_per_block(g):
    yield "the paper's schedule", (1000, 32, 4, 3, 10, 0.9, 4, 0.1)
    yield "the paper's schedule", (whole(g, 400, 4000), 32, 4, 3, 10, 0.9, 4, 0.1)
    yield "stages past the last block", (whole(g, 80, 120), 6, 2, 2, 9, 0.7, 2, 0.05)
    yield "one stage", (58, 3, 1, 1, 1, 0.7, 1, 0.05)
    yield "a stage after the last block", (100, 4, 4, 1, 1, 0.5, 2, 0.05)
    yield "the share falls below the protected", (57, 7, 1, 1, 5, 0.3, 4, 0.1)
    yield "0.07 * 100 is 7.000000000000001", (100, 5, 1, 1, 3, 0.1, 2, 0.07)
    yield "a prompt shorter than what is protected", (whole(g, 2, 4), 5, 1, 1, 3, 0.5, 4, 0.1)
    yield "halves", (50, 4, 1, 1, 1, 0.25, 0, 0.1)
    yield "local 0, strong pruning", (20, 5, 1, 1, 3, 0.1, 0, 0.0)
    yield "no stage", (10, 3, 1, 1, 0, 0.5, 1, 0.1)


def cases_flops(g):
    small = Config(dim=whole(g, 8, 20), n_blocks=5, n_heads=6, n_kv_heads=2, head_dim=whole(g, 3, 5), ffn=whole(g, 20, 40), vocab=whole(g, 50, 90))
    counts = [20] * 2 + [whole(g, 12, 18)] * 2 + [whole(g, 5, 10)]
    yield "exact, grouped heads, dwindling counts", (small, counts, "exact")
    yield "paper, dwindling counts", (small, counts, "paper")
    yield "exact, one token", (small, [1], "exact")
    for n in TABLE_2:
        yield f"paper, Table 2's baseline of {n} tokens", (m.SHAPES["mistral-7b"], [n] * 32, "paper")


def cases_decode(g):
    for label, D, N, T, held in (("one block, one token", 4, 9, 1, (5,)), ("ragged caches, several tokens", 6, 14, 3, (9, 6, 2)),
                                 ("caches of one token", 2, 5, 2, (1, 1))):
        blocks = [tuple(normal(g, D, D) * 0.5 for _ in range(4)) for _ in held]
        caches = [(normal(g, n, D), normal(g, n, D), torch.tensor(places(g, n, N - 1, ()))) for n in held]
        yield label, (normal(g, T, D), N, blocks, caches, 100.0)


# ------------------------------------------------------------------------------ the check: run, compare, find the mistake


def plain(value):
    """Tensors, tuples and lists -> nested lists of numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def run(name, f, args):
    """Call one exercise and return plain lists; the two that training differentiates come with their gradient."""
    if name == "saliency":
        with torch.no_grad():
            return plain(f(*args))
    if name not in ("ranking_loss", "masked_attention"):
        return plain(f(*args))
    at = 0 if name == "ranking_loss" else 3
    args = [a.clone().requires_grad_() if i == at else a for i, a in enumerate(args)]
    out = f(*args)
    grad = None
    if isinstance(out, torch.Tensor) and out.requires_grad:
        grad, = torch.autograd.grad(out if name == "ranking_loss" else (out * weights(out)).sum(), args[at], allow_unused=True)
    return [plain(out), plain(torch.zeros_like(args[at]) if grad is None else grad)]


def difference(got, want, tolerance, where=""):
    """The first difference in words, or None. A None in `want` is not compared."""
    if want is None:
        return None
    if isinstance(want, list):
        if not isinstance(got, list) or len(got) != len(want):
            return f"{where or 'the result'} has {len(got) if isinstance(got, list) else 'no'} entries instead of {len(want)}"
        return next((d for i, (a, b) in enumerate(zip(got, want)) if (d := difference(a, b, tolerance, f"{where}[{i}]"))), None)
    if not isinstance(got, (int, float)):
        return f"{where or 'the result'} is {'a list of ' + str(len(got)) if isinstance(got, list) else repr(got)[:40]} instead of a number"
    equal = math.isnan(want) and math.isnan(got) or got == want or math.isfinite(want) and abs(got - want) <= tolerance * max(1, abs(want))
    return None if equal else f"{where or 'the result'} is {got:.6g} instead of {want:.6g}"


def in_order(rows):
    return [sorted(row) for row in rows] if isinstance(rows, list) and all(isinstance(row, list) for row in rows) else rows


def cases(name, seed):
    return list(globals()[f"cases_{name}"](torch.Generator().manual_seed(1000 * EXERCISES.index(name) + seed)))


def check(name, f, seed=0):
    """None if f solves the exercise on the cases of this seed, else one line that says what is wrong."""
    spec, drawn, tolerance = globals()[f"spec_{name}"], cases(name, seed), 1e-12 if name == "flops" else 1e-5
    found, first = [], None
    for label, args in drawn:
        given = copy.deepcopy(args)
        try:
            found.append(run(name, f, given))
        except NotImplementedError:
            return "not written yet" + (", or `rotate` is not, which it calls" if name == "decode" else "")
        except Exception as e:
            text = " ".join(str(e).split())[:160]
            more = ": gradients are off here, torch.enable_grad() switches them on" if name == "saliency" and "does not require grad" in text else ""
            return f"case '{label}': {type(e).__name__}: {text}{more}"
        wrong = difference(found[-1], spec(*args), tolerance)
        before, after = ([plain(a) for a in some if isinstance(a, (torch.Tensor, list))] for some in (args, given))
        if not wrong and difference(after, before, 0):
            wrong = "the result is right, but an input was changed in place"
        if wrong and not first:
            parts = {"ranking_loss": ("loss", "gradient in score"), "masked_attention": ("output", "gradient in keep"), "decode": ("states", "caches")}.get(name)
            for i, part in enumerate(parts or ()):
                wrong = wrong.replace(f"[{i}]", f"{part} ", 1) if wrong.startswith(f"[{i}]") else wrong
            first = f"case '{label}': {wrong}"
    if not first:
        return None
    for mistake, hint in HINTS[name].items():
        same = in_order if mistake == "unsorted" else lambda rows: rows
        if not any(difference(same(got), spec(*args, wrong=mistake), 10 * tolerance) for got, (_, args) in zip(found, drawn)):
            return hint
    return first


def lines(f):
    """Lines of a function's body, without its docstring, blank lines and comments; several statements in one line count each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(f))).body[0].body
    return sum(len(ast.unparse(s).splitlines()) for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)))


# ------------------------------------------------------------------------------ the reference: the repository's own functions


def reference_rope(pos, d, theta):
    config = Config(dim=d, n_blocks=1, n_heads=1, n_kv_heads=1, head_dim=d, ffn=1, vocab=1, rope_theta=theta)
    return m.Llama.rope(SimpleNamespace(config=config, dtype=torch.float32), pos, int(pos.max()) + 1)


def reference_rotate(q, pos, theta):
    rope = reference_rope(pos, q.shape[-1], theta)
    return m.rotate(q, rope.cos, rope.sin)


def reference_saliency(f, x, reduce):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        g, = torch.autograd.grad(f(x), x)
    return saliency.reduce_saliency(g, x.detach(), reduce)


def reference_masked_attention(q, k, v, keep):
    return m.masked_attention(q, k, v, m.visible(m.positions(keep), m.positions(keep)), keep)


def reference_tokens_per_block(n, blocks, first, step, stages, keep, sink, local):
    return prune.Schedule(first, step, stages, keep, sink, local).counts(n, blocks)


@torch.no_grad()
def reference_decode(states, N, blocks, caches, theta):
    """model.Block and model.KVCache themselves, with one head, no norm and a SwiGLU that adds nothing."""
    D = states.shape[1]
    config, ours = Config(dim=D, n_blocks=1, n_heads=1, n_kv_heads=1, head_dim=D, ffn=2, vocab=1, rope_theta=theta), []
    for (Wq, Wk, Wv, Wo), (k, v, pos) in zip(blocks, caches):
        block, cache = m.Block(config), m.KVCache(config, 1, len(pos) + len(states), states.device, states.dtype)
        block.attn_norm = nn.Identity()
        for layer, W in ((block.q, Wq), (block.k, Wk), (block.v, Wv), (block.o, Wo), (block.down, torch.zeros(D, 2))):
            layer.weight.copy_(W)
        cache.append(k[None, None], v[None, None], pos[None])
        ours.append((block, cache))
    out = []
    for t, x in enumerate(states):
        x = x[None, None]
        for block, cache in ours:
            x = block(x, reference_rope(torch.tensor([[N + t]]), D, theta), cache)
        out.append(x[0, 0])
    return torch.stack(out), [(c.k[0, 0], c.v[0, 0], c.pos[0]) for _, c in ours]


REFERENCE = SimpleNamespace(
    rotate=reference_rotate, saliency=reference_saliency, ranking_loss=predictor.ranking_loss, select=prune.select, masked_attention=reference_masked_attention,
    tokens_per_block=reference_tokens_per_block, flops=prune.flops, decode=reference_decode)


# ------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def answers(pytestconfig):
    """The functions under test: the repository's, tests/exercises.py or the file named by --impl; else what is wrong with that file."""
    name = pytestconfig.getoption("--impl")
    path = ROOT / "tests" / "exercises.py" if name in ("reference", "student") else name
    try:
        spec = importlib.util.spec_from_file_location("answers", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as e:
        return f"{path} cannot be imported: {type(e).__name__}: {' '.join(str(e).split())}"
    if name == "reference":         # but for the puzzles, whose only given answers are the trivial ones in that file
        vars(module).update(vars(REFERENCE))
    return module


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, answers, pytestconfig, record_property):
    f = getattr(answers, name, None)
    hint = answers if isinstance(answers, str) else check(name, f, pytestconfig.getoption("--seed")) if f else "this function is missing"
    budget = re.search(r"At most (\d+) lines", getattr(f, "__doc__", None) or "")
    record_property("exercise", f"{EXERCISES.index(name) + 1} {name}: " + (hint or f"ok, {lines(f)} lines" + (f" of {budget[1]}" if budget else "")))
    if hint:
        pytest.fail(f"{name}: {hint}", pytrace=False)


# ------------------------------------------------------------------------------------------------- the open puzzles: only a score


@pytest.fixture(scope="module")
def toy(pytestconfig):
    """The frozen toy with its predictors and schedule, training rows, and cost(schedule, scorer): NLL per answer token of the rows measured on."""
    path, net, tokenizer = find("toy"), m.load("toy", device="cpu"), m.Tokenizer("toy")
    predictors, metadata = predictor.load_predictors(path / "predictors.safetensors", net)
    seed = pytestconfig.getoption("--seed")
    if seed:                        # fresh stories of the same kind
        from toy import fresh_prompt
        rng = random.Random(seed)
        rows = [Example(tokens[0], n) for tokens, n, _ in (fresh_prompt(rng, tokenizer, 400) for _ in range(20))]
    else:
        rows = examples(tokenizer, path / "train.jsonl", "heldout")

    def cost(schedule=None, scorer=None):
        values = torch.cat([prune.nll(net, e.tokens[None], e.prompt_len, schedule, scorer)[0] for e in rows])
        return values.mean().item()
    return SimpleNamespace(model=net, predictors=predictors, schedule=prune.Schedule(**metadata["schedule"]), rows=rows, cost=cost,
                           training=examples(tokenizer, path / "train.jsonl", "train"))


def score_puzzle_schedule(f, toy):
    schedule, L = f(), len(toy.model.blocks)
    used = sum(sum(schedule.counts(e.prompt_len, L)) / L / e.prompt_len for e in toy.rows) / len(toy.rows)
    m.need(used <= 0.5, f"{used:.1%} of the tokens enter a block on average, at most 50% may")
    m.need(schedule.sink == 4 and schedule.local == 0.1, "sink has to be 4 and local 0.1")
    after, first = schedule.after(L), toy.schedule.first

    def scorer(stage, x, pos):      # the modules of blocks 2 ... 11
        return predictor.score(toy.predictors[max(0, after[stage] - first)](x))
    return f"NLL {toy.cost(schedule, scorer):.4f} at {used:.1%} of the tokens (unpruned {toy.cost():.4f})"


def score_puzzle_predictors(f, toy):
    modules, trained = f(copy.deepcopy(toy.predictors), toy.model, toy.training), toy.cost(toy.schedule, prune.predictor_scorer(toy.predictors))
    m.need(len(modules) == len(toy.predictors), f"{len(modules)} modules, expected {len(toy.predictors)}")
    numbers = sum({id(p): p.numel() for module in modules for p in [*module.parameters(), *module.buffers()]}.values())
    x = normal(torch.Generator().manual_seed(0), 1, 9, toy.model.config.dim)
    m.need(all(torch.allclose(module(x)[:, ::2], module(x[:, ::2]), atol=1e-4) for module in modules), "a token's logits depend on other tokens")
    cost = toy.cost(toy.schedule, prune.predictor_scorer(modules))
    m.need(cost <= trained + 0.1, f"{numbers} numbers, but NLL {cost:.4f}; at most {trained + 0.1:.4f} is allowed, 0.1 above the trained ones")
    return f"{numbers} numbers, NLL {cost:.4f} (trained {trained:.4f}, at most 0.1 more)"


def score_puzzle_scorer(f, toy):
    cost = {name: toy.cost(toy.schedule, prune.make_scorer(name, toy.model, toy.schedule, toy.predictors)) for name in ("random", "norm", "predictor")}
    return (f"NLL {toy.cost(toy.schedule, f(toy.model)):.4f} (random {cost['random']:.4f}, norm {cost['norm']:.4f}, "
            f"trained predictors {cost['predictor']:.4f}, unpruned {toy.cost():.4f})")


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzle(name, answers, request, pytestconfig, record_property):
    if not pytestconfig.getoption("--puzzles"):
        pytest.skip("--puzzles prints the scores")
    problem = answers if isinstance(answers, str) else None if hasattr(answers, name) else "this function is missing"
    try:
        text = problem or globals()[f"score_{name}"](getattr(answers, name), request.getfixturevalue("toy"))
    except Exception as e:
        text = problem = f"{'' if isinstance(e, ValueError) else type(e).__name__ + ': '}{' '.join(str(e).split())}"
    record_property("puzzle", f"{name}: {text}")
    if problem:
        pytest.fail(f"{name}: {text}", pytrace=False)
