"""The paper's path against second writings that call nothing of what they check.

Pruned generation against a pass over the whole text in plain tensor operations; H2O against a loop
over its heads. Saliency against finite differences: tests/test_saliency.py. Logits against
transformers: tests/test_model.py feature by feature, tests/test_published.py model by model.
"""
import math
from fractions import Fraction

import pytest
import torch

from conftest import close, draw
from infer import generate
from lab.caches import h2o
from model import Config, Llama, Rope
from predictor import NearPredictor, Predictor
from prune import Schedule, extend, nll, predictor_scorer, prefill

NEW = 6                             # tokens that are decoded

# ------------------------------------------------------------- the pruned model, written out again


def normed(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def linear(part, x):
    y = x @ part.weight.T
    return y if part.bias is None else y + part.bias


def frequency(i, c):
    """Radians that pair i turns from one position to the next."""
    f = c.rope_theta ** (-2 * i / c.head_dim)
    if c.rope_linear:
        return f / c.rope_linear
    if c.rope_llama3 is None:
        return f
    factor, low, high, original = c.rope_llama3
    turns = original * f / (2 * math.pi)
    if turns <= low:
        return f / factor
    if turns >= high:
        return f
    part = (turns - low) / (high - low)
    return part * f + (1 - part) * f / factor


def turned(x, c):
    """Rotary positions of x (T, heads, d): the pair (i, i + d/2) is one complex number."""
    half = c.head_dim // 2
    each = torch.tensor([frequency(i, c) for i in range(half)], dtype=x.dtype)
    angle = torch.arange(len(x))[:, None, None] * each              # (T, 1, d/2)
    z = torch.complex(x[..., :half], x[..., half:])
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def through(block, x, see):
    """One block on x (T, D); see (T, T) bool: which keys each query sees."""
    c = block.c
    h = normed(x, block.attn_norm.weight, c.norm_eps)
    q, k, v = (linear(p, h).view(len(x), -1, c.head_dim) for p in (block.q, block.k, block.v))
    if c.qk_norm:
        q = normed(q, block.q_norm.weight, c.norm_eps)
        k = normed(k, block.k_norm.weight, c.norm_eps)
    q, k = turned(q, c), turned(k, c)
    heads = []
    for i in range(c.n_heads):
        g = i * c.n_kv_heads // c.n_heads
        e = (q[:, i] @ k[:, g].T / math.sqrt(c.head_dim)).exp() * see
        heads.append(e / e.sum(-1, keepdim=True) @ v[:, g])
    x = x + linear(block.o, torch.cat(heads, dim=-1))
    h = normed(x, block.mlp_norm.weight, c.norm_eps)
    gate = linear(block.gate, h)
    return x + linear(block.down, gate / (1 + (-gate).exp()) * linear(block.up, h))


def predicted(predictor, x, alive):
    """Keep minus drop: x (T, D) -> {position: number} of those that are `alive`."""
    x = x[alive]
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + predictor.norm.eps).sqrt()
    x = x * predictor.norm.weight + predictor.norm.bias
    h = linear(predictor.up, x)
    if isinstance(predictor, NearPredictor):
        near = linear(predictor.near, x)
        h = h + torch.stack([near[[abs(q - p) <= 16 for q in alive]].mean(0) for p in alive])
    pi = linear(predictor.down, h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    return dict(zip(alive, (pi[:, 0] - pi[:, 1]).tolist()))


def survivors(scores, stage, n, schedule):
    """Which of the positions that have scores outlive stage 1, 2, ... of a prompt of n tokens."""
    last = max(1, math.ceil(Fraction(str(schedule.local)) * n))
    fixed = [p for p in scores if p < schedule.sink or p >= n - last]
    keep = max(round(schedule.keep ** stage * n), len(fixed))
    free = [p for p in scores if p not in fixed]
    free.sort(key=lambda p: scores[p], reverse=True)
    return sorted(fixed + free[:keep - len(fixed)])


def recompute(model, predictors, schedule, text, n):
    """All of text (T) through every block; block by block a mask hides what was never cached.

    n: the prompt's length. -> logits (T, V), of which those from n - 1 on are the pruned model's,
    and the prompt's positions that each block cached.
    """
    c, pos = model.config, torch.arange(len(text))
    back = pos[:, None] - pos                                       # (T, T)
    near = (back >= 0) & (back < (c.window or len(text)))
    alive, cached = list(range(n)), []
    x = model.embed.weight[text]
    for number, block in enumerate(model.blocks, start=1):
        cached.append(alive)
        known = pos >= n
        known[alive] = True
        see = near & (known | (back == 0))      # a dropped query sees itself; nobody sees it
        x = through(block, x, see)
        stage, rest = divmod(number - schedule.first, schedule.step)
        if rest == 0 and 0 <= stage < schedule.stages and number < c.n_blocks:
            alive = survivors(predicted(predictors[stage], x, alive), stage + 1, n, schedule)
    head = model.embed if c.tied else model.head
    return normed(x, model.norm.weight, c.norm_eps) @ head.weight.T, cached


def case(seed, schedule, kind=Predictor, **changes):
    """A model of five blocks and its predictors, fp64, and the scorer that they are."""
    shape = dict(dim=32, n_blocks=5, n_heads=4, n_kv_heads=2, head_dim=8, ffn=48, vocab=70)
    generator = torch.Generator().manual_seed(seed)
    model = draw(Llama(Config(**{**shape, **changes})).double(), generator)
    predictors = [draw(kind(32).double(), generator) for _ in range(schedule.stages)]
    return model, predictors, (schedule, predictor_scorer(predictors))


def random_text(n, seed):
    return torch.randint(0, 70, (n,), generator=torch.Generator().manual_seed(seed))


SCHEDULE = Schedule(1, 1, 4, 0.8)
SLOW = {"tied": True, "rope_theta": 300.0, "rope_llama3": (8.0, 1.0, 4.0, 40.0)}
QWEN3 = {"qk_norm": True, "head_dim": 10, "norm_eps": 0.2}
CASES = {       # what the model has, the schedule, the prompt's length
    "grouped": ({}, SCHEDULE, 43),
    "every head its own": ({"n_kv_heads": 4}, Schedule(2, 1, 3, 0.6, sink=2, local=0.07), 50),
    "one for all, wide": ({"n_kv_heads": 1, "head_dim": 14}, Schedule(1, 2, 2, 0.5), 31),
    "bias": ({"qkv_bias": True, "norm_eps": 0.1}, Schedule(1, 1, 4, 0.7, sink=1, local=0.3), 37),
    "norm of each head": (QWEN3, Schedule(1, 1, 4, 0.6, sink=2), 38),
    "bias everywhere": ({"qkv_bias": True, "o_bias": True}, Schedule(2, 1, 3, 0.5), 36),
    "all turns slow": ({"rope_linear": 3.0}, SCHEDULE, 33),
    "window": ({"window": 9}, SCHEDULE, 40),
    "slow turns": (SLOW, Schedule(1, 3, 2, 0.4, sink=6), 45),
    "only the last protected": ({}, Schedule(3, 1, 9, 0.45, sink=0, local=0.0), 34),
    "all protected": ({}, Schedule(1, 1, 3, 0.3, sink=3, local=0.5), 5),
    "near": ({"kind": NearPredictor}, Schedule(1, 1, 4, 0.7), 70),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_pruned_generation_equals_a_masked_recompute(name, seed):
    changes, schedule, n = CASES[name]
    model, predictors, arm = case(seed, schedule, **changes)
    text = random_text(n, seed)
    logits, caches, _ = prefill(model, text[None], *arm, room=NEW)
    for i in range(n, n + NEW):
        want, cached = recompute(model, predictors, schedule, text, n)
        assert close(logits[0], want[-1].float(), 1e-5), i
        text = torch.cat((text, want[-1].argmax().view(1)))
        logits = extend(model, text[None, -1:], i, caches)[:, -1]
    new = list(range(n, n + NEW))
    assert [c.pos[0, :c.n].tolist() for c in caches] == [kept + new for kept in cached]
    made = generate(model, text[None, :n], NEW, *arm, eos=())
    assert made.tokens == text[n:].tolist()
    assert made.counts == [len(kept) for kept in cached]
    told = want[n - 1:].softmax(-1).gather(1, text[n:, None])[:, 0]
    assert close(nll(model, text[None], n, *arm), -told.log().float(), 1e-5)
    # another question on the same caches, read in two parts
    for cache, kept in zip(caches, cached):
        cache.n = len(kept)
    question = random_text(NEW, seed + 7)
    want, _ = recompute(model, predictors, schedule, torch.cat((text[:n], question)), n)
    parts = (extend(model, question[None, a:b], n + a, caches)[0] for a, b in ((0, 4), (4, NEW)))
    assert close(torch.cat(tuple(parts)), want[n:].float(), 1e-5)


# --------------------------------------------------------------------------------------------- H2O


def one_head(q, k, v, n, share, heavy):
    """One KV head: queries q (T, H/G, d), k and v (T, d); the first n tokens are the prompt.

    -> what each query reads (T, H/G, d), and the tokens that are held in the end.
    """
    received, held, outputs = [0.0] * len(k), [], []
    for t, queries in enumerate(q):
        held.append(t)
        looks = (queries @ k[held].T / math.sqrt(k.shape[1])).softmax(-1)       # (H/G, m)
        outputs.append(looks @ v[held])
        for p, much in zip(held, looks.sum(0).tolist()):
            received[p] += much
        if t >= n - 1:
            budget = math.ceil(share * (t + 1))
            hitters = math.floor(heavy * budget)
            old = len(held) - (budget - hitters)        # so many are not among the latest
            best = sorted(held[:old], key=lambda p: -received[p])
            held = sorted(best[:hitters]) + held[old:]
    return torch.stack(outputs), held


@pytest.mark.parametrize("share", [Fraction(2, 5), Fraction(1, 4), Fraction(1, 1)])
@pytest.mark.parametrize("heavy", [Fraction(1, 2), Fraction(0), Fraction(1), Fraction(1, 3)])
def test_h2o_equals_a_loop_over_its_heads(share, heavy):
    n, end, H, G, d = 23, 31, 6, 2, 4
    generator = torch.Generator().manual_seed(5)
    q, k, v = (2 * torch.randn(1, heads, end, d, generator=generator).double()
               for heads in (H, G, G))
    cache = h2o(float(share), float(heavy))(Config(24, 1, H, G, d, 8, 8), end, q)
    pos = torch.arange(end)[None] * 3                   # with gaps, as after a drop
    outputs = []
    for part in (slice(0, n), *(slice(t, t + 1) for t in range(n, end))):
        rope = Rope(pos[:, part], None, None, None)
        outputs.append(cache.attend(q[:, :, part], k[:, :, part], v[:, :, part], rope))
    found = torch.cat(outputs, dim=2)[0].unflatten(0, (G, -1))      # (G, H/G, T, d)
    queries = q[0].unflatten(0, (G, -1)).transpose(1, 2)
    for g in range(G):
        want, held = one_head(queries[g], k[0, g], v[0, g], n, share, heavy)
        assert close(found[g].transpose(0, 1), want, 1e-9)
        assert torch.equal(cache.k[0, g, :cache.n], k[0, g, held])
