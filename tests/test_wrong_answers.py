"""Checks the exercises' checks: a right answer with one mistake fails with that mistake's hint.

The answers are written with tensors, as a student would, and not with the loops of the
specifications in test_exercises.py. Each has a switch `wrong`; without a mistake it passes. (A
teacher hands out exercises.py, and not this file.)
"""
import ast
import doctest
import functools
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import exercises
from conftest import ROOT
from lab.plan import SHAPES
from test_exercises import (BUDGETS, EXERCISES, HINTS, PUZZLES, REFERENCE, TABLE_2, check,
                            difference, imported, lines, plain, praise, spec_flops, wrapped)

# -------------------------------------------------------------- answers with a switch for a mistake


def rotate(q, pos, theta, wrong=None):
    d = q.shape[-1]
    i = torch.arange(d // 2)
    if wrong == "renumbered":
        pos = torch.arange(q.shape[2]).expand(pos.shape)
    if wrong == "first_row":
        pos = pos[:1].expand(pos.shape)
    if wrong == "relative":
        pos = pos - pos[:, :1]
    if wrong == "from_one":
        pos = pos + 1
    powers = {"exponent": -i, "exponent_twice": -4 * i, "exponent_from_one": -2 * (i + 1),
              "exponent_sign": 2 * i}
    power = powers.get(wrong, -2 * i)
    if wrong == "theta_fixed":
        theta = 10000.0
    angle = pos[:, None, :, None] * theta ** (power / d)
    cos, sin = angle.cos(), angle.sin()
    if wrong == "sign":
        sin = -sin
    if wrong == "interleaved":
        a, b = q[..., ::2], q[..., 1::2]
    else:
        a, b = q.chunk(2, dim=-1)
    first = a * cos - b * sin
    if wrong == "overwritten":
        a = first
    second = b * cos - a * sin if wrong == "both_minus" else b * cos + a * sin
    if wrong == "interleaved":
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)


def saliency(f, x, reduce, wrong=None):
    old = x.grad
    x = x.detach().clone().requires_grad_()
    if wrong == "stale":
        x.grad = old
    with torch.enable_grad():
        f(x).backward()
    g, x = x.grad, x.detach()
    if wrong == "swapped":
        reduce = {"norm_gx": "abs_dot", "abs_dot": "norm_gx"}[reduce]
    if wrong in ("always_dot", "always_norm"):
        reduce = {"always_dot": "abs_dot", "always_norm": "norm_gx"}[wrong]
    if reduce == "norm_gx":
        if wrong == "product_of_norms":
            return g.norm(dim=-1) * x.norm(dim=-1)
        if wrong == "rms":
            return (g * x).square().mean(-1).sqrt()
        if wrong == "l1":
            return (g * x).norm(p=1, dim=-1)
        product = g if wrong == "g_alone" else g * x
        return product.square().sum(-1) if wrong == "squared" else product.norm(dim=-1)
    if wrong == "sum_abs":
        return (g * x).abs().sum(-1)
    if wrong == "mean":
        return (g * x).mean(-1).abs()
    total = g.sum(-1) if wrong == "x_alone" else (g * x).sum(-1)
    return total if wrong == "signed" else total.abs()


def ranking_loss(score, saliency, mask, wrong=None):
    if wrong == "across_rows":
        score, saliency, mask = (each.reshape(1, -1) for each in (score, saliency, mask))
    n = score.shape[1]
    if wrong == "no_mask":
        mask = torch.ones_like(mask)
    i, j = torch.triu_indices(n, n, 0 if wrong == "all_pairs" else 1)
    difference = saliency[:, i] - saliency[:, j]
    sign = difference if wrong == "difference" else difference.sign()
    weight = mask[:, i] if wrong == "one_mask" else mask[:, i] * mask[:, j]
    if wrong == "tie_up":
        sign = torch.where(difference >= 0, 1.0, -1.0)
    if wrong == "tie_down":
        sign = torch.where(difference > 0, 1.0, -1.0)
    if wrong == "gradient":
        score = score.detach()
    if wrong == "flipped":
        sign = -sign
    if wrong == "no_ties":
        weight = weight * sign.abs()
    if wrong == "no_sign":
        sign = torch.ones_like(sign)
    z = -(score[:, i] - score[:, j]) * sign
    if wrong in ("overflow", "overflow_masked"):
        loss = torch.log(1 + torch.exp(z))
    else:
        loss = -F.softplus(z) if wrong == "negative" else F.softplus(z)
    if wrong == "overflow_masked":              # as with all n * n pairs and a mask on half of them
        total = (loss * weight).sum() + (loss * 0).sum()
    else:
        total = (loss * weight).sum()
    if wrong == "sum":
        return total
    if wrong == "twice":
        return 2 * total / weight.sum().clamp(min=1)
    if wrong == "by_all":
        return total / (len(score) * n * n)
    if wrong == "by_rows":
        return total / len(score)
    if wrong == "by_tokens":
        return total / mask.sum()
    if wrong == "row_means":
        count = weight.sum(-1)
        means = (loss * weight).sum(-1) / count.clamp(min=1)
        return means.sum() / (count > 0).sum().clamp(min=1)
    count = torch.tensor(weight.numel()) if wrong == "all_count" else weight.sum()
    return total / (count if wrong == "empty" else count.clamp(min=1))


def local_count(n, local, wrong=None):
    share = local * n
    if wrong == "floor":
        return int(share)
    if wrong == "floor_one":
        return max(1, int(share))
    if wrong == "floor_more":
        return int(share) + 1
    if wrong == "nearest":
        return max(1, round(share))
    if wrong == "fuzz":
        return max(1, math.ceil(share))
    count = math.ceil(share - 1e-9)
    return count if wrong == "no_local_one" else max(1, count)


def select(score, pos, k, prompt_len, sink, local, wrong=None):
    n = pos.shape[1]
    whole = {"local_of_left": n, "local_of_k": k}.get(wrong, prompt_len)
    last = local_count(whole, local, wrong)
    fixed = protected_tokens(pos, prompt_len, sink, last, wrong)
    if wrong == "lowest":
        score = -score
    score = score.masked_fill(fixed, -math.inf if wrong == "others_only" else math.inf)
    if wrong == "k_beside":
        k = k + fixed[0].sum().item()
    if wrong == "late_ties":
        order = n - 1 - score.flip(1).argsort(dim=1, descending=True, stable=True)
    elif wrong == "any_ties":
        order = score.topk(k).indices
    else:
        order = score.argsort(dim=1, descending=True, stable=True)
    index = order[:, :k]
    if wrong != "unsorted":
        index = index.sort(dim=1).values
    return pos.gather(1, index) if wrong == "positions" else index


def protected_tokens(pos, prompt_len, sink, last, wrong=None):
    """pos (B, n) -> which tokens are protected, bool (B, n)."""
    index = torch.arange(pos.shape[1]).expand(pos.shape)
    if wrong == "first_row":
        pos = pos[:1].expand(pos.shape)
    first_local = prompt_len - last + {"local_less": 1, "local_more": -1}.get(wrong, 0)
    sinks = index < sink if wrong == "sink_by_index" else pos < sink
    if wrong == "sink_more":
        sinks = pos <= sink
    local = (pos >= first_local) & (pos < prompt_len)
    if wrong in ("local_by_index", "last_by_index"):
        local = index >= pos.shape[1] - last
    if wrong == "local_from_end":
        local = pos > pos[:, -1:] - last
    kinds = {"no_sink": sinks, "no_local": local, "no_response": pos >= prompt_len}
    dropped = "no_response" if wrong in ("last_by_index", "local_from_end") else wrong
    kinds.pop(dropped, None)
    return torch.stack(list(kinds.values())).any(0)


def masked_attention(q, k, v, keep, wrong=None):
    n, d = q.shape[-2:]
    see = torch.ones(n, n, dtype=torch.bool)
    if wrong != "not_causal":
        see = see.tril()
    if wrong == "on_keys":
        k = k * keep[:, None, :, None]
    a = q @ k.transpose(-1, -2)
    if wrong != "no_scale":
        a = a / (d if wrong == "by_d" else math.sqrt(d))
    mask = mask_of(keep, n, wrong)
    unmasked = a.masked_fill(~see, -math.inf)
    if wrong == "after":
        return unmasked.softmax(-1) @ (v * keep[:, None, :, None])
    if wrong == "no_renorm":
        return (unmasked.softmax(-1) * mask) @ v
    if wrong == "on_keys":
        return unmasked.softmax(-1) @ v
    if wrong == "on_logits":
        return (a * mask).masked_fill(~see, -math.inf).softmax(-1) @ v
    if wrong == "gradient":
        return (unmasked - 1e9 * (1 - mask)).softmax(-1) @ v
    hidden = ~see | (mask == 0)
    if wrong == "hard":
        return a.masked_fill(hidden, -math.inf).softmax(-1) @ v
    summed = a.detach().masked_fill(~see if wrong == "top_hidden" else hidden, -math.inf)
    x = a - summed.logsumexp(-1, keepdim=True)
    if wrong in ("unbounded", "no_shift"):      # nothing is seen of a later key's exponential
        a, x = a.masked_fill(~see, -math.inf), x.masked_fill(~see, -math.inf)
    e = exponentials(a, x, hidden, wrong) * see * mask
    out = e / e.sum(-1, keepdim=True) @ v
    return out * keep[:, None, :, None] if wrong == "queries_zeroed" else out


def mask_of(keep, n, wrong=None):
    """keep (B, n) -> m (B, 1, n, n)."""
    if wrong == "inverted":
        keep = 1 - keep
    mask = keep[:, None, :, None] if wrong == "queries" else keep[:, None, None, :]
    mask = mask.expand(-1, -1, n, n)
    if wrong == "both":
        mask = mask * keep[:, None, :, None]
    if wrong == "no_diagonal":
        return mask
    return torch.where(torch.eye(n, dtype=torch.bool), 1.0, mask)


def exponentials(a, x, hidden, wrong=None):
    if wrong in ("no_shift", "no_shift_later"):
        return a.exp()
    if wrong in ("unbounded", "unbounded_later"):
        return x.exp()
    if wrong == "hidden_gradient":
        return x.clamp(max=0).exp()
    if wrong == "where_after":
        return torch.where(hidden, x.sigmoid(), x.exp())
    return torch.where(hidden, F.logsigmoid(x), x).exp()


def tokens_per_block(n, blocks, first, step, stages, keep, sink, local, wrong=None):
    least = least_kept(n, n, sink, local, wrong)
    counts = [n] * blocks
    left = n
    for s in range(1, stages + 1):
        start = first + step * (s if wrong == "step_late" else s - 1)
        if wrong == "wrapped":
            start = min(start, blocks - 1)
        start += {"early": -1, "late": 1}.get(wrong, 0)
        if start >= blocks:
            break
        if wrong == "local_of_left":
            least = least_kept(n, left, sink, local)
        shares = {"iterated": keep * left,
                  "drops": (1 - keep) ** s * n,
                  "of_left": keep ** s * left,
                  "of_others": keep ** s * (n - least),
                  "triangular": keep ** (s * (s + 1) / 2) * n,
                  "linear": n - s * (1 - keep) * n,
                  "power": keep ** (s - 1) * n}
        share = shares.get(wrong, keep ** s * n)
        rounded = {"truncated": int(share), "half_up": int(share + 0.5),
                   "rounded_up": math.ceil(share)}
        target = rounded.get(wrong, round(share))
        left = min(least, target) if wrong == "smaller" else max(least, target)
        if wrong in ("added", "of_others"):
            left = min(n, least + round(share))
        counts[start:] = [left] * (blocks - start)
        if wrong == "one_block":
            counts[start + 1:] = [n] * (blocks - start - 1)
    return counts


def least_kept(n, whole, sink, local, wrong=None):
    """The protected tokens of n; the local ones are a share of `whole`."""
    last = local_count(whole - sink if wrong == "local_of_others" else whole, local, wrong)
    least = {"no_minimum": 0, "no_sink": last, "no_local": sink, "larger": max(sink, last)}
    least = least.get(wrong, sink + last)
    return least if wrong == "uncapped" else min(n, least)


def flops(c, counts, accounting, wrong=None):
    if wrong == "first_count":
        counts = counts[:1] * len(counts)
    if wrong == "swapped":
        accounting = {"exact": "paper", "paper": "exact"}[accounting]
    total = paper(c, counts, wrong) if accounting == "paper" else exact(c, counts, wrong)
    return total // 2 if wrong == "multiply_only" else total


def paper(c, counts, wrong):
    D, total = c.dim, 0
    width = D + c.n_kv_heads * c.head_dim if wrong == "paper_gqa" else 2 * D
    per_pair = 4 if wrong == "paper_pairs" else 3
    for n in counts:
        pairs = n * (n + 1) // 2 if wrong == "paper_causal" else n * n
        linear = 4 * D * width * n + 6 * D * c.ffn * n
        total += linear // 2 if wrong == "paper_half" else linear
        total += per_pair * D * pairs
    tokens = 1 if wrong == "paper_head" else counts[0]
    return total + (2 if wrong == "paper_half_head" else 4) * c.vocab * D * tokens


def exact(c, counts, wrong):
    D, total = c.dim, 0
    q = c.n_heads * c.head_dim
    kv = q if wrong == "no_gqa" else c.n_kv_heads * c.head_dim
    feed_forward = 2 * c.ffn if wrong == "two_matrices" else 3 * c.ffn
    width = D if wrong == "square" else q
    outputs = 0 if wrong == "three_of_four" else width
    products = {"one_product": 2 * q, "kv_pairs": 4 * kv, "dim_pairs": 4 * D}.get(wrong, 4 * q)
    both = kv if wrong == "one_of_kv" else 2 * kv
    for n in counts:
        pairs = {"not_causal": n * n, "no_self": n * (n - 1) // 2, "both_halves": n * (n + 1)}
        total += 2 * n * D * (width + outputs + both + feed_forward)
        total += products * pairs.get(wrong, n * (n + 1) // 2)
    heads = {"head_everywhere": counts[0], "no_head": 0, "embedding": 2,
             "head_each_block": len(counts)}
    tokens = heads.get(wrong, 1)
    return total + 2 * D * c.vocab * tokens


def turned(x, pos, theta):
    """Rows x (n, D) turned to pos (n,)."""
    return rotate(x[None, None], pos[None], theta)[0, 0]


def joined(cache, new):
    """A cache with more tokens at its end: two tuples of keys, values and positions -> one."""
    return tuple(torch.cat(parts) for parts in zip(cache, new))


def decode(states, N, blocks, caches, theta, wrong=None):
    if wrong == "sees_later":
        return decode_together(states, N, blocks, caches, theta)
    if wrong == "transposed":
        blocks = [tuple(W.T for W in block) for block in blocks]
    if wrong == "transposed_qkv":
        blocks = [(Wq.T, Wk.T, Wv.T, Wo) for Wq, Wk, Wv, Wo in blocks]
    if wrong == "qk_swapped":
        blocks = [(Wk, Wq, Wv, Wo) for Wq, Wk, Wv, Wo in blocks]
    caches, out = list(caches), []
    held = [len(pos) for _, _, pos in caches]
    for t, first in enumerate(states.split(1)):
        x = first
        for i, block in enumerate(blocks):
            places = {"cache_length": len(caches[i][2]), "stuck": N, "one_late": N + t + 1,
                      "one_early": N + t - 1}
            at = torch.tensor([places.get(wrong, N + t)])
            source = first if wrong == "first_state" else x
            new = new_entries(source, at, block, theta, wrong)
            y, grown = decode_one(x, new, block, caches[i], held[i], theta, wrong)
            base = first if wrong == "first_residual" else x
            x = y if wrong == "no_residual" else base + y
            if wrong != "not_appended":
                caches[i] = grown
        out.append(x)
    return torch.cat(out), caches


def new_entries(x, at, block, theta, wrong):
    """x (1, D) -> its key and value (1, D), and its position (1,)."""
    _, Wk, Wv, _ = block
    k, v = x @ Wk.T, x @ Wv.T
    if wrong not in ("key_not_turned", "all_turned_again", "turned_each_step"):
        k = turned(k, at, theta)
    if wrong == "value_turned":
        v = turned(v, at, theta)
    return k, x if wrong == "value_is_state" else v, at


def decode_one(x, new, block, cache, held, theta, wrong):
    """What one block adds to one token: x (1, D) -> (1, D) and the longer cache.

    held: how many of the cache's tokens are the prompt's.
    """
    Wq, _, _, Wo = block
    q = x @ Wq.T
    if wrong != "query_not_turned":
        q = turned(q, new[2], theta)
    grown = joined(new, cache) if wrong == "prepended" else joined(cache, new)
    keys, values, pos = cache if wrong == "no_self" else grown
    if wrong == "alone":
        keys, values, pos = joined([part[:held] for part in cache], new)
    if wrong in ("all_turned_again", "turned_twice", "turned_each_step"):
        keys = turned(keys, pos, theta)
    if wrong == "turned_again":
        keys = torch.cat([turned(keys[:held], pos[:held], theta), keys[held:]])
    if wrong == "turned_each_step":
        grown = keys, values, pos
    D = len(Wq)
    a = q @ keys.T / {"no_scale": 1, "by_d": D}.get(wrong, math.sqrt(D))
    y = a.softmax(-1) @ values
    if wrong != "no_output":
        y = y @ Wo.T
    return y, grown


def decode_together(x, N, blocks, caches, theta):
    """All new tokens at once, and no causal mask among them."""
    T, D = x.shape
    at = torch.arange(N, N + T)
    longer = []
    for (Wq, Wk, Wv, Wo), cache in zip(blocks, caches):
        keys, values, pos = joined(cache, (turned(x @ Wk.T, at, theta), x @ Wv.T, at))
        a = turned(x @ Wq.T, at, theta) @ keys.T / math.sqrt(D)
        x = x + a.softmax(-1) @ values @ Wo.T
        longer.append((keys, values, pos))
    return x, longer


def answer(name, wrong=None):
    return lambda *args: globals()[name](*args, wrong=wrong)


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", EXERCISES)
def test_the_answers_are_right_but_for_their_mistake(name):
    for seed in range(4):
        assert check(name, answer(name), seed) is None


def mistakes():
    """(exercise, mistake) for all that are known."""
    found = []
    for name, hints in HINTS.items():
        found += [(name, wrong) for wrong in hints]
    return found


@pytest.mark.parametrize("name, wrong", mistakes())
def test_each_mistake_gets_its_own_hint(name, wrong):
    for seed in range(3):
        assert check(name, answer(name, wrong), seed) == HINTS[name][wrong]


def test_what_is_no_known_mistake_is_named_by_its_first_difference():
    hint = check("flops", lambda c, counts, accounting: 7)
    assert hint.startswith("case 'exact, grouped heads, dwindling counts': "
                           "the result is 7 instead of ")

    hint = check("select", lambda *args: select(*args)[:, :-1])
    assert hint == ("case 'the protected have the lowest scores': "
                    "[0] has 11 entries instead of 12")

    hint = check("rotate", lambda q, pos, theta: rotate(q, pos, theta, "sign")[..., ::2])
    assert hint.endswith("[0][0][0] has 4 entries instead of 8")

    hint = check("ranking_loss", lambda score, *rest: ranking_loss(score.detach(), *rest))
    assert "gradient in score" in hint

    hint = check("decode", lambda *args: (decode(*args)[0], None))
    assert hint.startswith("case 'one block, one token': caches ")


def test_what_cannot_be_compared_is_named_too():
    def not_written(*args):
        raise NotImplementedError
    assert check("rotate", not_written) == "not written yet"
    assert "TypeError" in check("saliency", lambda x: x)

    def without_gradients(f, x, reduce):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x)
    assert "torch.enable_grad()" in check("saliency", without_gradients)

    def in_place(q, pos, theta):
        return q.copy_(rotate(q, pos, theta))
    hint = check("rotate", in_place)
    assert hint.endswith("the result is right, but an input was changed in place")


def test_a_result_is_what_the_docstring_names():
    """Right numbers in something else: each passed once."""
    def hint(name, change):
        return check(name, lambda *args: change(answer(name)(*args)))

    of_cost = hint("flops", float)
    assert of_cost.endswith("the numbers are right, but it is a float instead of an int")
    assert "it is a tensor of int64 instead of a list" in hint("tokens_per_block", torch.tensor)
    floats = hint("tokens_per_block", lambda counts: [float(n) for n in counts])
    assert "it is a list with a float instead of an int" in floats
    assert "instead of a tensor of int64" in hint("select", plain)
    wide = hint("rotate", torch.Tensor.double)
    assert "a tensor of float64 instead of a tensor of float32" in wide

    of_states = hint("decode", lambda pair: (list(pair[0]), pair[1]))
    assert of_states.endswith("states: a list instead of a tensor of float32")
    assert "it is a list instead of a tuple" in hint("decode", list)
    of_caches = hint("decode", lambda pair: (pair[0], [list(cache) for cache in pair[1]]))
    assert of_caches.endswith("caches: a list with a list instead of a tuple")
    assert hint("decode", lambda pair: pair[0]).startswith("it returns a tensor of float32 instead")


def test_saliency_leaves_no_trace():
    """Neither in its result nor in the state that it was given."""
    def with_graph(f, x, reduce):
        with torch.enable_grad():
            return answer("saliency")(f, x, reduce) * torch.ones((), requires_grad=True)
    assert check("saliency", with_graph).endswith("it carries a graph: detach it")

    def in_place(f, x, reduce):
        with torch.enable_grad():
            x.requires_grad_()
            g, = torch.autograd.grad(f(x), x)
        products = g * x
        return products.sum(-1).abs() if reduce == "abs_dot" else products.norm(dim=-1)
    assert "requires_grad or grad was changed" in check("saliency", in_place)


def test_a_form_is_no_mistake_of_the_gradient():
    """A number in place of a tensor, where there is no pair: loss and gradient are right."""
    def mixed(score, saliency, mask):
        loss = ranking_loss(score, saliency, mask)
        return loss if loss else 0.0
    hint = check("ranking_loss", mixed)
    assert hint == ("case 'no pair at all': the numbers are right, but it is a float instead of a "
                    "tensor of float32")


alarm = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarm")


@alarm
def test_an_answer_that_does_not_end_is_too_slow(tmp_path):
    def forever(*args):
        while True:
            try:
                sum(range(1000))
            except Exception:       # which the alarm is not
                pass
    hint = check("rotate", forever, seconds=0.1)
    assert hint == "case 'two rows with gaps': too slow: stopped after 0.1 seconds"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    mine = tmp_path / "mine.py"
    mine.write_text("while True:\n    pass\n")
    assert imported(mine, seconds=0.1).endswith("cannot be imported: too slow: stopped after 0.1 "
                                                "seconds")


def test_an_answer_that_leaves_python_fails_like_any_other(tmp_path):
    hint = check("select", lambda *args: sys.exit(0))
    assert hint.endswith("it leaves Python by exit(); return a result instead")
    assert "Skipped: " in check("select", lambda *args: pytest.skip("not today"))

    mine = tmp_path / "mine.py"
    mine.write_text("import sys\nsys.exit()\n")
    assert imported(mine).endswith("cannot be imported: it leaves Python by exit(); return a "
                                   "result instead")


def test_no_line_of_output_is_wider_than_100_columns():
    for name, hints in HINTS.items():
        for hint in hints.values():
            lines_printed = wrapped(f"{EXERCISES.index(name) + 1} {name}: {hint}").splitlines()
            assert len(lines_printed) <= 3 and max(map(len, lines_printed)) <= 100
    text = (ROOT / "tests" / "TEACHING.md").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", EXERCISES)
def test_the_worked_examples_are_true(name):
    """The reference and the answers here give the numbers of the docstrings, to four digits."""
    steps = doctest.DocTestParser().get_examples(getattr(exercises, name).__doc__)
    for f in (getattr(REFERENCE, name), answer(name)):
        scope = {"torch": torch, name: f}
        for step in steps:
            if not step.want:
                exec(step.source, scope)
                continue
            got = plain(eval(step.source, scope))
            want = plain(ast.literal_eval(step.want.strip()))
            assert not difference(got, want, 6e-5), step.source


def test_every_exercise_has_a_worked_example():
    for name in EXERCISES:
        steps = doctest.DocTestParser().get_examples(getattr(exercises, name).__doc__)
        assert any(step.want for step in steps), name


@pytest.mark.parametrize("n, tflops", TABLE_2.items())
def test_the_specification_gives_table_2(n, tflops):
    ours = spec_flops(SHAPES["mistral-7b"], [n] * 32, "paper") / 1e12
    assert abs(ours / tflops - 1) < 1e-3


def test_the_teachers_page_says_what_is_true():
    text = (ROOT / "tests" / "TEACHING.md").read_text()
    for name in EXERCISES:
        budget = BUDGETS[name]
        assert f"At most {budget} lines" in getattr(exercises, name).__doc__
        assert re.search(rf"`{name}` \|.*\| {budget} \| \d+ \|\n", text), name
    assert f"({len(mistakes())} are known)" in text
    code = text.split("```python\n")[1].split("```")[0]
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    assert {node.name for node in functions} == set(PUZZLES)


def test_lines_are_statements_without_comments():
    def three(x):
        """Not counted."""
        # nor this
        if x: return 1              # noqa: E701

        return 0
    assert lines(three) == 3

    def four(x):
        def inner(y):
            """Not counted either.

            Not at all.
            """
            return y

        a = inner(x); b = a         # noqa: E702
        return b
    assert lines(four) == 5         # two statements in one line are two lines

    def wide(x):
        return x + (1111111111 + 2222222222 + 3333333333 + 4444444444 + 5555555555 + 6666666666 +
                    7777777777 + 8888888888)
    assert lines(wide) == 2
    assert lines(functools.partial(wide, 1)) is None


def helper(x):
    y = x + 1
    return y


def test_helpers_count_and_exercises_do_not():
    assert lines(helped) == 1 + lines(helper)
    assert lines(answer) == 1


def helped(x):
    return helper(helper(x)) + rotate(x, x, x)


def test_the_budget_is_said():
    assert praise("decode", helper) == "ok, 2 lines of 15"
    assert praise("saliency", rotate) == f"ok, but {lines(rotate)} lines are over the budget of 6"
    assert praise("rotate", functools.partial(helper, 1)) == "ok"


@pytest.mark.beside
def test_every_file_of_answers_gets_its_score(tmp_path):
    """The grading loop of TEACHING.md itself, in a folder with two answers."""
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "mine.py").write_text(
        "import sys\nfrom test_wrong_answers import flops, rotate\n\n"
        "def select(*args):\n    raise NotImplementedError\n\n"
        "def saliency(*args):\n    sys.exit()\n")
    (folder / "worse.py").write_text("import os\nos._exit(0)\n")
    (tmp_path / "conftest.py").write_text("raise SystemExit\n")      # is not looked at
    text = (ROOT / "tests" / "TEACHING.md").read_text()
    loop = text.split("pip install -r requirements.txt\n")[1].split("```")[0]
    loop = loop.replace("answers/*.py", f"{folder}/*.py")
    assert "timeout -k 5 120 python" in loop
    loop = loop.replace("timeout -k 5 120 python", sys.executable)
    quiet = {**os.environ, "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    done = subprocess.run(["bash", "-c", loop], cwd=ROOT, env=quiet, capture_output=True, text=True)
    mine, worse = done.stdout.split("worse.py\n")
    for line in ("\n2/8\n", "1 rotate: ok, ", "4 select: not written yet",
                 "2 saliency: case 'tokens that interact': it leaves Python by exit()",
                 "8 decode: this function is missing"):
        assert line in mine, done.stdout
    assert worse == "0/8: it ended Python, or took over two minutes\n"
