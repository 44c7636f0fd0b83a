"""Scorers to compare the predictors with: rules without training, and the gradient oracle.

A scorer is a function (stage from 0, x (B, n, D), pos (B, n)) -> scores (B, n); the highest stay.
"""
import math

import torch

from model import PAD, rotate, visible
from prune import predictor_scorer
from support.around import blended
from support.files import need

TRAINED = ("predictor", "prior", "neighbours")      # these need trained predictors
SCORERS = (*TRAINED, "random", "recent", "earliest", "norm", "attention", "attention16", "expected")


def make_scorer(name, model, schedule, predictors=None, seed=0, prior=0.0):
    """A scorer by its name on a command line.

    "prior" is the predictors with their calibrated prior, "neighbours" with their neighbours'
    ranks; the oracle is made by the caller.
    """
    need(name in SCORERS, f"unknown scorer {name!r}; there are {', '.join(SCORERS)}")
    if name in TRAINED:
        need(predictors is not None, "no trained predictors for this checkpoint: run train.py, or "
                                     "name a file with --predictors, or use --scorer")
        trained = predictor_scorer(predictors)
        if name == "neighbours":
            return with_neighbours(trained)
        return with_prior(trained, prior) if name == "prior" else trained
    if name == "attention16":
        return attention_scorer(model, schedule, last=16)
    if name == "attention":
        return attention_scorer(model, schedule)
    if name == "expected":
        return expected_scorer(model, schedule)
    if name == "random":
        return random_scorer(seed)
    return {"recent": recent_scorer, "earliest": earliest_scorer, "norm": norm_scorer}[name]()


def random_scorer(seed=0):
    """Any tokens: the floor."""
    generator = torch.Generator().manual_seed(seed)
    return lambda stage, x, pos: torch.rand(pos.shape, generator=generator).to(x.device)


def recent_scorer():
    """Keep the latest tokens."""
    return lambda stage, x, pos: pos.float()


def earliest_scorer():
    """Keep the first tokens."""
    return lambda stage, x, pos: -pos.float()


def norm_scorer():
    """Keep the tokens of the largest hidden state."""
    return lambda stage, x, pos: x.float().norm(dim=-1)


def attention_scorer(model, schedule, last=None, chunk=256):
    """The attention that a token would receive in the block after the stage.

    It is summed over heads and (the `last`) queries, `chunk` queries at a time.
    """
    after = schedule.after(len(model.blocks))

    def scorer(stage, x, pos):
        need(last is None or not (pos == PAD).any(),
             "the last queries of padded rows are not at the end: use prompts of one length")
        block = model.blocks[after[stage]]      # block b_s + 1: the list counts from 0
        need(block.c.n_heads == model.config.n_heads, "attention is not summed over the heads of "
             "other processes: leave out --tp or the attention scorers")
        q, k, _ = block.qkv(x, model.rope(pos, 0))
        n = pos.shape[1]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        received = torch.zeros(pos.shape, device=x.device)
        for i in range(max(0, n - last) if last else 0, n, chunk):
            queries = slice(i, i + chunk)
            a = (q[:, :, queries] @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
            see = visible(pos[:, queries], pos, model.config.window)
            weights = a.masked_fill(~see, -math.inf).softmax(-1)            # (B, H, chunk, n)
            real = pos[:, None, queries, None] < PAD    # padding attends, but does not count
            received += (weights * real).sum((1, 2))
        return received
    return scorer


def expected_scorer(model, schedule, future=512):
    """Expected attention: what the next `future` queries would give a token, times its value.

    The queries to come are taken for a Gaussian with the mean m and the covariance C of the
    prompt's own in the block after the stage, turned to the mean of their positions: the mean of
    exp(q . k / sqrt d) is exp(m . k / sqrt d + k . C k / 2 d). Its share among all tokens times the
    value's norm is summed over heads.
    """
    after = schedule.after(len(model.blocks))

    def scorer(stage, x, pos):
        need(not (pos == PAD).any(), "expected attention reads rows of one length")
        block = model.blocks[after[stage]]
        need(block.c.n_heads == model.config.n_heads, "expected attention is not summed over the "
             "heads of other processes: leave out --tp")
        _, k, v = block.qkv(x, model.rope(pos, 0))
        h = block.attn_norm(x)
        q = block.q_norm(block.q(h).unflatten(-1, (-1, block.c.head_dim)))
        q = q.transpose(1, 2).float()                                       # (B, H, n, d)
        mean = q.mean(2, keepdim=True)
        cov = (q - mean).mT @ (q - mean) / q.shape[2]                       # (B, H, d, d)
        end = pos.max().item() + 1
        rope = model.rope(torch.arange(end, end + future, device=x.device)[None], 0)
        cos, sin = (t.float().mean(2, keepdim=True) for t in (rope.cos, rope.sin))
        mean = rotate(mean, cos, sin)
        cov = rotate(rotate(cov, cos, sin).mT, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).float() for t in (k, v))
        d = q.shape[-1]
        logit = k @ mean.mT / math.sqrt(d)                                  # (B, H, n, 1)
        logit = logit[..., 0] + ((k @ cov) * k).sum(-1) / (2 * d)
        return (logit.softmax(-1) * v.norm(dim=-1)).sum(1)
    return scorer


def oracle_scorer(saliency):
    """The gradient saliency itself, (S, B, N): it needs the answer, so it is a ceiling."""
    return lambda stage, x, pos: saliency[stage].gather(1, pos)


def with_prior(scorer, weight):
    """Beyond the paper: the score's rank, 0 to 1, plus weight * (1 - pos / N).

    One hidden state hardly tells where in the prompt its token stands; a weight above 0 prefers
    early tokens.
    """
    if not weight:
        return scorer

    def scores(stage, x, pos):
        last = pos.where(pos < PAD, 0).amax(1, keepdim=True)    # the last token is never dropped
        return ranks(scorer(stage, x, pos), pos) + weight * (1 - pos / (last + 1))
    return scores


def with_neighbours(scorer, share=0.6, window=33):
    """Beyond the paper: (1 - share) * the score's rank + share * its mean over a window.

    What answers a question stands in one place: a token among salient ones is more likely to be
    needed than its own state says. window: odd, the token in its middle.
    """
    def scores(stage, x, pos):
        return blended(ranks(scorer(stage, x, pos), pos), pos < PAD, share, window)
    return scores


def ranks(scores, pos):
    """Each score's rank in its row, from 0 to below 1: (B, n); padding takes ranks below 0."""
    real = pos < PAD
    s = scores.masked_fill(~real, -math.inf)
    rank = s.argsort(dim=1, stable=True).argsort(1) - (~real).sum(1, keepdim=True)
    return rank / real.sum(1, keepdim=True)
