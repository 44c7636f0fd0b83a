"""A small picture of what a student's function does, in plain characters; for exercises.py.

Each is drawn from what the function itself returns, on the example of its docstring or near it.
"""
import math
from types import SimpleNamespace

import torch

ARROWS, SHADES, BARS = "→↗↑↖←↙↓↘", " ░▒▓█", "▁▂▃▄▅▆▇█"


def scaled(values, signs):
    """A character for each value, from 0 to the largest of them."""
    top = max(values) or 1
    return "".join(signs[round((len(signs) - 1) * value / top)] for value in values)


def places(held, n):
    return "".join("█" if i in held else "·" for i in range(n))


def rotate(f):
    """Where the first and the second pair of tokens at these positions point."""
    q, pos = torch.tensor([[[1.0, 1.0, 0.0, 0.0]] * 7]), torch.tensor([0, 1, 2, 4, 5, 8, 9])
    yield " ".join(map(str, pos.tolist()))
    found = f(q, pos, 100.0)[0]
    for pair in range(2):
        angles = torch.atan2(found[:, pair + 2], found[:, pair]).tolist()
        yield " ".join(ARROWS[round(4 * angle / math.pi) % 8] for angle in angles)


def saliency(f):
    """How salient the example's four tokens are."""
    x = torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0], [1.0, -2.0]])
    yield scaled(f(lambda x: (x ** 2).sum(), x, "norm_gx").tolist(), BARS)


def ranking_loss(f):
    """What each pair of four tokens costs; the second token's score is too low."""
    score, wanted = torch.tensor([3.0, 0.0, 2.0, 1.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    pairs = [[f(score[[i, j]], wanted[[i, j]]).item() if i < j else 0 for j in range(4)]
             for i in range(3)]
    yield from (scaled(row + [max(map(max, pairs))], SHADES)[:4] for row in pairs)


def select(f):
    """Of 24 tokens with scores like a wave 12 stay: two sinks, the last three, the wave's tops."""
    score = torch.sin(torch.arange(24.0))
    yield scaled((score + 1).tolist(), BARS)
    yield places(f(score, torch.arange(24), 12, 24, 2, 0.1).tolist(), 24)


def masked_attention(f):
    """Who sees whom: each row is a query, the third and the sixth token are dropped."""
    keep, zero = torch.ones(8), torch.zeros(1, 8, 1)
    keep[[2, 5]] = 0
    for row in f(zero, zero, torch.eye(8)[None], keep)[0].tolist():
        yield places({j for j, share in enumerate(row) if share > 1e-6}, 8)


def tokens_per_block(f):
    """How many of 40 tokens enter each of eight blocks."""
    for block, n in enumerate(f(40, 8, 1, 2, 3, 0.7, 2, 0.1), start=1):
        yield f"{block} {'█' * n}"


def flops(f):
    """A block's cost for 64, 128, ... 512 tokens: a line for the matrices, attention on top."""
    c = SimpleNamespace(dim=8, n_heads=8, n_kv_heads=8, head_dim=8, ffn=8, vocab=8)
    yield scaled([f(c, [n], "exact") for n in range(64, 513, 64)], BARS)


def decode(f):
    """Two tokens after a prompt of nine: the caches are ragged, and both grow by two."""
    one = torch.eye(2)
    caches = [(torch.ones(len(pos), 2), torch.ones(len(pos), 2), torch.tensor(pos))
              for pos in ([*range(9)], [0, 3, 4, 8], [0, 8])]
    for _, _, pos in f(torch.ones(2, 2), 9, [(one, one, one, one)] * 3, caches, 100.0)[1]:
        yield places(pos.tolist(), 11)
