"""Checks the eight exercises of exercises.py against slow specifications in plain Python.

    python -m pytest tests/test_exercises.py                    # the repository's own functions
    python -m pytest tests/test_exercises.py --impl student     # tests/exercises.py: n/8 and hints
    python -m pytest tests/test_exercises.py --impl=path/to/file.py --seed 7 --puzzles

The = keeps pytest from taking the file for one of tests, and from loading a conftest.py beside it.

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
import signal
import textwrap
from contextlib import contextmanager
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
from lab.plan import SHAPES
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
        "both_minus":
            "the second line has the wrong sign: q[i + d/2] * cos(a) + q[i] * sin(a)",
        "from_one":
            "every position is one too large: positions begin at 0, as pos gives them",
        "renumbered":
            "the tokens are numbered anew 0 ... n - 1; a survivor keeps its original position, "
            "use pos",
        "first_row":
            "row 0's positions are used for every row of the batch",
        "relative":
            "the positions are counted from the first survivor's; a token stands where it stood in "
            "the prompt, at pos",
        "theta_fixed":
            "theta is an argument; this is always 10000",
        "exponent":
            "the exponent of theta is -2 i / d for i = 0 ... d/2 - 1; this is -i / d",
        "exponent_twice":
            "the exponent of theta is -2 i / d for i = 0 ... d/2 - 1; this is -4 i / d "
            "(arange(0, d, 2) is 2 i already)",
        "exponent_from_one":
            "i begins at 0: the first pair turns by the position itself, theta ** 0",
        "exponent_sign":
            "the exponent of theta has the wrong sign: later pairs turn more slowly, "
            "theta ** (-2 i / d)",
        "overwritten":
            "the second feature is computed from the first one's new value; both need the old q",
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
        "product_of_norms":
            "norm_gx is not norm(g) * norm(x): multiply g and x elementwise, then take one norm",
        "rms":
            "norm_gx takes the mean of the squares under the root; it is their sum",
        "l1":
            "norm_gx sums the absolute values, the L1 norm; the Euclidean norm is the root of the "
            "sum of squares",
        "mean":
            "abs_dot takes the mean over features; it is their sum",
        "x_alone":
            "abs_dot leaves out x: it is the sum of g_i * x_i, not of g_i",
        "swapped":
            "\"abs_dot\" and \"norm_gx\" are swapped",
        "always_dot":
            "reduce is not looked at: this is always \"abs_dot\"",
        "always_norm":
            "reduce is not looked at: this is always \"norm_gx\"",
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
        "negative":
            "the loss is negative: log sigmoid without its minus",
        "difference":
            "the score difference is multiplied by the difference of the saliencies; Eq. 6 takes "
            "its sign alone",
        "sum":
            "this is the sum over pairs, which grows with n squared; divide by the number of pairs",
        "all_pairs":
            "pairs i = j are counted too, each with log 2; only i < j are pairs",
        "no_ties":
            "pairs of equal saliency are left out; sign(0) = 0, so they count log 2 each",
        "tie_up":
            "equal saliencies count as i above j; sign(0) = 0, so such a pair counts log 2",
        "tie_down":
            "equal saliencies count as i below j; sign(0) = 0, so such a pair counts log 2",
        "one_mask":
            "pairs count with only one token in the mask; both have to be in it",
        "no_mask":
            "the mask is ignored: pairs with tokens outside it are counted",
        "all_count":
            "the sum is divided by all n (n - 1) / 2 pairs of each row; count only the pairs "
            "inside the mask",
        "row_means":
            "this is the mean of the rows' means; all pairs of all rows are one heap",
        "across_rows":
            "pairs are made of tokens of different rows too; i and j are of the same row",
        "by_all":
            "the sum is divided by all n * n entries of each row; divide by the number of pairs",
        "twice":
            "the loss is twice too large: each pair is counted as i, j and as j, i, but divided by "
            "once",
        "by_rows":
            "the sum is divided by the number of rows; divide by the number of pairs",
        "by_tokens":
            "the sum is divided by the number of tokens in the mask; divide by the number of pairs",
        "overflow":
            "exp overflows at large score differences; use softplus, or logaddexp",
        "overflow_masked":
            "exp overflows at large score differences, and inf * 0 is nan; use softplus, or "
            "logaddexp",
        "empty":
            "without any pair the result is 0, not 0 / 0",
        "gradient":
            "the loss is right, but its gradient in score is not: training needs it. No detach, "
            "no .item(), no no_grad on the way from score",
    },
    "select": {
        "unsorted":
            "the right tokens, but not in increasing order: survivors must stay in reading order, "
            "or causal attention breaks",
        "lowest":
            "the lowest scores are kept; it is the highest",
        "others_only":
            "the protected are never kept; they come first, the best of the others fill up",
        "no_sink":
            "the first `sink` positions are not protected",
        "sink_by_index":
            "the sinks are taken by index, the first `sink` of the n; they are the tokens at "
            "positions below sink",
        "sink_more":
            "one sink too many: protected are positions below sink, not sink itself",
        "no_local":
            "the last positions of the prompt are not protected",
        "local_more":
            "one local token too many: protected are the last max(1, ceil(...)) positions",
        "local_from_end":
            "the local positions are counted back from the last token that is left; the prompt "
            "ends at prompt_len",
        "local_by_index":
            "the local tokens are taken by index, the last of the n; they are those at the last "
            "positions of the prompt",
        "last_by_index":
            "the last of the n are protected by index; it is the last positions of the prompt, and "
            "the whole response after it",
        "local_less":
            "one local token too few: protected are the positions from prompt_len - their number "
            "on, that one too",
        "floor":
            "the local share is rounded down; it is ceil(local * prompt_len - 1e-9), and at least "
            "1",
        "floor_one":
            "the local share is rounded down; it is ceil(local * prompt_len - 1e-9)",
        "floor_more":
            "one more than the local share rounded down is too many where the share is whole; it "
            "is ceil(local * prompt_len - 1e-9)",
        "nearest":
            "the local share is rounded to the nearest number; it is "
            "ceil(local * prompt_len - 1e-9)",
        "fuzz":
            "ceil without the - 1e-9: a product like 0.07 * 100 = 7.000000000000001 counts one too "
            "many",
        "local_of_left":
            "the local share is taken of the n tokens left; it is a share of the prompt",
        "local_of_k":
            "the local share is taken of k; it is a share of the prompt",
        "no_response":
            "tokens after the prompt are not protected",
        "late_ties":
            "among equal scores the later token wins; the earlier should (argsort: stable=True)",
        "any_ties":
            "the right scores, but among equal ones not the earlier token (topk promises no order; "
            "argsort with stable=True does)",
        "k_beside":
            "k are kept beside the protected; k counts the protected too",
        "first_row":
            "row 0's positions say who is protected in every row; each row has its own",
        "positions":
            "these are positions; wanted are indices into the n tokens that are left",
    },
    "masked_attention": {
        "no_diagonal":
            "a dropped query does not see itself: the mask's diagonal is 1",
        "no_renorm":
            "the mask is multiplied in after the softmax: the weights no longer sum to 1; mask "
            "before normalising",
        "after":
            "the mask comes after the softmax, on its weights or on v: they no longer sum to 1; "
            "mask before normalising, with 1 where j = i",
        "both":
            "keep_i * keep_j hides all keys from a dropped query too; m_ij is keep_j alone",
        "on_logits":
            "the mask multiplies the logits: a hidden key's becomes 0, and exp(0) is 1; multiply "
            "the exponentials",
        "on_keys":
            "the mask multiplies k: a hidden key's logit becomes 0, and exp(0) is 1; multiply the "
            "exponentials, with 1 where j = i",
        "inverted":
            "the mask is turned round: keep holds 1.0 for kept tokens",
        "queries_zeroed":
            "the outputs of dropped tokens are set to 0; every query has an output, and sees "
            "itself",
        "not_causal":
            "later keys are seen: only j <= i",
        "no_scale":
            "the logits are not divided by sqrt(d)",
        "by_d":
            "the logits are divided by d; it is sqrt(d)",
        "queries":
            "the mask hides queries (rows of the matrix); it has to hide keys (columns)",
        "hard":
            "the outputs are right, but no gradient reaches keep: multiply the exponentials by the "
            "mask itself; no -inf, no keep > 0, no detach",
        "top_hidden":
            "S, or the largest logit, is taken over hidden keys too: all visible exponentials "
            "underflow and 0 / 0 is nan",
        "unbounded":
            "a hidden key's exp(x) overflows, and inf * 0 is nan; a hidden key takes sigmoid(x)",
        "unbounded_later":
            "a hidden key's exp(x) overflows, and inf * 0 is nan; a hidden key takes sigmoid(x)",
        "no_shift":
            "exp(a) overflows at large logits: subtract S_i first; a hidden key takes sigmoid(x)",
        "no_shift_later":
            "exp(a) overflows at large logits: subtract S_i first; a hidden key takes sigmoid(x)",
        "where_after":
            "outputs and the gradient in keep are right, but q and k get nan: a branch that "
            "torch.where did not take gives 0 * inf; choose before the exponential",
        "hidden_gradient":
            "the outputs are right, but a dropped key's gradient is not: a hidden key's e_ij is "
            "sigmoid(x_ij) * m_ij, with x_ij = a_ij - S_i",
        "gradient":
            "the outputs are right, but the gradient in keep is not: keep enters as the factor "
            "m_ij of each e_ij, in both sums, and nowhere else; the diagonal is the constant 1",
    },
    "tokens_per_block": {
        "early":
            "off by one: a stage stands AFTER its block, and the next block is the first to see "
            "fewer tokens",
        "late":
            "off by one: the fewer tokens are seen one block too late; the first is the block "
            "right after the stage's",
        "step_late":
            "stage s stands after block first + step * (s - 1); here the first stands a step later",
        "of_left":
            "keep ** s is taken of what is left; it is a share of the whole prompt",
        "triangular":
            "the powers add up, keep ** (1 + 2 + ... + s); stage s leaves keep ** s of the prompt",
        "drops":
            "1 - keep is kept; stage s leaves keep ** s of the prompt",
        "one_block":
            "the tokens are back after one block; what a stage drops stays dropped",
        "linear":
            "each stage drops the same number; stage s leaves keep ** s of the prompt",
        "iterated":
            "each stage rounds a share of the rounded count before it; it is round(keep ** s * n), "
            "of the prompt",
        "truncated":
            "the share is cut to a whole number; round it",
        "rounded_up":
            "the share is rounded up; Python's round takes the nearest whole number",
        "half_up":
            "halves are rounded up; Python's round takes them to the even number",
        "power":
            "off by one in the power: the first stage keeps keep ** 1",
        "no_minimum":
            "the counts fall below the protected tokens",
        "smaller":
            "the smaller of protected and share is taken; it is the larger",
        "no_sink":
            "the sinks are not counted among the protected: sink + max(1, ...)",
        "no_local":
            "the local tokens are not counted among the protected: sink + max(1, ...)",
        "larger":
            "the protected are the larger of sink and local; they are sink + max(1, ...)",
        "added":
            "the protected are added to the share; it is the larger of the two",
        "of_others":
            "the share is taken of the tokens that are not protected; it is a share of the prompt, "
            "never below the protected",
        "uncapped":
            "more tokens than the prompt has: the protected are never more than n",
        "floor":
            "the local share is rounded down; it is ceil(local * n - 1e-9), and at least 1",
        "floor_one":
            "the local share is rounded down; it is ceil(local * n - 1e-9)",
        "floor_more":
            "one more than the local share rounded down is too many where the share is whole; it "
            "is ceil(local * n - 1e-9)",
        "nearest":
            "the local share is rounded to the nearest number; it is ceil(local * n - 1e-9)",
        "local_of_left":
            "the local share is taken of what is left; it is a share of the prompt",
        "local_of_others":
            "the local share is taken of n - sink; it is a share of the whole prompt",
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
        "three_of_four":
            "exact: attention has four matrices, q, k, v and o; one of D x H d is missing",
        "square":
            "exact: q and o are counted as D x D; they are D x H d, and H d need not be D",
        "dim_pairs":
            "exact: attention's products are counted with D; they are H of length d, and H d need "
            "not be D",
        "one_of_kv":
            "exact: k and v are two matrices of D x G d; one is missing",
        "both_halves":
            "exact: n (n + 1) pairs are counted; causal attention has half of them",
        "kv_pairs":
            "exact: attention's pairs are counted for the n_kv_heads; every query head has its "
            "own products",
        "one_product":
            "exact: attention has two products per pair, q . k and the weighted sum of v; this is "
            "one",
        "no_head":
            "exact: the head is missing, 2 D V for the last token",
        "head_each_block":
            "exact: the head is counted in every block; it stands after the last one",
        "embedding":
            "exact: the embedding is counted; it is looked up, which costs nothing",
        "swapped":
            "\"exact\" and \"paper\" are swapped",
        "first_count":
            "every block is counted with the whole prompt; counts[i] tokens enter block i",
        "paper_gqa":
            "paper: Table 2's accounting ignores the grouping, each of q, k, v, o counts D x D",
        "paper_pairs":
            "paper: attention counts 3 D per pair, not the 4 D of two products",
        "paper_half":
            "paper: a factor 2 is missing, 2 (4 D D + 3 D F) for each token",
        "paper_half_head":
            "paper: embedding and head together are 4 V D for each token of the prompt, not 2 V D",
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
        "one_early":
            "the first new token stands at N - 1, where the prompt's last one is; it is N",
        "one_late":
            "the first new token stands at N + 1; the prompt ends at N - 1, so it is N",
        "no_self":
            "a new token does not see itself: put it into the cache before attending",
        "not_appended":
            "the caches do not grow: the next token cannot see this one",
        "turned_again":
            "the cached keys are turned again; they already stand at their own positions",
        "all_turned_again":
            "the cached keys are turned again; they already stand at their own positions",
        "turned_twice":
            "every key is turned again as it is read; a cached key, an old or a new one, stands at "
            "its position",
        "turned_each_step":
            "the whole cache is turned again with every token; turn each new key once",
        "key_not_turned":
            "the new key is not turned to its position, only the query is",
        "query_not_turned":
            "the query is not turned to its position, only the key is",
        "value_turned":
            "the value is turned too; only q and k are",
        "first_state":
            "k and v of every block come from the token's first state; each block takes the x that "
            "the block before it left",
        "value_is_state":
            "the state itself is cached as the value; it is Wv @ x",
        "qk_swapped":
            "Wq and Wk are swapped: the order is Wq, Wk, Wv, Wo",
        "prepended":
            "the new token stands at the front of the cache; it joins its end",
        "first_residual":
            "the update is added to the token's first state; x goes on from block to block",
        "transposed":
            "the matrices are transposed: Wq @ x for one state x, and x @ Wq.T for rows of states",
        "transposed_qkv":
            "Wq, Wk and Wv are transposed: Wq @ x for one state x, and x @ Wq.T for rows of states",
        "no_residual":
            "the state itself is lost: x + Wo @ ..., not Wo @ ... alone",
        "no_output":
            "Wo is left out: x + Wo @ (sum of p * value)",
        "sees_later":
            "a new token sees the ones after it: they come one by one",
        "alone":
            "a new token sees the prompt's tokens and itself, but not the new ones before it",
        "no_scale":
            "the logits are not divided by sqrt(D)",
        "by_d":
            "the logits are divided by D; it is sqrt(D)",
    },
}
EXERCISES = list(HINTS)
# Exercise -> how many lines it may have; more are said, and pass.
BUDGETS = {"rotate": 8, "saliency": 6, "ranking_loss": 8, "select": 8, "masked_attention": 10,
           "tokens_per_block": 8, "flops": 8, "decode": 15}
PUZZLES = ("puzzle_schedule", "puzzle_predictors", "puzzle_scorer")
INFINITE = 88.8                     # fp32's exp of more than this is infinite
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
        powers = {"exponent": i, "exponent_twice": 4 * i, "exponent_from_one": 2 * (i + 1),
                  "exponent_sign": -2 * i}
        base = 10000 if wrong == "theta_fixed" else theta
        angle = place * base ** (-powers.get(wrong, 2 * i) / d)
        cos, sin = math.cos(angle), math.sin(angle)
        if wrong == "sign":
            sin = -sin
        one, two = i, i + d // 2
        if wrong == "interleaved":
            one, two = 2 * i, 2 * i + 1
        out[one] = x[one] * cos - x[two] * sin
        kept = out[one] if wrong == "overwritten" else x[one]
        out[two] = x[two] * cos + (-kept if wrong == "both_minus" else kept) * sin
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
        if wrong == "relative":
            places = [place - places[0] for place in places]
        if wrong == "from_one":
            places = [place + 1 for place in places]
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
    others = {"abs_dot": "norm_gx", "norm_gx": "abs_dot"}
    reduces = {"swapped": others[reduce], "always_dot": "abs_dot", "always_norm": "norm_gx"}
    reduce = reduces.get(wrong, reduce)
    gradients = gradient(f, x)
    if wrong == "stale" and x.grad is not None:
        gradients += x.grad
    found = []
    for g, state in zip(gradients.tolist(), x.tolist()):
        if reduce == "abs_dot":
            found.append(absolute_dot(g, state, wrong))
        else:
            found.append(norm_of_product(g, state, wrong))
    return found


def absolute_dot(g, x, wrong=None):
    products = [a * b for a, b in zip(g, x)]
    if wrong == "sum_abs":
        return sum(map(abs, products))
    if wrong == "mean":
        return abs(sum(products)) / len(x)
    if wrong == "x_alone":
        return abs(sum(g))
    return sum(products) if wrong == "signed" else abs(sum(products))


def norm_of_product(g, x, wrong=None):
    products = [a * b for a, b in zip(g, x)]
    if wrong == "product_of_norms":
        return math.sqrt(dot(g, g) * dot(x, x))
    if wrong == "l1":
        return sum(map(abs, products))
    vector = g if wrong == "g_alone" else products
    square = dot(vector, vector)
    if wrong == "rms":
        square /= len(vector)
    return square if wrong == "squared" else math.sqrt(square)


def spec_ranking_loss(score, saliency, mask, wrong=None):
    """[the loss, its gradient in score (B, n)]; a wrong one is known by the loss alone."""
    losses, slopes = [], []         # for each row
    if wrong == "across_rows":
        score, saliency, mask = (each.flatten()[None] for each in (score, saliency, mask))
    for row in zip(score.tolist(), saliency.tolist(), mask.tolist()):
        of_pairs, of_tokens = ranking_row(*row, wrong)
        losses.append(of_pairs)
        slopes.append(of_tokens)
    if wrong == "row_means":
        means = [sum(row) / len(row) for row in losses if row]
        return [sum(means) / max(1, len(means)), None]
    total = sum(map(sum, losses))
    count = sum(map(len, losses))
    if wrong == "empty" and count == 0:
        return [math.nan, None]
    counts = {"sum": 1, "by_rows": len(losses), "by_tokens": mask.sum().item(), "twice": count / 2,
              "by_all": mask.numel() * mask.shape[1], "negative": -count}
    count = counts.get(wrong, count)
    loss = total / (count or 1)
    slopes = torch.tensor(slopes, dtype=torch.double) / (count or 1)
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
        counted = {"no_mask": True, "one_mask": mask[i]}.get(wrong, mask[i] and mask[j])
        if not counted:
            if wrong == "all_count":
                losses.append(0.0)
            continue
        signs = {"no_sign": 1, "flipped": -order, "difference": saliency[i] - saliency[j],
                 "tie_up": order or 1, "tie_down": order or -1}
        sign = signs.get(wrong, order)
        z = -(score[i] - score[j]) * sign
        if wrong in ("overflow", "overflow_masked") and z > INFINITE:
            losses.append(math.inf if wrong == "overflow" else math.nan)
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
    if wrong == "floor_more":
        return math.floor(local * n) + 1
    if wrong == "nearest":
        return max(least, round(local * n))
    if wrong == "fuzz":
        return max(least, math.ceil(local * n))
    return max(least, math.ceil(local * n - 1e-9))


def fixed_tokens(places, k, prompt_len, sink, local, wrong=None):
    """Whether each of the tokens at these places is protected."""
    n = len(places)
    wholes = {"local_of_left": n, "local_of_k": k}
    last = local_count(wholes.get(wrong, prompt_len), local, wrong)
    last += {"local_less": -1, "local_more": 1}.get(wrong, 0)
    end = places[-1] + 1 if wrong == "local_from_end" else prompt_len
    first_local = end - last
    found = []
    for i, place in enumerate(places):
        from_left = i if wrong == "sink_by_index" else place
        protected = {"no_sink": from_left < sink + (wrong == "sink_more"),
                     "no_local": first_local <= place < end,
                     "no_response": place >= prompt_len}
        if wrong in ("local_by_index", "last_by_index"):
            protected["no_local"] = i >= n - last
        if wrong in ("last_by_index", "local_from_end"):
            del protected["no_response"]
        protected.pop(wrong, None)
        found.append(any(protected.values()))
    return found


def spec_select(score, pos, k, prompt_len, sink, local, wrong=None):
    """Lists of indices; None, not to be compared, where a mistake asks for more than there are."""
    found = []
    for scores, places in zip(score.tolist(), pos.tolist()):
        if wrong == "first_row":
            places = pos[0].tolist()
        n = len(places)
        fixed = fixed_tokens(places, k, prompt_len, sink, local, wrong)
        ranks = []                  # the smallest survive
        for i in range(n):
            tie = -i if wrong == "late_ties" else i
            rank = scores[i] if wrong == "lowest" else -scores[i]
            first = math.inf if wrong == "others_only" else -math.inf
            ranks.append((first if fixed[i] else rank, tie))
        best = sorted(range(n), key=ranks.__getitem__)
        number = k + (sum(fixed) if wrong == "k_beside" else 0)
        kept = sorted(best[:number])
        found.append([places[i] for i in kept] if wrong == "positions" else kept)
        if number > n:
            return None
    return found


def scores_kept(kept, score, pos, k, prompt_len, sink, local):
    """Rows of indices -> rows of the scores that they stand for, sorted; a protected one's is inf.

    Other results stay as they are.
    """
    found = []
    for row, scores, places in zip(kept, score.tolist(), pos.tolist()):
        n = len(places)
        indices = isinstance(row, list) and all(type(i) is int and 0 <= i < n for i in row)
        if not indices or len(set(row)) < len(row):
            return kept
        fixed = fixed_tokens(places, k, prompt_len, sink, local)
        found.append(sorted(math.inf if fixed[i] else scores[i] for i in row))
    return found


def attention_weights(i, query, keys, keep, given, wrong=None):
    """The weight of each key for query i of one head: lists query [d], keys [n][d], keep [n].

    given: the mask that says who is seen, which is keep itself but for its gradient.
    """
    n = len(keys)
    seen = range(n) if wrong == "not_causal" else range(i + 1)
    d = len(query)
    scale = {"no_scale": 1, "by_d": d}.get(wrong, math.sqrt(d))
    a = [dot(query, key) / scale for key in keys]

    def mask(values, j):
        if j == i and wrong not in ("no_diagonal", "after", "on_keys"):
            return 1.0
        if wrong == "both":
            return values[i] * values[j]
        if wrong == "inverted":
            return 1 - values[j]
        return values[i if wrong == "queries" else j]

    if wrong == "queries_zeroed" and not keep[i]:
        return [0.0] * n
    exponents = {"no_shift": a[:i + 1], "no_shift_later": a}
    if max(exponents.get(wrong, [0])) > INFINITE:
        return [math.nan] * n
    if wrong in ("on_logits", "on_keys"):
        return softmax([a[j] * mask(keep, j) for j in seen]) + [0.0] * (n - len(seen))
    if wrong in ("no_renorm", "after"):
        p = softmax([a[j] for j in seen]) + [0.0] * (n - len(seen))
        return [p[j] * mask(keep, j) for j in range(n)]
    summed = [j for j in seen if mask(given, j) or wrong == "top_hidden"]
    top = max((a[j] for j in summed), default=0.0)
    log_sum = top + math.log(sum(math.exp(a[j] - top) for j in summed) or 1.0)
    exponents = {"unbounded": a[:i + 1], "unbounded_later": a}
    if max(exponents.get(wrong, [0])) - log_sum > INFINITE:
        return [math.nan] * n
    e = [0.0] * n
    for j in seen:
        x = a[j] - log_sum
        if x >= -104:               # below e^-104 fp32 knows only 0
            weight = math.exp(x) if j in summed else 1 / (1 + math.exp(-x))
            e[j] = weight * mask(keep, j)
    total = sum(e)
    return [w / total if total else math.nan for w in e]


def softmax(a):
    top = max(a)
    e = [math.exp(x - top) for x in a]
    total = sum(e)
    return [x / total for x in e]


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
    """[the output, the gradient in keep (B, n), how many numbers q's and k's gradients lack].

    These are gradients of the sum of outputs times `fixed_weights`. A wrong one is known by the
    output alone, but for three: "hard" has the gradient 0 in keep, "hidden_gradient" the right one
    for the kept tokens, "where_after" for all.
    """
    outputs, slopes = [], []
    for row in zip(q.tolist(), k.tolist(), v.tolist(), keep.tolist(), fixed_weights(q)):
        *qkv, mask, weights = row
        outputs.append(attend(*qkv, mask, mask, wrong))
        if wrong in (None, "hidden_gradient", "where_after"):
            known = [kept or wrong != "hidden_gradient" for kept in mask]
            slopes.append([slope_in_keep(qkv, mask, j, weights) if known[j] else None
                           for j in range(len(mask))])
    if wrong == "hard":
        slopes = torch.zeros_like(keep).tolist()
    return [outputs, slopes or None, None if wrong else 0]


def slope_in_keep(qkv, keep, j, weights):
    """How the weighted sum of one row's outputs changes with keep[j], by central difference."""
    def total(step):
        moved = list(keep)
        moved[j] += step
        out = torch.tensor(attend(*qkv, moved, keep), dtype=torch.double)
        return (out * weights).sum().item()
    return (total(1e-5) - total(-1e-5)) / 2e-5


def spec_tokens_per_block(n, blocks, first, step, stages, keep, sink, local, wrong=None):
    protected = protected_count(n, n, sink, local, wrong)
    places = [first + step * (s + (wrong == "step_late")) for s in range(stages)]
    if wrong == "wrapped":
        places = [min(block, blocks - 1) for block in places]
    shift = {"early": 0, "late": 2}.get(wrong, 1)
    counts, left, stage = [], n, 0
    for block in range(1, blocks + 1):
        while stage < stages and places[stage] + shift <= block:
            stage += 1
            if wrong == "local_of_left":
                protected = protected_count(n, left, sink, local)
            share = share_kept(n, left, stage, keep, protected, wrong)
            target = whole_number(share, wrong)
            if wrong in ("added", "of_others"):
                target = min(n, protected + target)
            left = min(protected, target) if wrong == "smaller" else max(protected, target)
        counts.append(left)
        if wrong == "one_block":
            left = n
    return counts


def protected_count(n, whole, sink, local, wrong=None):
    """How many of n tokens are protected; the local ones are a share of `whole`."""
    last = local_count(whole - sink if wrong == "local_of_others" else whole, local, wrong)
    counts = {"no_minimum": 0, "no_sink": last, "no_local": sink, "larger": max(sink, last)}
    count = counts.get(wrong, sink + last)
    return count if wrong == "uncapped" else min(n, count)


def share_kept(n, left, stage, keep, protected, wrong=None):
    """What a stage keeps of n tokens, of which the stage before it left `left`, not yet rounded."""
    if wrong == "linear":
        return (1 - stage * (1 - keep)) * n
    if wrong == "drops":
        keep = 1 - keep
    powers = {"power": stage - 1, "iterated": 1, "triangular": sum(range(stage + 1))}
    wholes = {"of_left": left, "iterated": left, "of_others": n - protected}
    return keep ** powers.get(wrong, stage) * wholes.get(wrong, n)


def whole_number(share, wrong=None):
    if wrong == "truncated":
        return math.floor(share)
    if wrong == "half_up":
        return math.floor(share + 0.5)
    if wrong == "rounded_up":
        return math.ceil(share)
    return round(share)


def spec_flops(c, counts, accounting, wrong=None):
    exact = (accounting == "exact") == (wrong != "swapped")
    blocks = exact_block if exact else paper_block
    if wrong == "first_count":
        counts = [counts[0]] * len(counts)
    total = sum(blocks(c, n, wrong) for n in counts)
    if exact:
        times_used = {"head_everywhere": counts[0], "no_head": 0, "embedding": 2,
                      "head_each_block": len(counts)}
        tokens = times_used.get(wrong, 1)
        total += 2 * c.dim * c.vocab * tokens
    else:
        tokens = {"paper_head": 1, "paper_half_head": counts[0] / 2}.get(wrong, counts[0])
        total += 2 * 2 * c.dim * c.vocab * tokens
    return total // 2 if wrong == "multiply_only" else total


def exact_block(c, n, wrong=None):
    D, F, d = c.dim, c.ffn, c.head_dim
    heads = c.n_heads * d
    kv_heads = (c.n_heads if wrong == "no_gqa" else c.n_kv_heads) * d
    width = D if wrong == "square" else heads
    matrices = [(D, width), (D, kv_heads), (D, F), (F, D)]
    if wrong != "one_of_kv":
        matrices.append((D, kv_heads))
    if wrong != "three_of_four":
        matrices.append((width, D))
    if wrong != "two_matrices":
        matrices.append((D, F))
    total = 0
    for rows, columns in matrices:
        total += 2 * n * rows * columns
    products = 1 if wrong == "one_product" else 2
    widths = {"kv_pairs": c.n_kv_heads * d, "dim_pairs": D}
    per_pair = products * 2 * widths.get(wrong, heads)
    pairs = {"not_causal": n * n, "no_self": sum(range(n)), "both_halves": n * (n + 1)}
    return total + per_pair * pairs.get(wrong, sum(range(1, n + 1)))


def paper_block(c, n, wrong=None):
    D = c.dim
    kv = c.n_kv_heads * c.head_dim if wrong == "paper_gqa" else D
    per_pair = 4 * D if wrong == "paper_pairs" else 3 * D
    pairs = n * (n + 1) // 2 if wrong == "paper_causal" else n * n
    factor = 1 if wrong == "paper_half" else 2
    return n * factor * (D * D + D * kv + D * kv + D * D + 3 * D * c.ffn) + per_pair * pairs


def spec_decode(states, N, blocks, caches, theta, wrong=None):
    """[the states, the caches]; with all keys turned again the caches differ too, unasked."""
    states, blocks, caches = plain(states), plain(blocks), plain(caches)
    if wrong == "sees_later":
        return [decode_block_by_block(states, N, blocks, caches, theta), caches]
    if wrong in ("transposed", "transposed_qkv"):
        turned = 4 if wrong == "transposed" else 3
        blocks = [[*([*zip(*W)] for W in block[:turned]), *block[turned:]] for block in blocks]
    if wrong == "qk_swapped":
        blocks = [(Wk, Wq, Wv, Wo) for Wq, Wk, Wv, Wo in blocks]
    held = [len(keys) for keys, _, _ in caches]
    out = []
    for t, first in enumerate(states):
        x = first
        for block, cache, old in zip(blocks, caches, held):
            places = {"cache_length": len(cache[0]), "stuck": N, "one_late": N + t + 1,
                      "one_early": N + t - 1}
            place = places.get(wrong, N + t)
            source = first if wrong == "first_state" else x
            new = new_entries(source, place, block, theta, wrong)
            update = decode_step(x, new, block, cache, old, theta, wrong)
            base = first if wrong == "first_residual" else x
            x = update if wrong == "no_residual" else added(base, update)
        out.append(x)
    return [out, None if wrong == "all_turned_again" else caches]


def new_entries(x, place, block, theta, wrong=None):
    """What a token of state x adds to a block's cache: key, value, position."""
    _, Wk, Wv, _ = block
    key, value = times(Wk, x), times(Wv, x)
    if wrong not in ("key_not_turned", "all_turned_again", "turned_each_step"):
        key = turn(key, place, theta)
    if wrong == "value_turned":
        value = turn(value, place, theta)
    return key, x if wrong == "value_is_state" else value, place


def decode_step(x, new, block, cache, old, theta, wrong=None):
    """What a block adds to one token, a list of D numbers; its cache grows by `new`.

    old: how many of the cache's tokens are the prompt's.
    """
    Wq, _, _, Wo = block
    D, place = len(x), new[2]
    keys, values, places = cache if wrong == "no_self" else joined(cache, new)
    if wrong == "alone":
        keys, values, places = joined([part[:old] for part in cache], new)
    if wrong in ("all_turned_again", "turned_twice", "turned_each_step"):
        keys = turn_all(keys, places, theta)
    if wrong == "turned_again":
        keys = turn_all(keys[:old], places[:old], theta) + keys[old:]
    scale = {"no_scale": 1, "by_d": D}.get(wrong, math.sqrt(D))
    query = times(Wq, x)
    if wrong != "query_not_turned":
        query = turn(query, place, theta)
    update = attend_to(query, keys, values, scale)
    if wrong != "no_output":
        update = times(Wo, update)
    if wrong == "prepended":
        cache[:] = [[entry, *part] for part, entry in zip(cache, new)]
    elif wrong != "not_appended":
        cache[:] = joined(cache, new)
    if wrong == "turned_each_step":
        cache[0] = keys
    return update


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
    return mixture(softmax([dot(query, key) / scale for key in keys]), values)


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
    yield "positions 0 ... n - 1", (normal(g, 1, 2, 4, 6), torch.arange(4)[None], 1000.0)


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

    pos = torch.tensor([draw_places(g, 24, 40, [0, 1, 35, 36, 37, 38, 39])])
    yield "all scores equal", (torch.zeros(1, 24), pos, 13, 40, 2, 0.1)

    score = torch.randint(0, 3, (2, 30), generator=g).float()
    score[:, -4] = -9               # 0.12 * 30 = 3.6: the fourth token from the end is protected
    pos = torch.arange(30).repeat(2, 1)
    yield "few different scores", (score, pos, whole(g, 12, 20), 30, 4, 0.12)

    falling = torch.arange(20, 0, -1.0)[None]
    pos = torch.tensor([survivors(17, 30, 1, 0.0) + [30, 31, 32]])
    yield "a response after the prompt, local 0", (falling, pos, 9, 30, 1, 0.0)

    falling = 40 - torch.arange(40.0)[None]
    pos = torch.tensor([survivors(40, 100, 2, 0.08)])
    yield "0.07 * 100 is 7.000000000000001", (falling, pos, 15, 100, 2, 0.07)

    others = [draw_places(g, 9, 24), draw_places(g, 9, 24)]
    pos = torch.tensor([[0, 2, *(3 + p for p in others[0]), 27, 28, 29],
                        [0, 1, 2, *(3 + p for p in others[1]), 27, 29]])
    score = normal(g, 2, 14)
    score[:, [2, -3]] = -9          # the third is a sink in one row, the third last local in one
    yield "no token at some protected positions", (score, pos, 9, 30, 3, 0.1)

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
    keep = torch.tensor([[1.0, 0, 1, 1, 1]] * 2)
    # fp32: exp(94) is infinite, exp(-94) not yet 0; exp(-200) is
    for logit, label in (94, "far"), (200, "hundreds"):
        q, k, v = qkv(5)
        q[..., 0] = 1
        k[:, :, 1] = torch.tensor([2.0 * logit, 0, 0, 0])       # for every query
        yield f"a hidden key's logit {label} above the others", (q, k, v, keep)


def cases_tokens_per_block(g):
    yield "the paper's schedule", (1000, 32, 4, 3, 10, 0.9, 4, 0.1)
    yield "the paper's schedule", (whole(g, 400, 4000), 32, 4, 3, 10, 0.9, 4, 0.1)
    yield "stages past the last block", (whole(g, 80, 120), 6, 2, 2, 9, 0.7, 2, 0.05)
    yield "one stage", (58, 3, 1, 1, 1, 0.7, 1, 0.05)
    yield "a stage after the last block", (100, 4, 4, 1, 1, 0.5, 2, 0.05)
    for n, local in (57, 0.1), (53, 0.1), (20, 0.3):        # 5.7, 5.3 and 6 local tokens
        yield "the share falls below the protected", (n, 7, 1, 1, 5, 0.3, 4, local)
    yield "0.07 * 100 is 7.000000000000001", (100, 5, 1, 1, 3, 0.1, 2, 0.07)
    yield "a prompt shorter than what is protected", (whole(g, 2, 4), 5, 1, 1, 3, 0.5, 4, 0.1)
    yield "halves", (50, 4, 1, 1, 1, 0.25, 0, 0.1)
    yield "local 0, strong pruning", (20, 5, 1, 1, 3, 0.1, 0, 0.0)
    yield "no stage", (10, 3, 1, 1, 0, 0.5, 1, 0.1)


def cases_flops(g):
    # dim and ffn are prime: no two mistakes leave out, or add, the same product
    dim, ffn = (13, 17, 19)[whole(g, 0, 2)], (23, 29, 31, 37)[whole(g, 0, 3)]
    small = Config(dim=dim, n_blocks=5, n_heads=6, n_kv_heads=2, head_dim=whole(g, 4, 5), ffn=ffn,
                   vocab=whole(g, 50, 90))
    counts = [20] * 2 + [whole(g, 12, 18)] * 2 + [whole(g, 6, 10)]
    yield "exact, grouped heads, dwindling counts", (small, counts, "exact")
    yield "paper, dwindling counts", (small, counts, "paper")
    yield "exact, one token", (small, [1], "exact")
    for n in TABLE_2:
        label = f"paper, Table 2's baseline of {n} tokens"
        yield label, (SHAPES["mistral-7b"], [n] * 32, "paper")


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

# Exercise -> its differentiable arguments: training takes the gradient of the result in them. Of
# the first the gradient is compared, of the others it has to be finite.
DIFFERENTIABLE = {"ranking_loss": [0], "masked_attention": [3, 0, 1]}
# Exercise -> the names of its result's parts, for messages.
PARTS = {"ranking_loss": ("loss", "gradient in score"),
         "masked_attention": ("output", "gradient in keep",
                              "the count of nan and inf in the gradients of q and k"),
         "decode": ("states", "caches")}
# Exercise -> what its result is made of; a tensor stands as its dtype.
FORMS = {"tokens_per_block": [int], "flops": int, "select": torch.int64,
         "decode": (torch.float32, [(torch.float32, torch.float32, torch.int64)])}
# Mistake -> how far from it a result may be: fp32 is rough at angles of thousands and below e^-87;
# a linear share of .5 is rounded up or down.
LOOSE = {"exponent_sign": 0.02, "top_hidden": 0.01, "linear": 0.01}
SECONDS = 10                        # that a call may take


class TooSlow(BaseException):
    """No Exception, which an answer might catch."""


@contextmanager
def limited(seconds):
    """Stop the block after so many seconds with TooSlow; Windows has no such alarm."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_):
        raise TooSlow(f"too slow: stopped after {seconds} seconds")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(name, f, args):
    """Call one exercise -> its result, and the same in plain lists.

    These are [result, gradient ...], see PARTS, for the two that training differentiates.
    """
    if name == "saliency":
        with torch.no_grad():
            out = f(*args)
        return out, plain(out)
    if name not in DIFFERENTIABLE:
        out = f(*args)
        return out, plain(out)
    args, sources = list(args), []
    for at in DIFFERENTIABLE[name]:
        args[at] = args[at].clone().requires_grad_()
        sources.append(args[at])
    out = f(*args)
    grads = [torch.zeros_like(source) for source in sources]
    if isinstance(out, torch.Tensor) and out.requires_grad:
        total = out if name == "ranking_loss" else (out * fixed_weights(out)).sum()
        grads = torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True)
    parts = [plain(out), plain(grads[0])]
    if name == "masked_attention":
        parts.append(sum((~grad.isfinite()).sum().item() for grad in grads[1:]))
    return out, parts


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


def check(name, f, seed=0, seconds=SECONDS):
    """None if f solves the exercise on the cases of this seed, else one line with what is wrong."""
    spec = globals()[f"spec_{name}"]
    tolerance = 1e-12 if name == "flops" else 1e-5
    drawn = cases(name, seed)
    results, first, only_form = [], None, True
    for label, args in drawn:
        given = copy.deepcopy(args)
        try:
            with limited(seconds):
                out, result = run(name, f, given)
        except NotImplementedError:
            called = ", or `rotate` is not, which it calls" if name == "decode" else ""
            return f"not written yet{called}"
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            return f"case '{label}': {failure(name, e)}"
        results.append(result)
        if name == "decode" and not isinstance(out, (tuple, list)):
            return f"it returns {kind(out)} instead of a tuple: the states, and the caches"
        fault = difference(result, spec(*args), tolerance)
        if fault:
            fault, only_form = named_part(name, fault), False
        else:
            fault = wrong_form(name, out) or changed(given, args)
        if fault and not first:
            first = f"case '{label}': {fault}"
    if only_form:                   # or nothing at all
        return first
    for mistake, hint in HINTS[name].items():
        if makes(name, mistake, drawn, results, 10 * tolerance):
            return hint
    return first


def changed(given, args):
    """What a call did to its inputs, in words, or None."""
    for now, before in zip(given, args):
        if not isinstance(before, (torch.Tensor, list)):
            continue
        if plain(now) != plain(before):
            return "the result is right, but an input was changed in place"
        if not isinstance(before, torch.Tensor):
            continue
        if now.requires_grad != before.requires_grad or plain(now.grad) != plain(before.grad):
            return ("the result is right, but the input's own requires_grad or grad was changed; "
                    "take a copy, x.detach().clone()")
    return None


def wrong_form(name, out):
    """What a result whose numbers are right is made of, if of something else than asked for."""
    form = FORMS.get(name, torch.float32)
    fault = None
    if name == "decode" and isinstance(out, tuple):
        for part, value, wanted in zip(PARTS[name], out, form):
            fault = fault or unlike(value, wanted, f"{part}:")
    else:
        fault = unlike(out, form, "it is")
    if not fault and name == "saliency" and out.requires_grad:
        fault = "it carries a graph: detach it"
    return fault and f"the numbers are right, but {fault}"


def unlike(value, form, words):
    """Where a value differs from its form (see FORMS), in words, or None."""
    if kind(value) != kind(form):
        return f"{words} {kind(value)} instead of {kind(form)}"
    if isinstance(form, (list, tuple)):
        forms = form if isinstance(form, tuple) else form * len(value)
        for part, wanted in zip(value, forms):
            fault = unlike(part, wanted, f"{words} {kind(form)} with")
            if fault:
                return fault
    return None


def kind(value):
    """A value, or a form, in words."""
    if isinstance(value, (torch.Tensor, torch.dtype)):
        dtype = value.dtype if isinstance(value, torch.Tensor) else value
        return f"a tensor of {str(dtype).removeprefix('torch.')}"
    name = (value if isinstance(value, type) else type(value)).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def failure(name, e):
    """What was raised, in one line."""
    if isinstance(e, TooSlow):
        return str(e)
    if isinstance(e, SystemExit):
        return "it leaves Python by exit(); return a result instead"
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


def makes(name, mistake, drawn, results, tolerance):
    """Whether the mistake explains every result."""
    spec = globals()[f"spec_{name}"]
    for (_, args), got in zip(drawn, results):
        want = spec(*args, wrong=mistake)
        if mistake == "unsorted":
            got, want = in_order(got), in_order(want)
        if mistake == "any_ties":
            got, want = scores_kept(got, *args), scores_kept(want, *args)
        if difference(got, want, LOOSE.get(mistake, tolerance)):
            return False
    return True


# ---------------------------------------------------------------------------- lines and budgets


def lines(f):
    """Lines of a function's body and of the helpers that it calls, exercises apart; None: unknown.

    Docstrings, comments and blank lines do not count. Several statements in one line count each,
    and a statement of more than 100 columns counts as the lines that it needs.
    """
    todo = [inspect.unwrap(f)]
    found, count = set(todo), 0
    while todo:
        f = todo.pop()
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(f))).body[0]
        except (OSError, SyntaxError, TypeError):
            return None
        count += body_lines(tree)
        known = getattr(f, "__globals__", {})
        for node in ast.walk(tree):
            helper = known.get(node.id) if isinstance(node, ast.Name) else None
            ours = inspect.isfunction(helper) and helper.__module__ == f.__module__
            if ours and node.id not in EXERCISES and helper not in found:
                found.add(helper)
                todo.append(helper)
    return count


def body_lines(tree):
    """Lines of a function's statements, without docstrings, blank lines and comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [s for s in node.body if not is_text(s)] or [ast.Pass()]
    count = 0
    for statement in getattr(tree, "body", [tree]):
        for line in ast.unparse(statement).splitlines():
            count += math.ceil(len(line) / 100)
    return count


def is_text(statement):
    """A docstring, or another constant that does nothing."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def praise(name, f):
    """What is said of a right answer."""
    count, budget = lines(f), BUDGETS[name]
    if count is None:
        return "ok"
    if count > budget:
        return f"ok, but {count} lines are over the budget of {budget}"
    return f"ok, {count} lines of {budget}"


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
    module = imported(path)
    if name == "reference":         # the puzzles stay: their only given answers are in that file
        vars(module).update(vars(REFERENCE))
    return module


def imported(path, seconds=2 * SECONDS):
    """The module in a file, or in words why there is none."""
    try:
        spec = importlib.util.spec_from_file_location("answers", path)
        module = importlib.util.module_from_spec(spec)
        with limited(seconds):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        return f"{path} cannot be imported: {failure(None, e)}"
    return module


def missing(answers, name):
    """What keeps a function from being called, or None."""
    if isinstance(answers, str):
        return answers
    return None if callable(getattr(answers, name, None)) else "this function is missing"


def wrapped(text):
    """A message in lines of at most 100 columns."""
    return textwrap.fill(text, 100, subsequent_indent="    ")


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, answers, pytestconfig, record_property):
    f = getattr(answers, name, None)
    seed, patience = pytestconfig.getoption("--seed"), 1
    if pytestconfig.getoption("--impl") == "reference":
        patience = 10               # the first call of ours may import for seconds
    hint = missing(answers, name) or check(name, f, seed, patience * SECONDS)
    result = hint or praise(name, f)
    record_property("exercise", wrapped(f"{EXERCISES.index(name) + 1} {name}: {result}"))
    if hint:
        pytest.fail(wrapped(f"{name}: {hint}"), pytrace=False)


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
    record_property("puzzle", wrapped(f"{name}: {fault or score}"))
    if fault:
        pytest.fail(wrapped(f"{name}: {fault}"), pytrace=False)
