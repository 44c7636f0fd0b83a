"""Checks the exercises' checks: a right answer with one mistake fails with that mistake's hint.

The answers are written with tensors, as a student would, and not with the loops of the
specifications in test_exercises.py. Each has a switch `wrong`; without a mistake it passes. (A
teacher hands out exercises.py, and not this file.)
"""
import ast
import doctest
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import exercises
from conftest import ROOT
from model import SHAPES
from test_exercises import (EXERCISES, HINTS, PUZZLES, REFERENCE, TABLE_2, check, difference, lines,
                            plain, spec_flops)

# -------------------------------------------------------------- answers with a switch for a mistake


def rotate(q, pos, theta, wrong=None):
    d = q.shape[-1]
    i = torch.arange(d // 2)
    if wrong == "renumbered":
        pos = torch.arange(q.shape[2]).expand(pos.shape)
    if wrong == "first_row":
        pos = pos[:1].expand(pos.shape)
    power = -i if wrong == "exponent" else -2 * i
    angle = pos[:, None, :, None] * theta ** (power / d)
    cos, sin = angle.cos(), angle.sin()
    if wrong == "sign":
        sin = -sin
    if wrong == "interleaved":
        a, b = q[..., ::2], q[..., 1::2]
    else:
        a, b = q.chunk(2, dim=-1)
    first = a * cos - b * sin
    second = b * cos + a * sin
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
    if reduce == "norm_gx":
        product = g if wrong == "g_alone" else g * x
        return product.square().sum(-1) if wrong == "squared" else product.norm(dim=-1)
    if wrong == "sum_abs":
        return (g * x).abs().sum(-1)
    total = (g * x).sum(-1)
    return total if wrong == "signed" else total.abs()


def ranking_loss(score, saliency, mask, wrong=None):
    n = score.shape[1]
    if wrong == "no_mask":
        mask = torch.ones_like(mask)
    i, j = torch.triu_indices(n, n, 0 if wrong == "all_pairs" else 1)
    sign = (saliency[:, i] - saliency[:, j]).sign()
    weight = mask[:, i] * mask[:, j]
    if wrong == "flipped":
        sign = -sign
    if wrong == "no_ties":
        weight = weight * sign.abs()
    if wrong == "no_sign":
        sign = torch.ones_like(sign)
    z = -(score[:, i] - score[:, j]) * sign
    loss = torch.log(1 + torch.exp(z)) if wrong == "overflow" else F.softplus(z)
    total = (loss * weight).sum()
    if wrong == "sum":
        return total
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
    if wrong == "fuzz":
        return max(1, math.ceil(share))
    count = math.ceil(share - 1e-9)
    return count if wrong == "no_local_one" else max(1, count)


def select(score, pos, k, prompt_len, sink, local, wrong=None):
    n = pos.shape[1]
    last = local_count(n if wrong == "local_of_left" else prompt_len, local, wrong)
    protected = {"no_sink": pos < sink,
                 "no_local": (pos >= prompt_len - last) & (pos < prompt_len),
                 "no_response": pos >= prompt_len}
    protected.pop(wrong, None)
    for tokens in protected.values():
        score = score.masked_fill(tokens, math.inf)
    if wrong == "late_ties":
        order = n - 1 - score.flip(1).argsort(dim=1, descending=True, stable=True)
    else:
        order = score.argsort(dim=1, descending=True, stable=True)
    index = order[:, :k]
    if wrong != "unsorted":
        index = index.sort(dim=1).values
    return pos.gather(1, index) if wrong == "positions" else index


def masked_attention(q, k, v, keep, wrong=None):
    n, d = q.shape[-2:]
    see = torch.ones(n, n, dtype=torch.bool)
    if wrong != "not_causal":
        see = see.tril()
    a = q @ k.transpose(-1, -2)
    if wrong != "no_scale":
        a = a / math.sqrt(d)
    mask = keep[:, None, :, None] if wrong == "queries" else keep[:, None, None, :]
    mask = mask.expand(-1, -1, n, n)
    if wrong != "no_diagonal":
        mask = torch.where(torch.eye(n, dtype=torch.bool), 1.0, mask)
    if wrong == "no_renorm":
        return (a.masked_fill(~see, -math.inf).softmax(-1) * mask) @ v
    hidden = ~see | (mask == 0)
    if wrong == "hard":
        return a.masked_fill(hidden, -math.inf).softmax(-1) @ v
    summed = a.detach().masked_fill(~see if wrong == "top_hidden" else hidden, -math.inf)
    a = a - summed.logsumexp(-1, keepdim=True)
    e = torch.where(hidden, F.logsigmoid(a), a).exp() * see * mask
    return e / e.sum(-1, keepdim=True) @ v


def tokens_per_block(n, blocks, first, step, stages, keep, sink, local, wrong=None):
    least = sink + local_count(n, local, wrong)
    if wrong == "no_minimum":
        least = 0
    elif wrong != "uncapped":
        least = min(n, least)
    counts = [n] * blocks
    left = n
    for s in range(1, stages + 1):
        start = first + step * (s - 1)
        if wrong == "wrapped":
            start = min(start, blocks - 1)
        start += {"early": -1, "late": 1}.get(wrong, 0)
        if start >= blocks:
            break
        shares = {"iterated": keep * left,
                  "of_left": keep ** s * left,
                  "power": keep ** (s - 1) * n}
        share = shares.get(wrong, keep ** s * n)
        rounded = {"truncated": int(share), "half_up": int(share + 0.5)}
        left = max(least, rounded.get(wrong, round(share)))
        counts[start:] = [left] * (blocks - start)
    return counts


def flops(c, counts, accounting, wrong=None):
    total = paper(c, counts, wrong) if accounting == "paper" else exact(c, counts, wrong)
    return total // 2 if wrong == "multiply_only" else total


def paper(c, counts, wrong):
    D, total = c.dim, 0
    width = D + c.n_kv_heads * c.head_dim if wrong == "paper_gqa" else 2 * D
    per_pair = 4 if wrong == "paper_pairs" else 3
    for n in counts:
        pairs = n * (n + 1) // 2 if wrong == "paper_causal" else n * n
        total += 4 * D * width * n + 6 * D * c.ffn * n
        total += per_pair * D * pairs
    tokens = 1 if wrong == "paper_head" else counts[0]
    return total + 4 * c.vocab * D * tokens


def exact(c, counts, wrong):
    D, total = c.dim, 0
    q = c.n_heads * c.head_dim
    kv = q if wrong == "no_gqa" else c.n_kv_heads * c.head_dim
    feed_forward = 2 * c.ffn if wrong == "two_matrices" else 3 * c.ffn
    for n in counts:
        pairs = {"not_causal": n * n, "no_self": n * (n - 1) // 2}
        total += 2 * n * D * (2 * q + 2 * kv + feed_forward)
        total += 4 * q * pairs.get(wrong, n * (n + 1) // 2)
    tokens = counts[0] if wrong == "head_everywhere" else 1
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
    caches, out = list(caches), []
    held = [len(pos) for _, _, pos in caches]
    for t, x in enumerate(states.split(1)):
        for i, block in enumerate(blocks):
            place = {"cache_length": len(caches[i][2]), "stuck": N}.get(wrong, N + t)
            at = torch.tensor([place])
            x, grown = decode_one(x, at, block, caches[i], held[i], theta, wrong)
            if wrong != "not_appended":
                caches[i] = grown
        out.append(x)
    return torch.cat(out), caches


def decode_one(x, at, block, cache, held, theta, wrong):
    """One token through one block: x (1, D) -> (1, D) and the longer cache.

    held: how many of the cache's tokens are the prompt's.
    """
    Wq, Wk, Wv, Wo = block
    q = turned(x @ Wq.T, at, theta)
    k, v = x @ Wk.T, x @ Wv.T
    if wrong not in ("key_not_turned", "all_turned_again"):
        k = turned(k, at, theta)
    grown = joined(cache, (k, v, at))
    keys, values, pos = cache if wrong == "no_self" else grown
    if wrong == "all_turned_again":
        keys = turned(keys, pos, theta)
    if wrong == "turned_again":
        keys = torch.cat([turned(keys[:held], pos[:held], theta), keys[held:]])
    a = q @ keys.T
    if wrong != "no_scale":
        a = a / math.sqrt(len(Wq))
    y = a.softmax(-1) @ values @ Wo.T
    return (y if wrong == "no_residual" else x + y), grown


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
        budget = re.search(r"At most (\d+) lines", getattr(exercises, name).__doc__)[1]
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


def test_a_file_of_answers_gets_its_score(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from test_wrong_answers import flops, rotate\n\n"
                    "def select(*args):\n    raise NotImplementedError\n")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_exercises.py",
               "--impl", str(mine), "--seed", "5", "-p", "no:cacheprovider"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    for line in ("\n2/8\n", "rotate: ok, ", "select: not written yet",
                 "decode: this function is missing"):
        assert line in out, out
