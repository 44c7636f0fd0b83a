"""Checks the eight exercises of exercises.py against slow specifications in plain Python.

    python -m pytest tests/test_exercises.py                    # the repository's own functions
    python -m pytest tests/test_exercises.py --impl student     # tests/exercises.py: n/8 and hints
    python -m pytest tests/test_exercises.py --impl path/to/file.py --seed 7 --puzzles

Each specification has a switch `wrong`: the same loops with one classic mistake. A wrong answer
may equal the specification with such a mistake in every case. Then the hint is the mistake's; else
it names the first difference.
"""
import ast
import copy
import importlib.util
import inspect
import math
import random
import re
import textwrap
from itertools import combinations_with_replacement, product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import model as m
import predictor
import prune
import saliency
from conftest import ROOT
from lab.scorers import make_scorer
from model import Config
from support.checkpoint import find
from support.data import Example, examples
from support.files import need
from support.saved import load_predictors
from support.tokenizer import Tokenizer

# Exercise -> {mistake: hint}. The mistakes are the values of the specifications' `wrong`.
HINTS = {
    "rotate": {
        "interleaved":
            "the pairs are interleaved (2i, 2i + 1); here feature i goes with feature i + d/2",
        "sign":
            "the sine has the wrong sign: the pair turns backwards",
        "renumbered":
            "the tokens are numbered anew 0 ... n - 1; a survivor keeps its original position, "
            "use pos",
        "first_row":
            "row 0's positions are used for every row of the batch",
        "exponent":
            "the exponent of theta is -2 i / d for i = 0 ... d/2 - 1; this is -i / d",
    },
    "saliency": {
        "g_alone":
            "norm_gx is the norm of g without x; multiply elementwise by x first",
        "sum_abs":
            "abs_dot sums the absolute values; Eq. 3 takes the absolute value of the sum over "
            "features",
        "signed":
            "abs_dot has no absolute value: a strongly negative token would rank last",
        "squared":
            "norm_gx is not the norm but its square: the root is missing",
        "stale":
            "an earlier gradient is added: backward() accumulates into x.grad; take "
            "torch.autograd.grad on a detached copy",
    },
    "ranking_loss": {
        "no_sign":
            "the sign of the saliency difference is missing: the loss always wants the earlier "
            "token on top",
        "flipped":
            "the sign is turned round: the loss wants the less salient token on top",
        "sum":
            "this is the sum over pairs, which grows with n squared; divide by the number of pairs",
        "all_pairs":
            "pairs i = j are counted too, each with log 2; only i < j are pairs",
        "no_ties":
            "pairs of equal saliency are left out; sign(0) = 0, so they count log 2 each",
        "no_mask":
            "the mask is ignored: pairs with tokens outside it are counted",
        "all_count":
            "the sum is divided by all n (n - 1) / 2 pairs of each row; count only the pairs "
            "inside the mask",
        "row_means":
            "this is the mean of the rows' means; all pairs of all rows are one heap",
        "overflow":
            "exp overflows at large score differences; use softplus, or logaddexp",
        "empty":
            "without any pair the result is 0, not 0 / 0",
    },
    "select": {
        "unsorted":
            "the right tokens, but not in increasing order: survivors must stay in reading order, "
            "or causal attention breaks",
        "no_sink":
            "the first `sink` positions are not protected",
        "no_local":
            "the last positions of the prompt are not protected",
        "floor":
            "the local share is rounded down; it is ceil(local * prompt_len - 1e-9), and at least "
            "1",
        "floor_one":
            "the local share is rounded down; it is ceil(local * prompt_len - 1e-9)",
        "fuzz":
            "ceil without the - 1e-9: a product like 0.07 * 100 = 7.000000000000001 counts one too "
            "many",
        "local_of_left":
            "the local share is taken of the n tokens left; it is a share of the prompt",
        "no_response":
            "tokens after the prompt are not protected",
        "late_ties":
            "among equal scores the later token wins; the earlier should (argsort: stable=True)",
        "positions":
            "these are positions; wanted are indices into the n tokens that are left",
    },
    "masked_attention": {
        "no_diagonal":
            "a dropped query does not see itself: the mask's diagonal is 1",
        "no_renorm":
            "the mask is multiplied in after the softmax: the weights no longer sum to 1; mask "
            "before normalising",
        "not_causal":
            "later keys are seen: only j <= i",
        "no_scale":
            "the logits are not divided by sqrt(d)",
        "queries":
            "the mask hides queries (rows of the matrix); it has to hide keys (columns)",
        "hard":
            "the outputs are right, but a dropped key gets no gradient through keep: multiply the "
            "exponentials by the mask, instead of filling with -inf",
        "top_hidden":
            "S, or the largest logit, is taken over hidden keys too: all visible exponentials "
            "underflow and 0 / 0 is nan",
    },
    "tokens_per_block": {
        "early":
            "off by one: a stage stands AFTER its block, and the next block is the first to see "
            "fewer tokens",
        "late":
            "off by one: the fewer tokens are seen one block too late; the first is the block "
            "right after the stage's",
        "of_left":
            "keep ** s is taken of what is left; it is a share of the whole prompt",
        "iterated":
            "each stage rounds a share of the rounded count before it; it is round(keep ** s * n), "
            "of the prompt",
        "truncated":
            "the share is cut to a whole number; round it",
        "half_up":
            "halves are rounded up; Python's round takes them to the even number",
        "power":
            "off by one in the power: the first stage keeps keep ** 1",
        "no_minimum":
            "the counts fall below the protected tokens",
        "uncapped":
            "more tokens than the prompt has: the protected are never more than n",
        "floor":
            "the local share is rounded down; it is ceil(local * n - 1e-9), and at least 1",
        "floor_one":
            "the local share is rounded down; it is ceil(local * n - 1e-9)",
        "fuzz":
            "ceil without the - 1e-9: a product like 0.07 * 100 = 7.000000000000001 counts one too "
            "many",
        "no_local_one":
            "at least one local token is protected, even where local is 0",
        "wrapped":
            "a stage that stands after the last block falls away; here it shortens the last block",
    },
    "flops": {
        "no_gqa":
            "exact: k and v are counted for every query head; grouped-query attention has "
            "n_kv_heads of them",
        "not_causal":
            "exact: all n * n pairs are counted; causal attention has n (n + 1) / 2",
        "no_self":
            "exact: n (n - 1) / 2 pairs leave out each query's own key; there are n (n + 1) / 2",
        "head_everywhere":
            "exact: the head is counted for every token; a prefill needs it on the last one alone",
        "multiply_only":
            "half of it: a multiply-add is 2 FLOPs",
        "two_matrices":
            "exact: SwiGLU has three matrices, gate, up and down",
        "paper_gqa":
            "paper: Table 2's accounting ignores the grouping, each of q, k, v, o counts D x D",
        "paper_pairs":
            "paper: attention counts 3 D per pair, not the 4 D of two products",
        "paper_causal":
            "paper: all n * n pairs are counted, not the causal half",
        "paper_head":
            "paper: embedding and head, 4 V D, are counted for every token of the prompt",
    },
    "decode": {
        "cache_length":
            "the position is the number of tokens in the cache; decode goes on at N + t, the "
            "prompt's length, in every block",
        "stuck":
            "every new token stands at N; the t-th stands at N + t",
        "no_self":
            "a new token does not see itself: put it into the cache before attending",
        "not_appended":
            "the caches do not grow: the next token cannot see this one",
        "turned_again":
            "the cached keys are turned again; they already stand at their own positions",
        "all_turned_again":
            "the cached keys are turned again; they already stand at their own positions",
        "key_not_turned":
            "the new key is not turned to its position, only the query is",
        "no_residual":
            "the state itself is lost: x + Wo @ ..., not Wo @ ... alone",
        "sees_later":
            "a new token sees the ones after it: they come one by one",
        "no_scale":
            "the logits are not divided by sqrt(D)",
    },
}
EXERCISES = list(HINTS)
PUZZLES = ("puzzle_schedule", "puzzle_predictors", "puzzle_scorer")
# Prompt tokens -> TFLOPs of Mistral-7B's prefill.
TABLE_2 = {4096: 72.51, 8192: 158.22, 16384: 369.22, 32768: 949.54, 65536: 2743.46,
           131072: 8864.49}


def plain(value):
    """Tensors, tuples and lists -> nested lists of numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


# -------------------------------------------------------------------------- the specifications
#
# They work on lists of numbers. Where torch is read, it is read one number at a time.


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def times(W, x):
    """A matrix, a list of rows, times a vector."""
    return [dot(row, x) for row in W]


def mixture(weights, vectors):
    """The sum of the vectors, each times its weight."""
    return [dot(weights, feature) for feature in zip(*vectors)]


def turn(x, place, theta, wrong=None):
    """One vector, a list of d numbers, turned to its place."""
    d = len(x)
    out = list(x)
    for i in range(d // 2):
        power = i if wrong == "exponent" else 2 * i
        angle = place * theta ** (-power / d)
        cos, sin = math.cos(angle), math.sin(angle)
        if wrong == "sign":
            sin = -sin
        one, two = i, i + d // 2
        if wrong == "interleaved":
            one, two = 2 * i, 2 * i + 1
        out[one] = x[one] * cos - x[two] * sin
        out[two] = x[two] * cos + x[one] * sin
    return out


def turn_all(vectors, places, theta, wrong=None):
    return [turn(x, place, theta, wrong) for x, place in zip(vectors, places)]


def spec_rotate(q, pos, theta, wrong=None):
    found = []
    for heads, places in zip(q.tolist(), pos.tolist()):
        if wrong == "first_row":
            places = pos[0].tolist()
        if wrong == "renumbered":
            places = range(len(places))
        found.append([turn_all(head, places, theta, wrong) for head in heads])
    return found


def gradient(f, x):
    """The gradient of f at x (n, D) by central differences in double precision."""
    x = x.detach().double()
    g = torch.zeros_like(x)
    for i, j in product(range(x.shape[0]), range(x.shape[1])):
        step = torch.zeros_like(x)
        step[i, j] = 1e-5
        g[i, j] = (f(x + step) - f(x - step)).item() / 2e-5
    return g


def spec_saliency(f, x, reduce, wrong=None):
    gradients = gradient(f, x)
    if wrong == "stale" and x.grad is not None:
        gradients += x.grad
    found = []
    for g, state in zip(gradients.tolist(), x.tolist()):
        products = [a * b for a, b in zip(g, state)]
        if reduce == "abs_dot":
            found.append(absolute_dot(products, wrong))
        else:
            found.append(norm(g if wrong == "g_alone" else products, wrong))
    return found


def absolute_dot(products, wrong=None):
    if wrong == "sum_abs":
        return sum(map(abs, products))
    return sum(products) if wrong == "signed" else abs(sum(products))


def norm(vector, wrong=None):
    square = dot(vector, vector)
    return square if wrong == "squared" else math.sqrt(square)


def spec_ranking_loss(score, saliency, mask, wrong=None):
    """[the loss, its gradient in score (B, n)]; a wrong one is known by the loss alone."""
    losses, slopes = [], []         # for each row
    for row in zip(score.tolist(), saliency.tolist(), mask.tolist()):
        of_pairs, of_tokens = ranking_row(*row, wrong)
        losses.append(of_pairs)
        slopes.append(of_tokens)
    if wrong == "row_means":
        means = [sum(row) / len(row) for row in losses if row]
        return [sum(means) / max(1, len(means)), None]
    total = sum(map(sum, losses))
    count = sum(map(len, losses))
    if wrong == "sum":
        return [total, None]
    if wrong == "empty" and count == 0:
        return [math.nan, None]
    loss = total / max(1, count)
    slopes = torch.tensor(slopes, dtype=torch.double) / max(1, count)
    return [loss, None if wrong else slopes.tolist()]


def ranking_row(score, saliency, mask, wrong=None):
    """One row, lists of n -> the losses of its pairs, and the gradient of their sum in score."""
    losses, slopes = [], [0.0] * len(score)
    for i, j in combinations_with_replacement(range(len(score)), 2):
        order = (saliency[i] > saliency[j]) - (saliency[i] < saliency[j])
        if i == j and wrong != "all_pairs":
            continue
        if order == 0 and wrong == "no_ties":
            continue
        if wrong != "no_mask" and not (mask[i] and mask[j]):
            if wrong == "all_count":
                losses.append(0.0)
            continue
        sign = {"no_sign": 1, "flipped": -order}.get(wrong, order)
        z = -(score[i] - score[j]) * sign
        if wrong == "overflow" and z > 88.8:            # where fp32's exp is infinite
            losses.append(math.inf)
        else:
            losses.append(max(z, 0) + math.log1p(math.exp(-abs(z))))
        slope = -sign / (1 + math.exp(-max(z, -700)))
        slopes[i] += slope
        slopes[j] -= slope
    return losses, slopes


def local_count(n, local, wrong=None):
    """How many last tokens are always kept."""
    least = 0 if wrong in ("floor", "no_local_one") else 1
    if wrong in ("floor", "floor_one"):
        return max(least, math.floor(local * n))
    if wrong == "fuzz":
        return max(least, math.ceil(local * n))
    return max(least, math.ceil(local * n - 1e-9))


def spec_select(score, pos, k, prompt_len, sink, local, wrong=None):
    found = []
    for scores, places in zip(score.tolist(), pos.tolist()):
        whole = len(places) if wrong == "local_of_left" else prompt_len
        first_local = prompt_len - local_count(whole, local, wrong)
        ranks = []                  # the smallest survive
        for i, place in enumerate(places):
            protected = {"no_sink": place < sink,
                         "no_local": first_local <= place < prompt_len,
                         "no_response": place >= prompt_len}
            protected.pop(wrong, None)
            tie = -i if wrong == "late_ties" else i
            ranks.append((not any(protected.values()), -scores[i], tie))
        best = sorted(range(len(places)), key=ranks.__getitem__)
        kept = sorted(best[:k])
        found.append([places[i] for i in kept] if wrong == "positions" else kept)
    return found


def attention_weights(i, query, keys, keep, given, wrong=None):
    """The weight of each key for query i of one head: lists query [d], keys [n][d], keep [n].

    given: the mask that says who is seen, which is keep itself but for its gradient.
    """
    n = len(keys)
    seen = range(n) if wrong == "not_causal" else range(i + 1)
    scale = 1 if wrong == "no_scale" else math.sqrt(len(query))
    a = [dot(query, key) / scale for key in keys]

    def mask(values, j):
        if j == i and wrong != "no_diagonal":
            return 1.0
        return values[i if wrong == "queries" else j]

    if wrong == "no_renorm":
        top = max(a[j] for j in seen)
        e = [math.exp(a[j] - top) if j in seen else 0.0 for j in range(n)]
        total = sum(e)
        return [e[j] / total * mask(keep, j) for j in range(n)]
    summed = [j for j in seen if mask(given, j) or wrong == "top_hidden"]
    top = max((a[j] for j in summed), default=0.0)
    log_sum = top + math.log(sum(math.exp(a[j] - top) for j in summed) or 1.0)
    e = [0.0] * n
    for j in seen:
        x = a[j] - log_sum
        if x >= -104:               # below e^-104 fp32 knows only 0
            weight = math.exp(x) if j in summed else 1 / (1 + math.exp(-x))
            e[j] = weight * mask(keep, j)
    total = sum(e)
    return [w / total if total else math.nan for w in e]


def attend(q, k, v, keep, given, wrong=None):
    """One row: lists q, k, v [H][n][d], keep and given [n] -> [H][n][d]."""
    found = []
    for queries, keys, values in zip(q, k, v):
        outputs = []
        for i, query in enumerate(queries):
            weights = attention_weights(i, query, keys, keep, given, wrong)
            outputs.append(mixture(weights, values))
        found.append(outputs)
    return found


def spec_masked_attention(q, k, v, keep, wrong=None):
    """[the output, the gradient in keep (B, n) of the sum of outputs times `fixed_weights`].

    A wrong one is known by the output alone, but for "hard", whose gradient is 0.
    """
    outputs, slopes = [], []
    for row in zip(q.tolist(), k.tolist(), v.tolist(), keep.tolist(), fixed_weights(q)):
        *qkv, mask, weights = row
        outputs.append(attend(*qkv, mask, mask, wrong))
        if not wrong:
            slopes.append([slope_in_keep(qkv, mask, j, weights) for j in range(len(mask))])
    if wrong == "hard":
        return [outputs, torch.zeros_like(keep).tolist()]
    return [outputs, None if wrong else slopes]


def slope_in_keep(qkv, keep, j, weights):
    """How the weighted sum of one row's outputs changes with keep[j], by central difference."""
    def total(step):
        moved = list(keep)
        moved[j] += step
        out = torch.tensor(attend(*qkv, moved, keep), dtype=torch.double)
        return (out * weights).sum().item()
    return (total(1e-5) - total(-1e-5)) / 2e-5


def spec_tokens_per_block(n, blocks, first, step, stages, keep, sink, local, wrong=None):
    protected = sink + local_count(n, local, wrong)
    if wrong == "no_minimum":
        protected = 0
    elif wrong != "uncapped":
        protected = min(n, protected)
    places = [first + step * s for s in range(stages)]
    if wrong == "wrapped":
        places = [min(block, blocks - 1) for block in places]
    shift = {"early": 0, "late": 2}.get(wrong, 1)
    counts, left, stage = [], n, 0
    for block in range(1, blocks + 1):
        while stage < stages and places[stage] + shift <= block:
            stage += 1
            power = {"power": stage - 1, "iterated": 1}.get(wrong, stage)
            whole = left if wrong in ("of_left", "iterated") else n
            left = max(protected, whole_number(keep ** power * whole, wrong))
        counts.append(left)
    return counts


def whole_number(share, wrong=None):
    if wrong == "truncated":
        return math.floor(share)
    if wrong == "half_up":
        return math.floor(share + 0.5)
    return round(share)


def spec_flops(c, counts, accounting, wrong=None):
    blocks = exact_block if accounting == "exact" else paper_block
    total = sum(blocks(c, n, wrong) for n in counts)
    if accounting == "exact":
        tokens = counts[0] if wrong == "head_everywhere" else 1
        total += 2 * c.dim * c.vocab * tokens
    else:
        tokens = 1 if wrong == "paper_head" else counts[0]
        total += 2 * 2 * c.dim * c.vocab * tokens
    return total // 2 if wrong == "multiply_only" else total


def exact_block(c, n, wrong=None):
    D, F, d = c.dim, c.ffn, c.head_dim
    heads = c.n_heads * d
    kv_heads = (c.n_heads if wrong == "no_gqa" else c.n_kv_heads) * d
    matrices = [(D, heads), (D, kv_heads), (D, kv_heads), (heads, D), (D, F), (F, D)]
    if wrong != "two_matrices":
        matrices.append((D, F))
    total = 0
    for rows, columns in matrices:
        total += 2 * n * rows * columns
    for query in range(n):
        keys = {"not_causal": n, "no_self": query}.get(wrong, query + 1)
        total += c.n_heads * keys * 2 * (2 * d)
    return total


def paper_block(c, n, wrong=None):
    D = c.dim
    kv = c.n_kv_heads * c.head_dim if wrong == "paper_gqa" else D
    per_pair = 4 * D if wrong == "paper_pairs" else 3 * D
    pairs = n * (n + 1) // 2 if wrong == "paper_causal" else n * n
    return n * 2 * (D * D + D * kv + D * kv + D * D + 3 * D * c.ffn) + per_pair * pairs


def spec_decode(states, N, blocks, caches, theta, wrong=None):
    """[the states, the caches]; with all keys turned again the caches differ too, unasked."""
    states, blocks, caches = plain(states), plain(blocks), plain(caches)
    if wrong == "sees_later":
        return [decode_block_by_block(states, N, blocks, caches, theta), caches]
    held = [len(keys) for keys, _, _ in caches]
    out = []
    for t, x in enumerate(states):
        for block, cache, old in zip(blocks, caches, held):
            place = {"cache_length": len(cache[0]), "stuck": N}.get(wrong, N + t)
            x = decode_step(x, place, block, cache, old, theta, wrong)
        out.append(x)
    return [out, None if wrong == "all_turned_again" else caches]


def decode_step(x, place, block, cache, old, theta, wrong=None):
    """One token, a list of D numbers, through one block, whose cache grows.

    old: how many of the cache's tokens are the prompt's.
    """
    Wq, Wk, Wv, Wo = block
    key = times(Wk, x)
    if wrong not in ("key_not_turned", "all_turned_again"):
        key = turn(key, place, theta)
    new = key, times(Wv, x), place
    keys, values, places = cache if wrong == "no_self" else joined(cache, new)
    if wrong == "all_turned_again":
        keys = turn_all(keys, places, theta)
    if wrong == "turned_again":
        keys = turn_all(keys[:old], places[:old], theta) + keys[old:]
    scale = 1 if wrong == "no_scale" else math.sqrt(len(x))
    update = times(Wo, attend_to(turn(times(Wq, x), place, theta), keys, values, scale))
    if wrong != "not_appended":
        cache[:] = joined(cache, new)
    return update if wrong == "no_residual" else added(x, update)


def decode_block_by_block(x, N, blocks, caches, theta):
    """The mistake "sees_later": all new tokens enter a block's cache before any of them attends."""
    for (Wq, Wk, Wv, Wo), cache in zip(blocks, caches):
        for place, state in enumerate(x, start=N):
            key = turn(times(Wk, state), place, theta)
            cache[:] = joined(cache, (key, times(Wv, state), place))
        keys, values, _ = cache
        queries = turn_all([times(Wq, state) for state in x], range(N, N + len(x)), theta)
        mixed = [attend_to(query, keys, values, math.sqrt(len(query))) for query in queries]
        x = [added(state, times(Wo, y)) for state, y in zip(x, mixed)]
    return x


def attend_to(query, keys, values, scale):
    e = [math.exp(dot(query, key) / scale) for key in keys]
    total = sum(e)
    return mixture([w / total for w in e], values)


def joined(cache, new):
    return [[*part, entry] for part, entry in zip(cache, new)]


def added(x, y):
    return [a + b for a, b in zip(x, y)]


# ----------------------------------------------------------------------------------- the cases
#
# cases_NAME(g) yields (what is special, the arguments), drawn from the generator g.


def normal(g, *shape):
    return torch.randn(*shape, generator=g).clamp(-2, 2)


def whole(g, low, high):
    """A whole number from low to high, both included."""
    return torch.randint(low, high + 1, (1,), generator=g).item()


def draw_places(g, n, end, always=()):
    """n positions below `end`, increasing, with the ones in `always` among them."""
    rest = [p for p in torch.randperm(end, generator=g).tolist() if p not in always]
    return sorted([*always, *rest[:n - len(always)]])


def fixed_weights(x):
    """Fixed numbers in the shape of x, which make a scalar of an output."""
    return torch.linspace(-1, 1, x.numel()).view(x.shape)


def cases_rotate(g):
    q = normal(g, 2, 3, 5, 8)
    pos = torch.tensor([draw_places(g, 5, 24), draw_places(g, 5, 24)])
    yield "two rows with gaps", (q, pos, 10.0 ** whole(g, 2, 4))
    q = normal(g, 1, 1, 1, 2)
    yield "one token, one pair", (q, torch.tensor([[whole(g, 1, 20)]]), 100.0)
    yield "positions 0 ... n - 1", (normal(g, 1, 2, 4, 6), torch.arange(4)[None], 100.0)


def interacting(W, mix, c):
    """A scalar function of a state in which every token acts on every other."""
    def f(x):
        return (torch.tanh(mix.to(x) @ x @ W.to(x)) * c.to(x)).sum()
    return f


def cases_saliency(g):
    def draw(n):
        return normal(g, n, 3), normal(g, 3, 3), normal(g, n, n), normal(g, n, 3)

    for reduce in ("norm_gx", "abs_dot"):
        x, W, mix, c = draw(5)
        yield "tokens that interact", (interacting(W, mix, c), x, reduce)
    x, W, mix, c = draw(4)
    x[1] = 0
    mix[:, 2] = 0
    c[2] = 0
    yield "a state of zero and one that f ignores", (interacting(W, mix, c), x, "norm_gx")
    for reduce in ("norm_gx", "abs_dot"):
        x, W, mix, c = draw(4)
        x.requires_grad_()
        x.grad = normal(g, 4, 3)
        yield "an x.grad of earlier work", (interacting(W, mix, c), x, reduce)


def cases_ranking_loss(g):
    score, salient = normal(g, 2, 6), normal(g, 2, 6).exp()
    yield "two rows, no mask to speak of", (score, salient, torch.ones(2, 6))
    salient = torch.tensor([[3.0, 1, 1, 3, 2, 1, 3], [1, 1, 2, 2, 2, 1, 1]])
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 1]])
    for _ in range(2):
        yield "rows of different masks, equal saliencies", (normal(g, 2, 7), salient, mask)
    far_apart = normal(g, 1, 4) + torch.tensor([[300.0, -300, 150, 0]])
    salient = torch.tensor([[1.0, 2, 3, 4]])
    yield "score differences of hundreds", (far_apart, salient, torch.ones(1, 4))
    score, salient = normal(g, 1, 3), normal(g, 1, 3).exp()
    yield "no pair at all", (score, salient, torch.tensor([[0.0, 1, 0]]))


def cases_select(g):
    def survivors(n, prompt_len, sink, local):
        """Positions of n tokens of a prompt, all the protected among them."""
        first_local = prompt_len - local_count(prompt_len, local)
        return draw_places(g, n, prompt_len, [*range(sink), *range(first_local, prompt_len)])

    pos = torch.tensor([survivors(17, 31, 4, 0.1), survivors(17, 31, 4, 0.1)])
    low = normal(g, 2, 17)
    low[:, :4] = -9
    low[:, -4:] = -9
    yield "the protected have the lowest scores", (low, pos, 12, 31, 4, 0.1)

    pos = torch.tensor([survivors(24, 40, 2, 0.1)])
    yield "all scores equal", (torch.zeros(1, 24), pos, 13, 40, 2, 0.1)

    score = torch.randint(0, 3, (2, 30), generator=g).float()
    pos = torch.arange(30).repeat(2, 1)
    yield "few different scores", (score, pos, whole(g, 12, 20), 30, 4, 0.1)

    falling = torch.arange(20, 0, -1.0)[None]
    pos = torch.tensor([survivors(17, 30, 1, 0.0) + [30, 31, 32]])
    yield "a response after the prompt, local 0", (falling, pos, 9, 30, 1, 0.0)

    falling = 40 - torch.arange(40.0)[None]
    pos = torch.tensor([survivors(40, 100, 2, 0.08)])
    yield "0.07 * 100 is 7.000000000000001", (falling, pos, 15, 100, 2, 0.07)

    score = normal(g, 1, 9)
    pos = torch.tensor([survivors(9, 12, 3, 0.2)])
    yield "k is the protected alone", (score, pos, 6, 12, 3, 0.2)
    pos = torch.tensor([[0, 1, 2, 4, 7, 9]])
    yield "k is everything", (normal(g, 1, 6), pos, 6, 10, 1, 0.1)


def cases_masked_attention(g):
    def qkv(n, d=4):
        return normal(g, 2, 2, n, d), normal(g, 2, 2, n, d), normal(g, 2, 2, n, d)

    some = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]])
    yield "some tokens dropped", (*qkv(6), some)
    yield "nothing dropped", (*qkv(4), torch.ones(2, 4))
    late = torch.tensor([[0.0, 1, 1, 0, 1], [0, 0, 1, 1, 0]])
    yield "the first token dropped", (*qkv(5), late)
    q, k, v = qkv(5)
    q[..., 0] = 1
    k[:, :, 1] = torch.tensor([400.0, 0, 0, 0])         # a logit of 200 for every query
    keep = torch.tensor([[1.0, 0, 1, 1, 1]] * 2)
    yield "a hidden key's logit hundreds above the others", (q, k, v, keep)


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
    small = Config(dim=whole(g, 8, 20), n_blocks=5, n_heads=6, n_kv_heads=2,
                   head_dim=whole(g, 3, 5), ffn=whole(g, 20, 40), vocab=whole(g, 50, 90))
    counts = [20] * 2 + [whole(g, 12, 18)] * 2 + [whole(g, 5, 10)]
    yield "exact, grouped heads, dwindling counts", (small, counts, "exact")
    yield "paper, dwindling counts", (small, counts, "paper")
    yield "exact, one token", (small, [1], "exact")
    for n in TABLE_2:
        label = f"paper, Table 2's baseline of {n} tokens"
        yield label, (m.SHAPES["mistral-7b"], [n] * 32, "paper")


def cases_decode(g):
    def matrices(D):
        return tuple(normal(g, D, D) * 0.5 for _ in range(4))

    def draw(D, N, T, held):
        blocks = [matrices(D) for _ in held]
        caches = []
        for n in held:
            keys, values = normal(g, n, D), normal(g, n, D)
            caches.append((keys, values, torch.tensor(draw_places(g, n, N - 1))))
        return normal(g, T, D), N, blocks, caches, 100.0

    yield "one block, one token", draw(D=4, N=9, T=1, held=(5,))
    yield "ragged caches, several tokens", draw(D=6, N=14, T=3, held=(9, 6, 2))
    yield "caches of one token", draw(D=2, N=5, T=2, held=(1, 1))


# ------------------------------------------------------- the check: run, compare, find the mistake

# Exercise -> its differentiable argument: training takes the gradient of the result in it.
DIFFERENTIABLE = {"ranking_loss": 0, "masked_attention": 3}
# Exercise -> the names of its result's parts, for messages.
PARTS = {"ranking_loss": ("loss", "gradient in score"),
         "masked_attention": ("output", "gradient in keep"),
         "decode": ("states", "caches")}


def run(name, f, args):
    """Call one exercise -> its result in plain lists.

    It is [result, gradient] for the two exercises that training differentiates.
    """
    if name == "saliency":
        with torch.no_grad():
            return plain(f(*args))
    if name not in DIFFERENTIABLE:
        return plain(f(*args))
    args, at = list(args), DIFFERENTIABLE[name]
    source = args[at] = args[at].clone().requires_grad_()
    out = f(*args)
    grad = None
    if isinstance(out, torch.Tensor) and out.requires_grad:
        total = out if name == "ranking_loss" else (out * fixed_weights(out)).sum()
        grad, = torch.autograd.grad(total, source, allow_unused=True)
    if grad is None:
        grad = torch.zeros_like(source)
    return [plain(out), plain(grad)]


def difference(got, want, tolerance, where=""):
    """The first difference in words, or None. A None in `want` is not compared."""
    if want is None:
        return None
    place = where or "the result"
    if isinstance(want, list):
        if not isinstance(got, list) or len(got) != len(want):
            entries = len(got) if isinstance(got, list) else "no"
            return f"{place} has {entries} entries instead of {len(want)}"
        for i, (a, b) in enumerate(zip(got, want)):
            found = difference(a, b, tolerance, f"{where}[{i}]")
            if found:
                return found
        return None
    if not isinstance(got, (int, float)):
        kind = f"a list of {len(got)}" if isinstance(got, list) else repr(got)[:40]
        return f"{place} is {kind} instead of a number"
    return None if close(got, want, tolerance) else f"{place} is {got:.6g} instead of {want:.6g}"


def close(got, want, tolerance):
    """Equal up to the tolerance, which is relative for numbers above 1; nan equals nan."""
    if math.isnan(want):
        return math.isnan(got)
    if not math.isfinite(want):
        return got == want
    return abs(got - want) <= tolerance * max(1, abs(want))


def in_order(rows):
    """Rows of numbers, each sorted; anything else as it is."""
    if isinstance(rows, list) and all(isinstance(row, list) for row in rows):
        return [sorted(row) for row in rows]
    return rows


def cases(name, seed):
    g = torch.Generator().manual_seed(1000 * EXERCISES.index(name) + seed)
    return list(globals()[f"cases_{name}"](g))


def check(name, f, seed=0):
    """None if f solves the exercise on the cases of this seed, else one line with what is wrong."""
    spec = globals()[f"spec_{name}"]
    tolerance = 1e-12 if name == "flops" else 1e-5
    drawn = cases(name, seed)
    results, first = [], None
    for label, args in drawn:
        given = copy.deepcopy(args)
        try:
            results.append(run(name, f, given))
        except NotImplementedError:
            called = ", or `rotate` is not, which it calls" if name == "decode" else ""
            return f"not written yet{called}"
        except Exception as e:
            return f"case '{label}': {failure(name, e)}"
        fault = difference(results[-1], spec(*args), tolerance)
        if fault:
            fault = named_part(name, fault)
        elif difference(inputs(given), inputs(args), 0):
            fault = "the result is right, but an input was changed in place"
        if fault and not first:
            first = f"case '{label}': {fault}"
    if not first:
        return None
    for mistake, hint in HINTS[name].items():
        wanted = [spec(*args, wrong=mistake) for _, args in drawn]
        if makes(mistake, results, wanted, 10 * tolerance):
            return hint
    return first


def inputs(args):
    """The tensors and lists among the arguments, as plain lists."""
    return [plain(a) for a in args if isinstance(a, (torch.Tensor, list))]


def failure(name, e):
    """What was raised, in one line."""
    text = " ".join(str(e).split())[:160]
    advice = ""
    if name == "saliency" and "does not require grad" in text:
        advice = ": gradients are off here, torch.enable_grad() switches them on"
    return f"{type(e).__name__}: {text}{advice}"


def named_part(name, fault):
    """A difference that starts with an index into the result's parts: their names instead."""
    for i, part in enumerate(PARTS.get(name, ())):
        if fault.startswith(f"[{i}]"):
            return fault.replace(f"[{i}]", f"{part} ", 1)
    return fault


def makes(mistake, results, wanted, tolerance):
    """Whether the mistake explains every result."""
    for got, want in zip(results, wanted):
        if mistake == "unsorted":
            got, want = in_order(got), in_order(want)
        if difference(got, want, tolerance):
            return False
    return True


def lines(f):
    """Lines of a function's body, without its docstring, blank lines and comments.

    Several statements in one line count each.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(f))).body[0].body
    count = 0
    for statement in body:
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not text:
            count += len(ast.unparse(statement).splitlines())
    return count


# --------------------------------------------------- the reference: the repository's own functions


def one_head(D, theta):
    return Config(dim=D, n_blocks=1, n_heads=1, n_kv_heads=1, head_dim=D, ffn=2, vocab=1,
                  rope_theta=theta)


def reference_rope(pos, d, theta):
    return m.Llama(one_head(d, theta)).rope(pos, int(pos.max()) + 1)


def reference_rotate(q, pos, theta):
    rope = reference_rope(pos, q.shape[-1], theta)
    return m.rotate(q, rope.cos, rope.sin)


def reference_saliency(f, x, reduce):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        g, = torch.autograd.grad(f(x), x)
    return saliency.reduce_saliency(g, x.detach(), reduce)


def reference_masked_attention(q, k, v, keep):
    rope = m.Rope(m.positions(keep), cos=None, sin=None, window=None)
    return m.masked_attention(q, k, v, rope, keep)


def reference_tokens_per_block(n, blocks, first, step, stages, keep, sink, local):
    return prune.Schedule(first, step, stages, keep, sink, local).counts(n, blocks)


@torch.no_grad()
def reference_decode(states, N, blocks, caches, theta):
    """model.Block and model.KVCache themselves: one head, no norm, a SwiGLU that adds nothing."""
    D = states.shape[1]
    pairs = []
    for matrices, cache in zip(blocks, caches):
        pairs.append((reference_block(matrices, theta), reference_cache(cache, theta, states)))
    out = []
    for place, x in enumerate(states, start=N):
        rope = reference_rope(torch.tensor([[place]]), D, theta)
        x = x[None, None]
        for block, cache in pairs:
            x = block(x, rope, cache.attend)
        out.append(x[0, 0])
    return torch.stack(out), [(c.k[0, 0], c.v[0, 0], c.pos[0]) for _, c in pairs]


def reference_block(matrices, theta):
    D = len(matrices[0])
    block = m.Block(one_head(D, theta))
    block.attn_norm = nn.Identity()
    block.down.weight.zero_()
    for layer, W in zip((block.q, block.k, block.v, block.o), matrices):
        layer.weight.copy_(W)
    return block


def reference_cache(held, theta, states):
    """A cache with room for the states to come."""
    T, D = states.shape
    k, v, pos = held
    cache = m.KVCache(one_head(D, theta), 1, len(pos) + T, states.device, states.dtype)
    cache.append(k[None, None], v[None, None], pos[None])
    return cache


REFERENCE = SimpleNamespace(
    rotate=reference_rotate, saliency=reference_saliency, ranking_loss=predictor.ranking_loss,
    select=prune.select, masked_attention=reference_masked_attention,
    tokens_per_block=reference_tokens_per_block, flops=prune.flops, decode=reference_decode)


# ------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def answers(pytestconfig):
    """The functions under test, a module; or a str, what is wrong with the file that holds them."""
    name = pytestconfig.getoption("--impl")
    path = ROOT / "tests" / "exercises.py" if name in ("reference", "student") else name
    try:
        spec = importlib.util.spec_from_file_location("answers", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as e:
        text = " ".join(str(e).split())
        return f"{path} cannot be imported: {type(e).__name__}: {text}"
    if name == "reference":         # the puzzles stay: their only given answers are in that file
        vars(module).update(vars(REFERENCE))
    return module


def missing(answers, name):
    """What keeps a function from being called, or None."""
    if isinstance(answers, str):
        return answers
    return None if getattr(answers, name, None) else "this function is missing"


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, answers, pytestconfig, record_property):
    f = getattr(answers, name, None)
    hint = missing(answers, name) or check(name, f, pytestconfig.getoption("--seed"))
    result = hint
    if not hint:
        budget = re.search(r"At most (\d+) lines", f.__doc__ or "")
        result = f"ok, {lines(f)} lines" + (f" of {budget[1]}" if budget else "")
    record_property("exercise", f"{EXERCISES.index(name) + 1} {name}: {result}")
    if hint:
        pytest.fail(f"{name}: {hint}", pytrace=False)


# ---------------------------------------------------------------- the open puzzles: only a score


class Toy:
    """The frozen toy with its trained predictors, their schedule, and rows to train and measure on.

    Seed 0 measures on the held-out rows, any other seed on fresh stories of the same kind.
    """

    def __init__(self, seed):
        path, tokenizer = find("toy"), Tokenizer("toy")
        self.model = m.load("toy", device="cpu")
        self.predictors, metadata = load_predictors(path / "predictors.safetensors", self.model)
        self.schedule = prune.Schedule(**metadata["schedule"])
        self.training = examples(tokenizer, path / "train.jsonl", "train")
        if seed:
            self.rows = fresh_rows(tokenizer, seed)
        else:
            self.rows = examples(tokenizer, path / "train.jsonl", "heldout")

    def cost(self, schedule=prune.UNPRUNED, scorer=None):
        """NLL per answer token of the rows measured on."""
        values = []
        for row in self.rows:
            tokens = row.tokens[None]
            values.append(prune.nll(self.model, tokens, row.prompt_len, schedule, scorer)[0])
        return torch.cat(values).mean().item()


def fresh_rows(tokenizer, seed):
    from toy import fresh_prompt
    rng, rows = random.Random(seed), []
    for _ in range(20):
        tokens, prompt_len, _ = fresh_prompt(rng, tokenizer, 400)
        rows.append(Example(tokens[0], prompt_len))
    return rows


@pytest.fixture(scope="module")
def toy(pytestconfig):
    return Toy(pytestconfig.getoption("--seed"))


def score_puzzle_schedule(f, toy):
    schedule, L = f(), len(toy.model.blocks)
    shares = [sum(schedule.counts(row.prompt_len, L)) / L / row.prompt_len for row in toy.rows]
    used = sum(shares) / len(shares)
    need(used <= 0.5, f"{used:.1%} of the tokens enter a block on average, at most 50% may")
    need(schedule.sink == 4 and schedule.local == 0.1, "sink has to be 4 and local 0.1")
    after, first = schedule.after(L), toy.schedule.first

    def scorer(stage, x, pos):      # the module of the stage's own block, there is none of block 1
        module = toy.predictors[max(0, after[stage] - first)]
        return predictor.score(module(x))

    cost, unpruned = toy.cost(schedule, scorer), toy.cost()
    return f"NLL {cost:.4f} at {used:.1%} of the tokens (unpruned {unpruned:.4f})"


def score_puzzle_predictors(f, toy):
    modules = f(copy.deepcopy(toy.predictors), toy.model, toy.training)
    trained = toy.cost(toy.schedule, prune.predictor_scorer(toy.predictors))
    expected = len(toy.predictors)
    need(len(modules) == expected, f"{len(modules)} modules, expected {expected}")
    held = {}                       # by identity: what stands in several places counts once
    for module in modules:
        for part in (*module.parameters(), *module.buffers()):
            held[id(part)] = part.numel()
    numbers = sum(held.values())
    x = normal(torch.Generator().manual_seed(0), 1, 9, toy.model.config.dim)
    for module in modules:
        alone = torch.allclose(module(x)[:, ::2], module(x[:, ::2]), atol=1e-4)
        need(alone, "a token's logits depend on other tokens")
    cost = toy.cost(toy.schedule, prune.predictor_scorer(modules))
    need(cost <= trained + 0.1, f"{numbers} numbers, but NLL {cost:.4f}; at most "
                                f"{trained + 0.1:.4f} is allowed, 0.1 above the trained ones")
    return f"{numbers} numbers, NLL {cost:.4f} (trained {trained:.4f}, at most 0.1 more)"


def score_puzzle_scorer(f, toy):
    def named(name):
        scorer = make_scorer(name, toy.model, toy.schedule, toy.predictors)
        return f"{toy.cost(toy.schedule, scorer):.4f}"

    cost = toy.cost(toy.schedule, f(toy.model))
    return (f"NLL {cost:.4f} (random {named('random')}, norm {named('norm')}, "
            f"trained predictors {named('predictor')}, unpruned {toy.cost():.4f})")


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzle(name, answers, request, pytestconfig, record_property):
    if not pytestconfig.getoption("--puzzles"):
        pytest.skip("--puzzles prints the scores")
    fault = missing(answers, name)
    score = None
    if not fault:
        try:
            toy = request.getfixturevalue("toy")
            score = globals()[f"score_{name}"](getattr(answers, name), toy)
        except Exception as e:
            kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
            fault = kind + " ".join(str(e).split())
    record_property("puzzle", f"{name}: {fault or score}")
    if fault:
        pytest.fail(f"{name}: {fault}", pytrace=False)
