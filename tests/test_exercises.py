"""Checks the nine exercises of exercises.py against slow specifications in plain Python.

    python -m pytest tests/test_exercises.py                    # the repository's own functions
    python -m pytest tests/test_exercises.py --impl student     # tests/exercises.py: n/9 and hints
    python -m pytest tests/test_exercises.py --impl=path/to/file.py --seed 7 --puzzles

The = keeps pytest from taking the file for one of tests, and from loading a conftest.py beside it.

A wrong answer may equal the specification with one classic mistake in every case. Then the hint is
that mistake's; else it names the first difference. A mistake is written as a change of the
specification's text: what stands there, and what stands there instead. The last part of this file
checks the checks: each specification with a mistake is given as an answer, and has to get the hint
of that mistake. It is skipped where a student's file is checked.
"""
import ast
import copy
import doctest
import functools
import inspect
import math
import random
import runpy
import signal
import textwrap
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import exercise_drawings
import infer
import model as m
import predictor
import prune
import solutions
from support.chat import choose_chat
from support.files import need, read_json
from support.rows import Example, examples
from support.tokenizer import Tokenizer
from support.weights import find

TESTS = Path(__file__).resolve().parent
# Exercise -> how many lines it may have; more are said, and pass.
BUDGETS = {"rotate": 7, "saliency": 6, "ranking_loss": 7, "select": 8, "masked_attention": 10,
           "tokens_per_block": 8, "flops": 8, "decode": 15, "prefill": 16}
# Exercise -> the others that it calls.
CALLS = {"decode": ("rotate",), "prefill": ("tokens_per_block", "select", "rotate")}
EXERCISES = list(BUDGETS)
PUZZLES = ("puzzle_schedule", "puzzle_predictors", "puzzle_scorer")


# -------------------------------------------------------------------------- the specifications
#
# They take one token, one pair or one query at a time.


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def times(W, x):
    """A matrix, a list of rows, times a vector."""
    return [dot(row, x) for row in W]


def turn(x, place, theta):
    """One vector, a list of d numbers, turned to its place."""
    d, out = len(x), list(x)
    for i in range(d // 2):
        angle = place * theta ** (-2 * i / d)
        cos, sin = math.cos(angle), math.sin(angle)
        one, two = i, i + d // 2
        out[one] = x[one] * cos - x[two] * sin
        out[two] = x[two] * cos + x[one] * sin
    return out


def spec_rotate(q, pos, theta):
    places = pos.tolist()
    return [[turn(x, place, theta) for x, place in zip(head, places)] for head in q.tolist()]


def gradient(f, x):
    """The gradient of f at x (n, D) by central differences in double precision."""
    x = x.detach().double()
    g = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = 1e-5
        g.view(-1)[i] = (f(x + step) - f(x - step)) / 2e-5
    return g


def spec_saliency(f, x, reduce):
    found = []
    for g, state in zip(gradient(f, x).tolist(), x.tolist()):
        products = [a * b for a, b in zip(g, state)]
        if reduce == "abs_dot":
            found.append(abs(sum(products)))
        else:
            found.append(math.sqrt(dot(products, products)))
    return found


def spec_ranking_loss(score, saliency):
    n, losses = len(score), []
    for i in range(n):
        for j in range(i + 1, n):
            sign = (saliency[i] - saliency[j]).sign()
            z = -(score[i] - score[j]) * sign
            losses.append(torch.logaddexp(z, torch.zeros(())))
    return sum(losses) / max(1, len(losses))


def spec_select(score, pos, k, N, sink, local):
    scores, places = score.tolist(), pos.tolist()
    last = max(1, math.ceil(local * N - 1e-9))
    ranks = []                      # the smallest survive
    for i, place in enumerate(places):
        protected = place < sink or N - last <= place < N or place >= N
        ranks.append((-math.inf if protected else -scores[i], i))
    kept = [i for _, i in sorted(ranks)[:k]]
    return sorted(kept)


def spec_masked_attention(q, k, v, keep):
    heads, n, d = q.shape
    outputs = []
    for head, i in product(range(heads), range(n)):
        m = i + 1                   # keys that are not later
        a = k[head, :m] @ q[head, i] / math.sqrt(d)
        mask = keep[:m].clone()
        mask[i] = 1
        hidden = mask == 0
        S = a.detach().masked_fill(hidden, -math.inf).logsumexp(0)
        x = a - S
        e = torch.where(hidden, F.logsigmoid(x), x).exp() * mask
        outputs.append(e @ v[head, :m] / e.sum())
    return torch.stack(outputs).view(q.shape)


def spec_tokens_per_block(n, blocks, first, step, stages, keep, sink, local):
    counts, left, s = [], n, 0
    for block in range(1, blocks + 1):
        if s < stages and block == first + step * s + 1:
            s += 1
            last = max(1, math.ceil(local * n - 1e-9))
            protected = min(n, sink + last)
            left = max(protected, round(keep ** s * n))
        counts.append(left)
    return counts


def spec_flops(c, counts, accounting):
    D, W, V = c.dim, c.ffn, c.vocab
    if accounting == "paper":
        paper = 4 * V * D * counts[0]
        for n in counts:
            paper += 2 * n * (4 * D * D + 3 * D * W) + 3 * D * n * n
        return paper
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    matrices = [(D, q), (D, kv), (D, kv), (q, D), (D, W), (D, W), (W, D)]
    total = D * V                   # multiply-adds
    for n in counts:
        total += sum(n * rows * columns for rows, columns in matrices)
        total += 2 * q * sum(range(n + 1))
    return 2 * total


def spec_decode(states, N, blocks, caches, theta):
    """One block after the other; in it one token after the other."""
    states, longer = plain(states), []
    for (Wq, Wk, Wv, Wo), cache in zip(plain(blocks), plain(caches)):
        entries = list(zip(*cache))                         # [(key, value, place)]
        held = len(entries)
        new = [N + t for t in range(len(states))]
        for x, place in zip(states, new):
            key = turn(times(Wk, x), place, theta)
            entries.append((key, times(Wv, x), place))
        for t, x in enumerate(states):
            keys, values, places = zip(*entries[:held + t + 1])
            query = turn(times(Wq, x), new[t], theta)
            e = [math.exp(dot(query, key) / math.sqrt(len(x))) for key in keys]
            mixed = [dot(e, feature) / sum(e) for feature in zip(*values)]
            states[t] = [a + b for a, b in zip(x, times(Wo, mixed))]
        longer.append(list(zip(*entries)))
    return states, longer


def turned(q, pos, theta):
    return torch.tensor(spec_rotate(q, pos, theta))


def spec_prefill(x, blocks, scorer, schedule, theta):
    first, step, _, _, sink, local = schedule
    N, L, caches = len(x), len(blocks), []
    pos, counts = torch.arange(N), spec_tokens_per_block(N, L, *schedule)
    for b, block in enumerate(blocks, start=1):
        entered, (q, k, v) = x, block.project(x)
        q, k = turned(q, pos, theta), turned(k, pos, theta)
        cached, y = k, torch.zeros_like(q)
        keys, values = (each.repeat_interleave(len(q) // len(k), 0) for each in (k, v))
        for i in range(len(x)):     # all heads: one by one takes long
            seen = i + 1
            e = (keys[:, :seen] @ q[:, i, :, None] / math.sqrt(q.shape[2])).exp()
            y[:, i] = (e * values[:, :seen]).sum(1) / e.sum(1)
        caches.append((cached, v, pos))
        x = block.finish(x, y)
        left = counts[min(b, L - 1)]
        if left < len(x):
            s = (b - first) // step + 1
            kept = spec_select(scorer(s, x, pos), pos, left, N, sink, local)
            x, pos = x[kept], pos[kept]
    return x[-1], caches


# ----------------------------------------------------------------------------------- the mistakes

# Exercise -> what its specification calls, if a mistake stands there.
HELPERS = {"rotate": turn, "decode": times}
# Exercise -> [(hint, what stands in its specification, what stands there instead)].
MISTAKES = {
    "rotate": [
        ("the pairs are interleaved (2i, 2i + 1); here feature i goes with feature i + d/2",
         "i, i + d // 2", "2 * i, 2 * i + 1"),
        ("the sine has the wrong sign: the pair turns backwards",
         "math.sin(angle)", "math.sin(-angle)"),
        ("the second feature is computed from the first one's new value; both need the old q",
         "cos + x[one]", "cos + out[one]"),
        ("the tokens are numbered anew 0 ... n - 1; a survivor keeps its original position, pos",
         "pos.tolist()", "range(len(pos))"),
        ("theta is an argument; this is always 10000",
         "place * theta", "place * 10000"),
        ("the exponent of theta is -2 i / d; this is -i / d",
         "-2 * i / d", "-i / d"),
        ("the exponent of theta is -2 i / d; this is -4 i / d: arange(0, d, 2) is 2 i already",
         "-2 * i / d", "-4 * i / d"),
        ("the exponent of theta has the wrong sign: later pairs turn more slowly",
         "-2 * i / d", "2 * i / d"),
        ("the pairs are right, but the result interleaves them: out[i] and out[i + d/2] are a pair",
         "return out", "return [out[i // 2 + i % 2 * (d // 2)] for i in range(d)]"),
    ],
    "saliency": [
        ("norm_gx is the norm of g without x; multiply elementwise by x first",
         "dot(products, products)", "dot(g, g)"),
        ("norm_gx is not the norm but its square: the root is missing",
         "math.sqrt(dot(products, products))", "dot(products, products)"),
        ("norm_gx is not norm(g) * norm(x): multiply g and x elementwise, then take one norm",
         "dot(products, products)", "dot(g, g) * dot(state, state)"),
        ("abs_dot sums absolute values; it is the absolute value of the sum over features",
         "abs(sum(products))", "sum(map(abs, products))"),
        ("abs_dot has no absolute value: a strongly negative token would rank last",
         "abs(sum(products))", "sum(products)"),
        ("abs_dot takes the mean over features; it is their sum",
         "abs(sum(products))", "abs(sum(products)) / len(g)"),
        ("\"abs_dot\" and \"norm_gx\" are swapped",
         "reduce == ", "reduce != "),
        ("reduce is not looked at: this is always \"abs_dot\"",
         "reduce == ", "True or "),
        ("reduce is not looked at: this is always \"norm_gx\"",
         "reduce == ", "False and "),
        ("an earlier gradient is added: backward() adds to x.grad; differentiate a detached copy",
         "gradient(f, x)", "(gradient(f, x) + (0 if x.grad is None else x.grad))"),
    ],
    "ranking_loss": [
        ("the sign of the saliency difference is missing: this wants the earlier token on top",
         "(saliency[i] - saliency[j]).sign()", "1"),
        ("the sign is turned round: the loss wants the less salient token on top",
         "saliency[i] - saliency[j]", "saliency[j] - saliency[i]"),
        ("the saliencies' difference is multiplied in; Eq. 6 takes its sign alone",
         ".sign()", ""),
        ("this is the sum over pairs, which grows with n squared; divide by the number of pairs",
         " / max(1, len(losses))", ""),
        ("the sum is divided by all n * n entries; divide by the number of pairs",
         "max(1, len(losses))", "n ** 2"),
        ("twice too large: each pair is counted as i, j and as j, i, but divided by once",
         "return ", "return 2 * "),
        ("pairs i = j are counted too, each with log 2; only i < j are pairs",
         "range(i + 1, n)", "range(i, n)"),
        ("all n * n ordered pairs are averaged, i = j among them; only i < j are pairs",
         "range(i + 1, n)", "range(n)"),
        ("pairs of equal saliency are left out; sign(0) = 0, so they count log 2 each",
         "losses.append", "if sign: losses.append"),
        ("equal saliencies count as i below j; sign(0) = 0, so such a pair counts log 2",
         ".sign()", ".sign() or -1"),
        ("exp overflows at large score differences; use softplus, or logaddexp",
         "torch.logaddexp(z, torch.zeros(()))", "(1 + z.exp()).log()"),
        ("without any pair the result is 0, not 0 / 0",
         "max(1, len(losses))", "torch.tensor(len(losses))"),
        ("the loss is right, but no gradient reaches score: no detach, no .item(), no no_grad",
         "(score[i] - score[j])", "(score[i] - score[j]).detach()"),
    ],
    "select": [
        ("the right tokens, but not in increasing order: causal attention needs reading order",
         "sorted(kept)", "kept"),
        ("the right tokens, but in the order of their scores; causal attention needs reading order",
         "sorted(kept)", "kept[::-1]"),
        ("these are positions; wanted are indices into the n tokens that are left",
         "sorted(kept)", "[places[i] for i in sorted(kept)]"),
        ("the lowest scores are kept; it is the highest",
         "else -scores", "else scores"),
        ("among equal scores the earlier token wins: argsort with stable=True, topk is not stable",
         "sorted(ranks)[:k]",
         "enumerate((-torch.tensor(ranks)[:, 0]).topk(k).indices.tolist())"),
        ("the protected are never kept; they come first, the best of the others fill up",
         "-math.inf if", "math.inf if"),
        ("k are kept beside the protected; k counts the protected too",
         "[:k]", "[:k + sum(rank == -math.inf for rank, _ in ranks)]"),
        ("the first `sink` positions are not protected",
         "place < sink or ", ""),
        ("the sinks are taken by index; they are the tokens at positions below sink",
         "place < sink", "i < sink"),
        ("the last positions of the prompt are not protected",
         "N - last <= place < N or ", ""),
        ("one local token too many: protected are the last max(1, ceil(...)) positions",
         "N - last <=", "N - last - 1 <="),
        ("the last are taken by index; protected are the last positions, and the whole response",
         "N - last <= place < N or place >= N", "i >= len(places) - last"),
        ("tokens after the prompt are not protected",
         " or place >= N", ""),
        ("the local share is rounded down; it is ceil(local * N - 1e-9)",
         "math.ceil(local * N - 1e-9)", "int(local * N)"),
        ("ceil without the - 1e-9: 0.07 * 100 = 7.000000000000001 then counts as 8",
         " - 1e-9", ""),
        ("the local share is taken of the n tokens that are left; it is a share of the prompt",
         "local * N", "local * len(places)"),
    ],
    "masked_attention": [
        ("a dropped query does not see itself: the mask's diagonal is 1",
         "mask[i] = 1", "pass"),
        ("the mask comes after the softmax: the weights no longer sum to 1; mask before it",
         "e @ v[head, :m] / e.sum()", "(a.softmax(0) * mask) @ v[head, :m]"),
        ("the mask comes after the softmax, on its weights or on v; mask the exponentials",
         "e @ v[head, :m] / e.sum()", "(a.softmax(0) * keep[:m]) @ v[head, :m]"),
        ("the mask multiplies the logits, and exp(0) is 1; multiply the exponentials",
         "e @ v[head, :m] / e.sum()", "(a * mask).softmax(0) @ v[head, :m]"),
        ("keep_i * keep_j hides all keys from a dropped query too; m_ij is keep_j alone",
         "keep[:m].clone()", "keep[:m] * keep[i]"),
        ("the mask hides queries (rows of the matrix); it has to hide keys (columns)",
         "keep[:m].clone()", "keep[i].repeat(m)"),
        ("the mask is turned round: keep holds 1.0 for kept tokens",
         "keep[:m].clone()", "1 - keep[:m]"),
        ("later keys are seen: only j <= i",
         "i + 1", "n"),
        ("the logits are not divided by sqrt(d)",
         " / math.sqrt(d)", ""),
        ("a hidden key's logit hundreds above the others gives nan: S, or the largest logit, is "
         "that of the seen keys alone, and a hidden key takes sigmoid(x), as its exp(x) is inf",
         "torch.where(hidden, F.logsigmoid(x), x)", "x"),
        ("exp(a) overflows at large logits: subtract S_i first; a hidden key takes sigmoid(x)",
         "torch.where(hidden, F.logsigmoid(x), x)", "a"),
        ("outputs and the gradient in keep are right, but q and k get nan: a branch that "
         "torch.where did not take gives 0 * inf; choose before the exponential",
         "torch.where(hidden, F.logsigmoid(x), x).exp()",
         "torch.where(hidden, x.sigmoid(), x.exp())"),
        ("the outputs are right, but no gradient reaches keep: multiply the exponentials by the "
         "mask itself; no -inf, no keep > 0, no detach",
         "keep[:m].clone()", "keep[:m].detach().clone()"),
        ("the outputs are right, but a dropped key's gradient is not: a hidden key's e_ij is "
         "sigmoid(x_ij) * m_ij, with x_ij = a_ij - S_i",
         "torch.where(hidden, F.logsigmoid(x), x)", "x.clamp(max=0)"),
    ],
    "tokens_per_block": [
        ("off by one: the block after a stage's own is the first to see fewer tokens, not its own",
         "step * s + 1", "step * s"),
        ("off by one: the block right after a stage's own sees fewer tokens already",
         "step * s + 1", "step * s + 2"),
        ("keep ** s is taken of what is left; it is a share of the whole prompt",
         "keep ** s * n", "keep ** s * left"),
        ("each stage rounds a share of a rounded count; it is round(keep ** s * n), of the prompt",
         "keep ** s * n", "keep * left"),
        ("the share is cut to a whole number; round it",
         "round(", "int("),
        ("the counts fall below the protected tokens",
         "max(protected, round(keep ** s * n))", "round(keep ** s * n)"),
        ("the protected are added to the share; it is the larger of the two",
         "max(protected, round(keep ** s * n))", "min(n, protected + round(keep ** s * n))"),
        ("the larger of sinks and local tokens is protected; both are: sink + max(1, ...)",
         "sink + last", "max(sink, last)"),
        ("the sinks are not counted among the protected: sink + max(1, ...)",
         "sink + last", "last"),
        ("the local tokens are not counted among the protected: sink + max(1, ...)",
         "sink + last", "sink"),
        ("more tokens than the prompt has: the protected are never more than n",
         "min(n, sink + last)", "sink + last"),
        ("the local share is rounded down; it is ceil(local * n - 1e-9)",
         "math.ceil(local * n - 1e-9)", "int(local * n)"),
        ("ceil without the - 1e-9: 0.07 * 100 = 7.000000000000001 then counts as 8",
         " - 1e-9", ""),
        ("at least one local token is protected, even where local is 0",
         "max(1, ", "max(0, "),
        ("the local share is taken of what is left; it is a share of the prompt",
         "local * n", "local * left"),
    ],
    "flops": [
        ("exact: k and v are counted for every query head; there are n_kv_heads of each",
         "c.n_kv_heads", "c.n_heads"),
        ("exact: all n * n pairs are counted; causal attention has n (n + 1) / 2",
         "sum(range(n + 1))", "n * n"),
        ("exact: the head is counted for every token; a prefill needs it on the last one alone",
         "total = D * V", "total = D * V * counts[0]"),
        ("exact: half of it; a multiply-add is 2 FLOPs",
         "2 * total", "total"),
        ("exact: SwiGLU has three matrices, gate, up and down",
         "(D, W), (D, W)", "(D, W)"),
        ("exact: q and o are counted as D x D; they are D x H d, and H d need not be D",
         "[(D, q), (D, kv), (D, kv), (q, D)", "[(D, D), (D, kv), (D, kv), (D, D)"),
        ("exact: attention has two products per pair, q . k and the weighted sum of v; this is one",
         "2 * q * ", "q * "),
        ("every block is counted with the whole prompt; counts[i] tokens enter block i",
         "D, W, V =", "counts = counts[:1] * len(counts); D, W, V ="),
        ("paper: Table 2's accounting ignores the grouping, each of q, k, v, o counts D x D",
         "4 * D * D", "2 * D * (D + c.n_kv_heads * c.head_dim)"),
        ("paper: attention counts 3 D per pair, not the 4 D of two products",
         "3 * D * n * n", "4 * D * n * n"),
        ("paper: all n * n pairs are counted, not the causal half",
         "3 * D * n * n", "3 * D * n * (n + 1) // 2"),
        ("paper: 4 V D is counted for every token of the prompt, counts[0] times",
         "4 * V * D * counts[0]", "4 * V * D"),
    ],
    "decode": [
        ("the position is the cache's length; decode goes on at N + t, in every block",
         "N + t for", "held + t for"),
        ("every new token stands at N; the t-th stands at N + t",
         "N + t for", "N for"),
        ("a new token does not see itself: put it into the cache before attending",
         "held + t + 1", "held + t"),
        ("a new token does not see the new ones before it: the caches have to grow",
         "entries[:held + t + 1]", "entries[:held] + [entries[held + t]]"),
        ("a new token sees the ones after it: they come one by one",
         "entries[:held + t + 1]", "entries"),
        ("the cached keys are turned again; they already stand at their own positions",
         "list(zip(*cache))", "[(turn(k, p, theta), v, p) for k, v, p in zip(*cache)]"),
        ("the new key is not turned to its position, only the query is",
         "turn(times(Wk, x), place, theta)", "times(Wk, x)"),
        ("the query is not turned to its position, only the key is",
         "turn(times(Wq, x), new[t], theta)", "times(Wq, x)"),
        ("the value is turned too; only q and k are",
         "times(Wv, x)", "turn(times(Wv, x), place, theta)"),
        ("the matrices are transposed: Wq @ x for one state x, and x @ Wq.T for rows of states",
         "for row in W]", "for row in zip(*W)]"),
        ("the state itself is lost: x + Wo @ ..., not Wo @ ... alone",
         "[a + b for a, b in zip(x, times(Wo, mixed))]", "times(Wo, mixed)"),
        ("Wo is left out: x + Wo @ (sum of p * value)",
         "times(Wo, mixed)", "mixed"),
        ("the logits are not divided by sqrt(D)",
         " / math.sqrt(len(x))", ""),
    ],
    "prefill": [
        ("the survivors are numbered anew 0 ... k - 1; each keeps its original position",
         "pos[kept]", "torch.arange(len(kept))"),
        ("off by one: the block after a stage's own is the first to see fewer tokens",
         "min(b, L - 1)", "b - 1"),
        ("off by one: the drop comes a block early, so that a stage's own block sees fewer tokens",
         "min(b, L - 1)", "min(b + 1, L - 1)"),
        ("the states that enter a stage's block are scored; it is those that leave it",
         "scorer(s, x, ", "scorer(s, entered, "),
        ("s counts from 0; the first stage is 1",
         "// step + 1", "// step"),
        ("s is the block; it is the number of the stage: 1 after block first, 2 after first + step",
         "(b - first) // step + 1", "b"),
        ("s counts the drops; a stage where nothing is dropped has its number all the same",
         "(b - first) // step + 1", "len({*counts[:b]})"),
        ("select is told how many tokens are left; its N is the length of the prompt",
         "left, N, sink", "left, len(x), sink"),
        ("select is told indices, 0 ... n - 1; it wants the tokens' original positions",
         "pos), pos, left", "pos), torch.arange(len(x)), left"),
        ("a block's cache holds the tokens that entered it, not those that its stage left",
         "x, pos = ", "caches[-1] = k[:, kept], v[:, kept], pos[kept]\n            x, pos = "),
        ("the keys in the caches are not turned to their positions; decode wants them turned",
         "cached, y = k", "cached, y = block.project(x)[1]"),
        ("the keys are not turned to their positions, only the queries are",
         "turned(k, pos, theta)", "k"),
        ("the queries are not turned to their positions, only the keys are",
         "turned(q, pos, theta)", "q"),
        ("the values are turned too; only q and k are",
         "cached, y = k", "v = turned(v, pos, theta)\n        cached, y = k"),
        ("later keys are seen: query i sees the keys j <= i (is_causal)",
         "i + 1", "len(x)"),
        ("the heads are paired by h % G; head h of q reads head h // (H // G): repeat_interleave",
         "repeat_interleave(len(q) // len(k), 0)", "repeat(len(q) // len(k), 1, 1)"),
        ("the logits are not divided by sqrt(d)",
         " / math.sqrt(q.shape[2])", ""),
        ("the first token's state is returned; the answer follows from the last one's",
         "x[-1]", "x[0]"),
        ("nothing is dropped: every block sees, and caches, the whole prompt",
         "x, pos = x[kept]", "pass  # "),
    ],
}


def specification(name, old="def spec_", new="def spec_"):
    """The specification of an exercise, with a change of its text -> a function."""
    functions = [HELPERS.get(name), globals()[f"spec_{name}"]]
    text, scope = "".join(map(inspect.getsource, filter(None, functions))), dict(globals())
    before, after = text.split(old)         # it stands there once
    exec(before + new + after, scope)
    return scope[f"spec_{name}"]


# ----------------------------------------------------------------------------------- the cases
#
# cases_NAME(g) yields (what is special, the arguments), drawn from the generator g.


def normal(g, *shape):
    return torch.randn(*shape, generator=g).clamp(-2, 2)


def whole(g, low, high):
    """A whole number from low to high, both included."""
    return torch.randint(low, high + 1, (1,), generator=g).item()


def draw_places(g, n, end, always=()):
    """n positions below `end`, increasing, with the ones in `always` among them: (n,)."""
    first = torch.rand(end, generator=g)
    first[list(always)] = 2
    return first.topk(n).indices.sort().values


def cases_rotate(g):
    yield "gaps", (normal(g, 3, 5, 8), draw_places(g, 5, 24), float(whole(g, 20, 90)))
    yield "one token, one pair", (normal(g, 1, 1, 2), draw_places(g, 1, 24), 100.0)


def interacting(g):
    """A scalar function of a state (5, 3) in which every token acts on every other."""
    W, mix, c = normal(g, 3, 3), normal(g, 5, 5), normal(g, 5, 3)
    return lambda x: (torch.tanh(mix.to(x) @ x @ W.to(x)) * c.to(x)).sum()


def cases_saliency(g):
    for reduce in ("norm_gx", "abs_dot"):
        x = normal(g, 5, 3)
        x[1] = 0
        yield "tokens that interact, one of them zero", (interacting(g), x, reduce)
        x = normal(g, 5, 3).requires_grad_()
        x.grad = normal(g, 5, 3)
        yield "an x.grad of earlier work", (interacting(g), x, reduce)


def cases_ranking_loss(g):
    yield "six tokens", (normal(g, 6), normal(g, 6).exp())
    yield "equal saliencies", (normal(g, 7), torch.tensor([3.0, 1, 1, 3, 2, 1, 3]))
    far_apart = normal(g, 4) - 300 * torch.arange(4)
    yield "score differences of hundreds", (far_apart, torch.arange(4.0))
    yield "one token, so no pair", (normal(g, 1), normal(g, 1).exp())


def cases_select(g):
    low = normal(g, 17)
    low[:4] = low[-4:] = -9
    pos = draw_places(g, 17, 31, [*range(4), *range(27, 31)])
    yield "the protected have the lowest scores", (low, pos, 12, 31, 4, 0.1)
    score = torch.randint(0, 3, (30,), generator=g).float()
    score[[4, -5, -4]] = -9         # of these -4 alone is protected: 0.12 * 30 = 3.6
    yield "few different scores", (score, torch.arange(30), whole(g, 12, 20), 30, 4, 0.12)
    pos = draw_places(g, 20, 33, [0, 29, 30, 31, 32])
    yield "a response after the prompt, local 0", (torch.zeros(20), pos, 9, 30, 1, 0.0)
    # the protected alone: two, and seven of the prompt, as 0.07 * 100 = 7.000000000000001
    pos = draw_places(g, 40, 100, [0, 1, *range(92, 100)])
    yield "all scores equal", (torch.zeros(40), pos, 9, 100, 2, 0.07)
    score, pos = normal(g, 13), torch.tensor([0, 2, *range(5, 23, 2), 26, 29])
    score[[2, -3, -2]] = -9         # no sink, and not local
    yield "no token at some protected positions", (score, pos, 8, 30, 3, 0.1)


def cases_masked_attention(g):
    def draw(keep):
        n = len(keep)
        q, k, v = normal(g, 2, n, 4), normal(g, 2, n, 4), normal(g, 2, n, 4)
        return q, k, v, torch.tensor(list(map(float, keep)))

    yield "some tokens dropped", draw("0101101")
    yield "nothing dropped", draw("1111")
    q, k, v, keep = draw("0111")
    q[..., 0] = 1
    k[:, 0] = torch.tensor([400.0, 0, 0, 0])        # for every query; divided by sqrt(4)
    yield "a hidden key's logit 200 above the others", (q, k, v, keep)


def cases_tokens_per_block(g):
    for n in 1000, whole(g, 400, 4000):
        yield "the paper's schedule", (n, 32, 4, 3, 10, 0.9, 4, 0.1)
    yield "stages past the last block", (whole(g, 80, 120), 6, 2, 2, 9, 0.7, 2, 0.05)
    for n, local in (53, 0.1), (57, 0.1), (20, 0.3):        # 5.3, 5.7 and 6 local tokens
        yield "the share falls below the protected", (n, 7, 1, 1, 5, 0.3, 4, local)
    yield "0.07 * 100 is 7.000000000000001", (100, 5, 1, 1, 3, 0.1, 2, 0.07)
    yield "a prompt shorter than what is protected", (whole(g, 2, 4), 5, 1, 1, 3, 0.5, 4, 0.1)
    yield "halves", (50, 4, 1, 1, 1, 0.25, 0, 0.1)
    yield "local 0, strong pruning", (20, 5, 1, 1, 3, 0.1, 0, 0.0)


def cases_flops(g):
    # dim and ffn are prime: no two mistakes leave out, or add, the same product
    small = m.Config(dim=17, n_blocks=5, n_heads=6, n_kv_heads=2, head_dim=5, ffn=31,
                     vocab=whole(g, 50, 90))
    counts = [20, 20, whole(g, 12, 18), whole(g, 6, 10)]
    yield "exact, grouped heads, dwindling counts", (small, counts, "exact")
    yield "paper, dwindling counts", (small, counts, "paper")


def cases_decode(g):
    for D, N, T, held in (4, 9, 1, [5]), (6, 14, 3, [9, 6, 2]):
        blocks, caches = [], []
        for n in held:
            blocks.append(tuple(normal(g, D, D) * 0.5 for _ in range(4)))
            caches.append((normal(g, n, D), normal(g, n, D), draw_places(g, n, N - 1)))
        yield f"{T} new, {held} in the caches", (normal(g, T, D), N, blocks, caches, 100.0)


def cases_prefill(g):
    model = solutions.llama(4, 40.0, dim=8, n_blocks=4, n_heads=4, n_kv_heads=2, ffn=7)
    for p in model.parameters():
        p.data = normal(g, *p.shape) * (0.6 if p.dim() > 1 else 1)
    w = normal(g, 6, 8)

    def scorer(s, x, pos):
        return x @ w[s]

    def changing(s, x, pos):
        return (-1) ** s * (x @ w[0])

    def late_ones_last(s, x, pos):
        return x @ w[s] + 5 * (pos - 20) * (pos > 9)
    for label, n, scorer, schedule in (
            ("two stages", 11, scorer, (2, 1, 2, 0.6, 1, 0.1)),
            ("late tokens come last", 15, late_ones_last, (2, 1, 2, 0.85, 1, 0.1)),
            ("a stage that drops nothing", 20, changing, (2, 1, 2, 0.98, 1, 0.1))):
        yield label, (normal(g, n, 8), parts(model), scorer, schedule, 40.0)


def parts(model):
    """The blocks of a Llama as exercise 9 has them."""
    def made(block):
        def project(x):
            h = block.attn_norm(x)
            return tuple(W(h).unflatten(-1, (-1, block.c.head_dim)).transpose(0, 1)
                         for W in (block.q, block.k, block.v))

        def finish(x, y):
            return block.feed_forward((x + block.o(y.transpose(0, 1).flatten(1)))[None])[0]
        return SimpleNamespace(project=project, finish=finish)
    return list(map(made, model.blocks))


# ------------------------------------------------------- the check: run, compare, find the mistake

# Exercise -> its differentiable arguments: training takes the gradient of the result in them.
DIFFERENTIABLE = {"ranking_loss": (0,), "masked_attention": (3, 0, 1)}
# Exercise -> the names of its result's parts, for messages.
PARTS = {"ranking_loss": ("the loss", "the gradient in score"), "decode": ("states", "caches"),
         "prefill": ("the last token's state", "caches"),
         "masked_attention": ("the output", "the gradient in keep", "the gradient in q",
                              "the gradient in k")}
# Exercise -> what its result is made of, if not one tensor of float32; see `kind`.
CACHED = ("tuple of (torch.float32 tensor, list of (tuple of "
          "(torch.float32 tensor, torch.float32 tensor, torch.int64 tensor)))")
FORMS = {"tokens_per_block": "list of (int)", "flops": "int", "select": "torch.int64 tensor",
         "decode": CACHED, "prefill": CACHED}
SECONDS = 10                        # that a call may take


def plain(value):
    """Tensors, tuples and lists -> nested lists of numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value


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
    """Call an answer, or a specification -> its result, and the parts (see PARTS) in plain lists.

    Gradients are those of the sum of the result's numbers, each times a fixed weight.
    """
    args, at = list(args), DIFFERENTIABLE.get(name, ())
    for i in at:
        args[i] = args[i].clone().requires_grad_()
        args[i].grad = torch.zeros_like(args[i])
    with torch.set_grad_enabled(name != "saliency"):
        out = f(*args)
    if name in CALLS:
        return out, plain(out) if isinstance(out, (tuple, list)) else [plain(out), None]
    if at and getattr(out, "requires_grad", False):
        (out * torch.linspace(1, -1, out.numel()).view(out.shape)).sum().backward()
    return out, [plain(out), *(plain(args[i].grad) for i in at)]


def differences(name, parts, wanted, tolerance):
    """Where the parts of two results differ: {the part's index: its first difference in words}."""
    names = PARTS.get(name, ("the result",))
    found = [difference(*each, tolerance) for each in zip(names, parts, wanted)]
    return {i: fault for i, fault in enumerate(found) if fault}


def difference(where, got, want, tolerance):
    """The first difference in words, or None. Of inf and nan one is as good as the other."""
    if isinstance(want, list):
        entries = len(got) if isinstance(got, list) else "no"
        if entries != len(want):
            return f"{where} has {entries} entries instead of {len(want)}"
        found = (difference(f"{where}[{i}]", got[i], want[i], tolerance) for i in range(len(want)))
        return next(filter(None, found), None)
    if not isinstance(got, (int, float)):
        return f"{where} is {got!r:.40} instead of a number"
    if math.isfinite(want):
        same = abs(got - want) <= tolerance * max(1, abs(want))
    else:
        same = not math.isfinite(got)
    return None if same else f"{where} is {got:.6g} instead of {want:.6g}"


@functools.cache
def cases(name, seed):
    g = torch.Generator().manual_seed(seed)
    return list(globals()[f"cases_{name}"](g))


@functools.cache
def told(name, seed, case, *change):
    """The parts that the specification, maybe with a change of its text, says in one case."""
    return run(name, specification(name, *change), cases(name, seed)[case][1])[1]


def check(name, f, seed=0, seconds=SECONDS):
    """None if f solves the exercise on the cases of this seed, else one line with what is wrong."""
    tolerance = {"flops": 1e-12, "prefill": 1e-4}.get(name, 1e-5)
    results, wrong, first = [], [], None
    for case, (label, args) in enumerate(cases(name, seed)):
        given = copy.deepcopy(args)
        try:
            with limited(seconds):
                out, parts = run(name, f, given)
        except NotImplementedError:
            return "not written yet"
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            return f"case '{label}': {failure(name, e)}"
        results.append(parts)
        faults = differences(name, parts, told(name, seed, case), tolerance)
        wrong += faults
        fault = faults[min(faults)] if faults else wrong_form(name, out, given, args)
        first = first or fault and f"case '{label}': {fault}"
    for hint, *change in MISTAKES[name] if wrong else ():
        wanted = (told(name, seed, case, *change)[:min(wrong) + 1] for case in range(len(results)))
        pairs = zip(results, wanted)
        if not any(differences(name, *pair, 10 * tolerance) for pair in pairs):
            return hint
    return first


def wrong_form(name, out, given, args):
    """What is wrong with a result whose numbers are right, in words, or None."""
    form = FORMS.get(name, "torch.float32 tensor")
    if kind(out) != form:
        return f"the numbers are right, but it is a {kind(out)} instead of a {form}"
    if name == "saliency" and out.requires_grad:
        return "the numbers are right, but it carries a graph: detach it"
    if list(map(trace, given)) != list(map(trace, args)):
        return ("the result is right, but an input was changed: its numbers, its requires_grad or "
                "its grad; take a copy, x.detach().clone()")
    return None


def kind(value):
    """What a value is made of, in words; a list's elements of one kind are said once."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} tensor"
    name = type(value).__name__
    if not isinstance(value, (list, tuple)):
        return name
    parts = list(map(kind, value))
    return f"{name} of ({', '.join(dict.fromkeys(parts) if isinstance(value, list) else parts)})"


def trace(value):
    """All of an input that a call may not change."""
    grad = getattr(value, "grad", None)
    return plain(value), plain(grad), getattr(value, "requires_grad", None)


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


# ---------------------------------------------------------------------------- lines and budgets


def praise(name, source):
    """What is said of a right answer, a function in the text of a module.

    The lines of the helpers that it calls count too, those of other exercises do not.
    """
    nodes = ast.parse(source).body
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        return "ok"
    used, count, budget = [name], 0, BUDGETS[name]
    for each in used:               # it grows
        nodes = list(ast.walk(functions[each]))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        used += names & set(functions) - {*EXERCISES, *used}
        count += sum(map(lines, nodes[1:]))
    if count > budget:
        return f"ok, but {count} lines are over the budget of {budget}"
    return f"ok, {count} lines of {budget}"


def lines(node):
    """How many lines a node of a syntax tree counts: only statements do, but no docstrings."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if text or not isinstance(node, ast.stmt):
        return 0
    return math.ceil(len(ast.unparse(node).splitlines()[0]) / 100)


REFERENCE = {name: getattr(solutions, name) for name in EXERCISES}


# ------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def answers(pytestconfig):
    """Name -> the function under test, or a str, what is wrong with it."""
    impl = pytestconfig.option.impl
    found = imported(TESTS / "exercises.py" if impl in ("reference", "student") else impl)
    # the puzzles stay: their only given answers are in that file
    return {**found, **REFERENCE} if impl == "reference" else found


def imported(path, seconds=2 * SECONDS):
    """What a file of Python defines, or every name with what is wrong with the file."""
    try:
        with limited(seconds):
            return runpy.run_path(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        fault = f"{path} cannot be imported: {failure(None, e)}"
        return dict.fromkeys([*EXERCISES, *PUZZLES], fault)


def conclude(record_property, what, line, fault):
    """Record a line for the summary (see exercise_report.py), and fail where there is a fault."""
    first, *drawing = line.split("\n")
    line = "\n".join([textwrap.fill(first, 100, subsequent_indent="    "), *drawing])
    record_property(what, line)
    if fault:
        pytest.fail(line, pytrace=False)


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, answers, pytestconfig, record_property):
    option, f = pytestconfig.option, answers.get(name, "this function is missing")
    # our own first call may import for seconds
    seconds = SECONDS if option.impl != "reference" else 10 * SECONDS
    story, students = [], option.impl != "reference"
    with lending(name, f, option.seed) as lent:
        fault = check(name, f, option.seed, seconds) if callable(f) else f
        result = fault or praise(name, Path(answers["__file__"]).read_text(encoding="utf-8"))
        if students and not fault:
            result += f" (with our {lent})" * bool(lent)
            draw = getattr(exercise_drawings, name, None)
            story = [inspect.getdoc(draw), *draw(f)] if draw else read_story(f)
    line = "\n    ".join([f"{EXERCISES.index(name) + 1} {name}: {result}", *story])
    conclude(record_property, "exercise", line, fault)


@contextmanager
def lending(name, f, seed):
    """Right helpers for those of a student's that are wrong -> their names: a mistake costs the
    exercise where it was made, and not those that call it.
    """
    scope = getattr(inspect.unwrap(f), "__globals__", {})   # not those of torch.no_grad
    mine = {each: scope.get(each) for each in CALLS.get(name, ())}
    wrong = {each: helper for each, helper in mine.items() if check(each, helper, seed)}
    scope.update({each: REFERENCE[each] for each in wrong})
    yield ", ".join(wrong)
    scope.update(wrong)


def read_story(f):
    """The toy's story, read by a student's prefill: what is left of each fact, and the answers."""
    root, told = find("toy"), read_json(find("toy") / "demo.json")
    model, tokenizer = m.load("toy", device="cpu"), Tokenizer(root)
    predictors, metadata = prune.load_predictors(root, model)
    ids = tokenizer.encode(told["text"])

    def scorer(s, x, pos):
        return predictor.score(predictors[s - 1](x[None], pos[None]))[0]
    with torch.no_grad():
        x = model.embed(torch.tensor(ids))
        _, found = f(x, parts(model), scorer, (*metadata["schedule"].values(),),
                     model.config.rope_theta)
    caches = [m.KVCache(model.config, len(pos) + 40, x) for _, _, pos in found]
    for cache, (k, v, pos) in zip(caches, found):
        cache.append(k[None], v[None], pos[None])
    kept, pieces = {*found[-1][2].tolist()}, tokenizer.pieces(ids)
    lines = [f"It reads a story of {len(ids)} tokens. {len(kept)} are in the last cache; a dot is "
             "one that is not:"]
    for question, fact in told["questions"]:
        words = tokenizer.encode(fact, bos=False)
        start = next(i for i in range(len(ids)) if ids[i:i + len(words)] == words)
        around = range(start - 6, start + len(words) + 6)
        lines.append("".join(pieces[i] if i in kept else "\u00b7" for i in around).strip())
        asked = torch.tensor([tokenizer.encode(question, bos=False)])
        said = infer.ask(model, asked, len(ids), caches, 8)
        text = tokenizer.decode(said.tokens[:-1] if said.ended else said.tokens)
        lines.append(f"    {question} {text} ({'right' if text == fact else 'wrong'})")
    return lines


# ---------------------------------------------------------------- the open puzzles: only a score


@pytest.fixture(scope="module")
def toy(pytestconfig):
    """The frozen toy with its trained predictors, their schedule, rows to train and measure on.

    Seed 0 measures on the held-out rows, any other seed on fresh stories of the same kind.
    """
    if not pytestconfig.option.puzzles:
        pytest.skip("--puzzles prints the scores")
    root, seed = find("toy"), pytestconfig.option.seed
    tokenizer, chat, path = Tokenizer(root), choose_chat(root, "plain"), root / "train.jsonl"
    model = m.load("toy", device="cpu")
    predictors, metadata = prune.load_predictors(root, model)
    rows = fresh_rows(tokenizer, seed) if seed else examples(tokenizer, path, "heldout", chat)

    def cost(schedule=prune.UNPRUNED, scorer=None):
        """NLL per answer token of the rows measured on."""
        found = [prune.nll(model, row.tokens[None], row.prompt_len, schedule, scorer)
                 for row in rows]
        return torch.cat(found).mean().item()

    return SimpleNamespace(model=model, predictors=predictors, rows=rows, cost=cost,
                           schedule=prune.Schedule(**metadata["schedule"]),
                           training=examples(tokenizer, path, "train", chat))


def fresh_rows(tokenizer, seed):
    from checkpoints.toy import fresh_prompt
    rng = random.Random(seed)
    prompts = [fresh_prompt(rng, tokenizer, 1500) for _ in range(20)]
    return [Example(tokens[0], prompt_len) for tokens, prompt_len, _ in prompts]


def score_puzzle_schedule(f, toy):
    schedule, L = f(), len(toy.model.blocks)
    shares = [sum(schedule.counts(row.prompt_len, L)) / row.prompt_len for row in toy.rows]
    used = sum(shares) / len(shares) / L
    need(used <= 0.5, f"{used:.1%} of the tokens enter a block on average, at most 50% may")
    need(schedule.sink == 4 and schedule.local == 0.1, "sink has to be 4 and local 0.1")

    def scorer(s, x, pos):          # the module of the stage's own block, there is none of block 1
        at = schedule.after(L)[s - 1] - toy.schedule.first
        return predictor.score(toy.predictors[max(0, at)](x, pos))

    cost = toy.cost(schedule, scorer)
    return f"NLL {cost:.4f} at {used:.1%} of the tokens (unpruned {toy.cost():.4f})"


def score_puzzle_predictors(f, toy):
    modules = f(copy.deepcopy(toy.predictors), toy.model, toy.training)
    # by identity: what stands in several places counts once
    held = {part for module in modules for part in (*module.parameters(), *module.buffers())}
    numbers = sum(part.numel() for part in held)
    x, pos = torch.randn(1, 9, toy.model.config.dim), torch.arange(9)[None]
    for module in modules:
        first = module(x[:, :4], pos[:, :4])
        need(torch.allclose(module(x, pos)[:, :4], first, atol=1e-4),
             "a token's logits depend on other tokens")
    cost = toy.cost(toy.schedule, prune.predictor_scorer(modules))
    trained = toy.cost(toy.schedule, prune.predictor_scorer(toy.predictors))
    need(cost <= trained + 0.1, f"{numbers} numbers, but NLL {cost:.4f}; at most "
                                f"{trained + 0.1:.4f} is allowed, 0.1 above the trained ones")
    return f"{numbers} numbers, NLL {cost:.4f} (trained {trained:.4f}, at most 0.1 more)"


def score_puzzle_scorer(f, toy):
    cost = toy.cost(toy.schedule, f(toy.model))
    trained = toy.cost(toy.schedule, prune.predictor_scorer(toy.predictors))
    return f"NLL {cost:.4f} (trained predictors {trained:.4f}, unpruned {toy.cost():.4f})"


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzle(name, answers, toy, record_property):
    f, score = answers.get(name, "this function is missing"), None
    try:
        need(callable(f), f)
        score = globals()[f"score_{name}"](f, toy)
    except Exception as e:
        fault = str(e) if isinstance(e, ValueError) else failure(name, e)
    conclude(record_property, "puzzle", f"{name}: {score or fault}", not score)


# ------------------------------------------------------------------------ the checks are checked

ours = pytest.mark.skipif("config.option.impl != 'reference'", reason="checks the checks")


@ours
@pytest.mark.parametrize("name", EXERCISES)
def test_each_mistake_gets_its_own_hint(name):
    for hint, old, new in MISTAKES[name]:
        wrong = specification(name, old, new)
        assert [check(name, wrong, seed) for seed in range(2)] == [hint] * 2, hint


def raises(exception):
    def f(*args):
        raise exception
    return f


def but(name, change):
    """The reference with its result changed."""
    return lambda *args: change(REFERENCE[name](*args))


@ours
@pytest.mark.parametrize("name, f, words", [
    ("flops", lambda *args: 7, "case 'exact, grouped heads, dwindling counts': the result is 7 "),
    ("flops", but("flops", float), "the numbers are right, but it is a float instead of a int"),
    ("rotate", lambda q, *rest: q.copy_(solutions.rotate(q, *rest)), "but an input was changed"),
    ("saliency", lambda f, x, reduce: solutions.saliency(f, x.requires_grad_(), reduce),
     "the result is right, but an input was changed"),
    ("masked_attention", lambda q, *rest: solutions.masked_attention(q.detach(), *rest),
     "the gradient in q[0]"),
    ("decode", but("decode", lambda pair: pair[0]), "caches has no entries instead of 1"),
    ("rotate", raises(NotImplementedError), "not written yet"),
    ("saliency", raises(RuntimeError("does not require grad")), "torch.enable_grad() switches"),
])
def test_what_is_no_known_mistake_is_named(name, f, words):
    assert words in check(name, f)


@ours
def test_a_wrong_helper_costs_its_own_exercise_alone():
    scope = {"right": REFERENCE["decode"], "ours": REFERENCE["rotate"], "rotate": torch.neg}
    exec("def decode(*args):\n    return right(*args) if rotate is ours else args", scope)
    with lending("decode", scope["decode"], 0) as lent:
        assert lent == "rotate" and check("decode", scope["decode"]) is None
    assert scope["rotate"] is torch.neg


@ours
def test_each_exercise_but_the_last_has_a_drawing():
    drawn = {name: list(getattr(exercise_drawings, name)(REFERENCE[name]))
             for name in EXERCISES[:-1]}
    assert drawn["select"][1] == "███····██····███····████"
    assert drawn["masked_attention"][3] == "██·█····"
    assert drawn["decode"][1:] == ["█··██···███", "█·······███"]
    assert drawn["tokens_per_block"][-1] == "8 " + "█" * 14 and all(drawn.values())


@ours
def test_the_story_is_read_by_the_reference_as_by_the_demo():
    first, *lines = read_story(REFERENCE["prefill"])
    assert first.startswith("It reads a story of 1494 tokens. 521 are in the last cache")
    assert [line.endswith("(right)") for line in lines] == [False, True] * 6


@ours
def test_what_does_not_end_is_too_slow(tmp_path):
    def forever(*args):
        while True:
            try:
                sum(range(1000))
            except Exception:       # which the alarm is not
                pass
    hint = check("rotate", forever, seconds=0.1)
    assert hint == "case 'gaps': too slow: stopped after 0.1 seconds"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    file = tmp_path / "mine.py"
    file.write_text("while True:\n    pass\n")
    fault = imported(file, seconds=0.1)["puzzle_scorer"]
    assert fault.endswith("cannot be imported: too slow: stopped after 0.1 seconds")


@ours
@pytest.mark.parametrize("name", EXERCISES)
def test_docstrings_are_true(name):
    """The examples, to four digits, and the budgets."""
    text = imported(TESTS / "exercises.py")[name].__doc__
    assert f"At most {BUDGETS[name]} lines" in text
    steps = doctest.DocTestParser().get_examples(text)
    assert steps[-1].want
    scope = {"torch": torch, name: REFERENCE[name]}
    for step in steps:
        if step.want:
            got, want = eval(step.source, scope), ast.literal_eval(step.want.strip())
            assert not difference("it", plain(got), plain(want), 6e-5), step.source
        else:
            exec(step.source, scope)


@ours
@pytest.mark.parametrize("source, result", [
    ("def rotate(x):\n    'Not counted.'\n    # nor this\n    if x: x = 1\n\n    x += 1; return x",
     "ok, 4 lines of 7"),
    ("def rotate(x):\n    return " + "1234567890 + " * 8 + "x", "ok, 2 lines of 7"),
    ("def rotate(x):\n    return f(f(x)) + select(x)\ndef f(x):\n    return f(x)\n"
     "def select(x):\n    return x", "ok, 2 lines of 7"),
    ("def rotate(x):\n" + "    x = 1\n" * 8, "ok, but 8 lines are over the budget of 7"),
])
def test_lines_are_statements(source, result):
    assert praise("rotate", source) == result
