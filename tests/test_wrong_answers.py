"""The exercises' checks are checked: each answer here is right but for one mistake, and has to fail with the hint for that mistake.

The answers are written with tensors, as a student would, and not with the loops of the specifications in test_exercises.py. Without a mistake
each of them passes. (A teacher hands out exercises.py, and not this file.)
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
from test_exercises import EXERCISES, HINTS, PUZZLES, REFERENCE, TABLE_2, check, difference, lines, plain, spec_flops

# ------------------------------------------------------------------------------------------- answers with a switch for a mistake


def rotate(q, pos, theta, wrong=None):
    i, d = torch.arange(q.shape[-1] // 2), q.shape[-1]
    pos = torch.arange(q.shape[2]).expand(pos.shape) if wrong == "renumbered" else pos[:1].expand(pos.shape) if wrong == "first_row" else pos
    angle = pos[:, None, :, None] * theta ** ((-i if wrong == "exponent" else -2 * i) / d)
    cos, sin = angle.cos(), -angle.sin() if wrong == "sign" else angle.sin()
    a, b = (q[..., ::2], q[..., 1::2]) if wrong == "interleaved" else q.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.stack(pair, -1).flatten(-2) if wrong == "interleaved" else torch.cat(pair, -1)


def saliency(f, x, reduce, wrong=None):
    old = x.grad
    x = x.detach().clone().requires_grad_()
    x.grad = old if wrong == "stale" and old is not None else None
    with torch.enable_grad():
        f(x).backward()
    g, x = x.grad, x.detach()
    if reduce == "abs_dot":
        return (g * x).abs().sum(-1) if wrong == "sum_abs" else (g * x).sum(-1) if wrong == "signed" else (g * x).sum(-1).abs()
    return (g * x).square().sum(-1) if wrong == "squared" else (g if wrong == "g_alone" else g * x).norm(dim=-1)


def ranking_loss(score, saliency, mask, wrong=None):
    mask = torch.ones_like(mask) if wrong == "no_mask" else mask
    i, j = torch.triu_indices(score.shape[1], score.shape[1], 0 if wrong == "all_pairs" else 1)
    sign = (saliency[:, i] - saliency[:, j]).sign() * (-1 if wrong == "flipped" else 1)
    z = -(score[:, i] - score[:, j]) * (1 if wrong == "no_sign" else sign)
    weight = mask[:, i] * mask[:, j] * (1 if wrong != "no_ties" else sign.abs())
    loss = (torch.log(1 + torch.exp(z)) if wrong == "overflow" else F.softplus(z)) * weight
    count = weight.sum(-1) if wrong == "row_means" else torch.tensor(weight.numel()) if wrong == "all_count" else weight.sum()
    if wrong == "sum":
        return loss.sum()
    if wrong == "row_means":
        return (loss.sum(-1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
    return loss.sum() / (count if wrong == "empty" else count.clamp(min=1))


def select(score, pos, k, prompt_len, sink, local, wrong=None):
    share = local * (pos.shape[1] if wrong == "local_of_left" else prompt_len)
    last = {"floor": int(share), "floor_one": max(1, int(share)), "fuzz": max(1, math.ceil(share))}.get(wrong, max(1, math.ceil(share - 1e-9)))
    tail, response = (pos >= prompt_len - last) & (pos < prompt_len), pos >= prompt_len
    always = (pos < sink) * (wrong != "no_sink") + tail * (wrong != "no_local") + response * (wrong != "no_response")
    if wrong == "late_ties":
        order = pos.shape[1] - 1 - score.masked_fill(always, math.inf).flip(1).argsort(dim=1, descending=True, stable=True)
    else:
        order = score.masked_fill(always, math.inf).argsort(dim=1, descending=True, stable=True)
    index = order[:, :k] if wrong == "unsorted" else order[:, :k].sort(dim=1).values
    return pos.gather(1, index) if wrong == "positions" else index


def masked_attention(q, k, v, keep, wrong=None):
    n, d = q.shape[-2:]
    see = torch.ones(n, n, dtype=torch.bool) if wrong == "not_causal" else torch.ones(n, n, dtype=torch.bool).tril()
    a = q @ k.transpose(-1, -2) / (1 if wrong == "no_scale" else math.sqrt(d))
    mask = keep[:, None, :, None] if wrong == "queries" else keep[:, None, None, :]
    mask = mask.expand(-1, -1, n, n) if wrong == "no_diagonal" else torch.where(torch.eye(n, dtype=torch.bool), 1.0, mask)
    if wrong == "hard":
        return a.masked_fill(~see | (mask == 0), -math.inf).softmax(-1) @ v
    if wrong == "no_renorm":
        return (a.masked_fill(~see, -math.inf).softmax(-1) * mask) @ v
    top = a.masked_fill(~see if wrong == "top_hidden" else ~see | (mask == 0), -math.inf).amax(-1, keepdim=True).detach()
    e = (a - top).clamp(max=0).exp() * see * mask
    return e / e.sum(-1, keepdim=True) @ v


def tokens_per_block(n, blocks, first, step, stages, keep, sink, local, wrong=None):
    last = {"floor": int(local * n), "floor_one": max(1, int(local * n)), "fuzz": max(1, math.ceil(local * n)),
            "no_local_one": math.ceil(local * n - 1e-9)}.get(wrong, max(1, math.ceil(local * n - 1e-9)))
    least = sink + last
    least = 0 if wrong == "no_minimum" else least if wrong == "uncapped" else min(n, least)
    counts = [n] * blocks
    left = n
    for s in range(1, stages + 1):
        b = first + step * (s - 1)
        if wrong == "wrapped":
            b = min(b, blocks - 1)
        start = b - 1 if wrong == "early" else b + 1 if wrong == "late" else b
        if start >= blocks:
            break
        share = keep * left if wrong == "iterated" else keep ** s * left if wrong == "of_left" else keep ** (s - 1) * n if wrong == "power" else keep ** s * n
        left = max(least, int(share) if wrong == "truncated" else int(share + 0.5) if wrong == "half_up" else round(share))
        counts[start:] = [left] * (blocks - start)
    return counts


def flops(c, counts, accounting, wrong=None):
    D, q, kv = c.dim, c.n_heads * c.head_dim, (c.n_heads if wrong == "no_gqa" else c.n_kv_heads) * c.head_dim
    if accounting == "paper":
        width = D + c.n_kv_heads * c.head_dim if wrong == "paper_gqa" else 2 * D
        pair = 4 if wrong == "paper_pairs" else 3
        total = sum(4 * D * width * n + 6 * D * c.ffn * n + pair * D * (n * (n + 1) // 2 if wrong == "paper_causal" else n * n) for n in counts)
        total += 4 * c.vocab * D * (1 if wrong == "paper_head" else counts[0])
    else:
        pairs = {"not_causal": lambda n: n * n, "no_self": lambda n: n * (n - 1) // 2}.get(wrong, lambda n: n * (n + 1) // 2)
        total = sum(2 * n * D * (2 * q + 2 * kv + (2 if wrong == "two_matrices" else 3) * c.ffn) + 4 * q * pairs(n) for n in counts)
        total += 2 * D * c.vocab * (counts[0] if wrong == "head_everywhere" else 1)
    return total // 2 if wrong == "multiply_only" else total


def decode(states, N, blocks, caches, theta, wrong=None):
    T, D = states.shape

    def turn(x, place):             # (n, D) -> (n, D)
        return rotate(x[None, None], torch.as_tensor(place).view(1, -1).expand(1, len(x)), theta)[0, 0]

    if wrong == "sees_later":       # all new tokens at once, and no causal mask among them
        x, grown = states, []
        for (Wq, Wk, Wv, Wo), (keys, values, pos) in zip(blocks, caches):
            at = torch.arange(N, N + T)
            keys, values, pos = torch.cat([keys, turn(x @ Wk.T, at)]), torch.cat([values, x @ Wv.T]), torch.cat([pos, at])
            x = x + (turn(x @ Wq.T, at) @ keys.T / math.sqrt(D)).softmax(-1) @ values @ Wo.T
            grown.append((keys, values, pos))
        return x, grown
    caches, out = list(caches), []
    held = [len(pos) for _, _, pos in caches]
    for t, x in enumerate(states.split(1)):
        for i, (Wq, Wk, Wv, Wo) in enumerate(blocks):
            keys, values, pos = old = caches[i]
            at = len(pos) if wrong == "cache_length" else N if wrong == "stuck" else N + t
            q, k, v = turn(x @ Wq.T, at), x @ Wk.T, x @ Wv.T
            k = k if wrong in ("key_not_turned", "all_turned_again") else turn(k, at)
            caches[i] = torch.cat([keys, k]), torch.cat([values, v]), torch.cat([pos, torch.tensor([at])])
            keys, values, pos = old if wrong == "no_self" else caches[i]
            if wrong == "all_turned_again":
                keys = turn(keys, pos)
            if wrong == "turned_again":
                keys = torch.cat([turn(keys[:held[i]], pos[:held[i]]), keys[held[i]:]])
            y = (q @ keys.T / (1 if wrong == "no_scale" else math.sqrt(D))).softmax(-1) @ values @ Wo.T
            x = y if wrong == "no_residual" else x + y
            if wrong == "not_appended":
                caches[i] = old
        out.append(x)
    return torch.cat(out), caches


def answer(name, wrong=None):
    return lambda *args: globals()[name](*args, wrong=wrong)


# ----------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", EXERCISES)
def test_the_answers_are_right_but_for_their_mistake(name):
    for seed in range(4):
        assert check(name, answer(name), seed) is None


@pytest.mark.parametrize("name, wrong", [(name, wrong) for name in EXERCISES for wrong in HINTS[name]])
def test_each_mistake_gets_its_own_hint(name, wrong):
    for seed in range(3):
        assert check(name, answer(name, wrong), seed) == HINTS[name][wrong]


def test_what_is_no_known_mistake_is_named_by_its_first_difference():
    def none(*args):
        raise NotImplementedError
    assert check("rotate", none) == "not written yet"
    assert check("flops", lambda c, counts, accounting: 7).startswith("case 'exact, grouped heads, dwindling counts': the result is 7 instead of ")
    assert check("select", lambda *a: select(*a)[:, :-1]) == "case 'the protected have the lowest scores': [0] has 11 entries instead of 12"
    assert check("rotate", lambda q, pos, theta: rotate(q, pos, theta, "sign")[..., ::2]).endswith("[0][0][0] has 4 entries instead of 8")
    assert "TypeError" in check("saliency", lambda x: x)
    assert "torch.enable_grad()" in check("saliency", lambda f, x, reduce: torch.autograd.grad(f(x.clone().requires_grad_()), x))
    assert "gradient in score" in check("ranking_loss", lambda s, t, mask: ranking_loss(s.detach(), t, mask))
    assert check("rotate", lambda q, pos, theta: q.copy_(rotate(q, pos, theta))).endswith("the result is right, but an input was changed in place")
    assert check("decode", lambda *a: (decode(*a)[0], None)).startswith("case 'one block, one token': caches ")


@pytest.mark.parametrize("name", EXERCISES)
def test_the_worked_examples_are_true(name):
    """The numbers in the students' docstrings are what the reference and the answers here give, to four digits."""
    for f in (getattr(REFERENCE, name), answer(name)):
        scope = {"torch": torch, name: f}
        for example in doctest.DocTestParser().get_examples(getattr(exercises, name).__doc__):
            if not example.want:
                exec(example.source, scope)
            else:
                want = ast.literal_eval(example.want.strip())
                assert not difference(plain(eval(example.source, scope)), plain(want), 6e-5), example.source


@pytest.mark.parametrize("n, tflops", TABLE_2.items())
def test_the_specification_gives_table_2(n, tflops):
    assert abs(spec_flops(SHAPES["mistral-7b"], [n] * 32, "paper") / 1e12 / tflops - 1) < 1e-3


def test_the_teachers_page_says_what_is_true():
    text = (ROOT / "tests" / "TEACHING.md").read_text()
    for name in EXERCISES:
        budget = re.search(r"At most (\d+) lines", getattr(exercises, name).__doc__)[1]
        assert re.search(rf"`{name}` \|.*\| {budget} \| \d+ \|\n", text), name
    assert f"({sum(map(len, HINTS.values()))} are known)" in text
    ours = {node.name for node in ast.parse(text.split("```python\n")[1].split("```")[0]).body if isinstance(node, ast.FunctionDef)}
    assert ours == set(PUZZLES)


def test_lines_are_statements_without_comments():
    def three(x):
        """Not counted."""
        # nor this
        if x: return 1              # noqa: E701

        return 0
    assert lines(three) == 3


def test_a_file_of_answers_gets_its_score(tmp_path):
    (tmp_path / "mine.py").write_text("from test_wrong_answers import flops, rotate\n\ndef select(*args):\n    raise NotImplementedError\n")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_exercises.py", "--impl", str(tmp_path / "mine.py"), "--seed", "5", "-p", "no:cacheprovider"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "\n2/8\n" in out and "rotate: ok, " in out and "select: not written yet" in out and "decode: this function is missing" in out, out
