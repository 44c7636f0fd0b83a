"""The exercises' solutions: the repository's own functions, with the arguments of exercises.py.

    python -m pytest tests/test_exercises.py --impl=tests/solutions.py
"""
from types import SimpleNamespace

import torch

import model as m
import predictor
import prune
import saliency as gradients


def llama(d, theta, **more):
    """One head of d features."""
    fields = {"dim": d, "n_blocks": 1, "n_heads": 1, "n_kv_heads": 1, "ffn": 1, **more}
    return m.Llama(m.Config(**fields, head_dim=d, vocab=1, rope_theta=theta))


def rotate(q, pos, theta):
    rope = llama(q.shape[-1], theta).rope(pos[None], int(pos[-1]) + 1)
    return m.rotate(q[None], rope.cos, rope.sin)[0]


@torch.enable_grad()
def saliency(f, x, reduce):
    x = x.detach().clone().requires_grad_()
    g, = torch.autograd.grad(f(x), x)
    return gradients.reduce_saliency(g, x.detach(), reduce)


def select(score, pos, k, N, sink, local):
    return prune.select(score[None], pos[None], k, N, prune.Schedule(sink=sink, local=local))


def masked_attention(q, k, v, keep):
    rope = m.Rope(torch.arange(len(keep))[None], cos=None, sin=None, window=None)
    return m.masked_attention(q[None], k[None], v[None], rope, keep[None])[0]


def tokens_per_block(n, blocks, *schedule):
    return prune.Schedule(*schedule).counts(n, blocks)


class Whole:
    """A block of exercise 9 as prune.py calls one."""

    def __init__(self, block, x):
        k = block.project(x)[1]
        self.block, self.c = block, SimpleNamespace(n_kv_heads=len(k), head_dim=k.shape[-1])

    def __call__(self, x, rope, attend):
        q, k, v = (each[None] for each in self.block.project(x[0]))
        q, k = (m.rotate(each, rope.cos, rope.sin) for each in (q, k))
        return self.block.finish(x[0], attend(q, k, v, rope)[0])[None]


def model_of(blocks, x, theta):
    """Blocks of exercise 9 as a model, whose tokens have the states x."""
    whole = [Whole(block, x) for block in blocks]
    return SimpleNamespace(blocks=whole, embed=lambda tokens: x[None], logits=lambda x: x,
                           rope=llama(whole[0].c.head_dim, theta).rope)


def one_head(*matrices, Wo):
    """A block of exercise 8 as exercise 9 has them."""
    return SimpleNamespace(project=lambda x: [(x @ W.T)[None] for W in matrices],
                           finish=lambda x, y: x + y[0] @ Wo.T)


@torch.no_grad()
def decode(x, N, blocks, caches, theta):
    """prune.extend itself, all new tokens in one pass."""
    model = model_of([one_head(*matrices, Wo=Wo) for *matrices, Wo in blocks], x, theta)
    longer = []
    for block, (k, v, pos) in zip(model.blocks, caches):
        longer.append(m.KVCache(block.c, len(pos) + len(x), x))
        longer[-1].append(k[None, None], v[None, None], pos[None])
    x = prune.extend(model, x[None], N, longer)[0]
    return x, [(cache.k[0, 0], cache.v[0, 0], cache.pos[0]) for cache in longer]


@torch.no_grad()
def prefill(x, blocks, scorer, schedule, theta):
    """prune.prefill itself."""
    def one_row(s, x, pos):
        return scorer(s, x[0], pos[0])[None]
    last, caches, _ = prune.prefill(model_of(blocks, x, theta), x[None],
                                    prune.Schedule(*schedule), one_row)
    return last[0], [(cache.k[0], cache.v[0], cache.pos[0]) for cache in caches]


ranking_loss = predictor.ranking_loss
flops = prune.flops
