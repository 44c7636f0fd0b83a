"""Scorers to compare the predictors with: rules without training, and the gradient oracle.

A scorer is a function (s from 1, x (1, n, D), pos (1, n)) -> scores (1, n); the highest stay.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from model import rotate, visible
from prune import predictor_scorer
from support.files import need

TRAINED = ("predictor", "prior", "neighbours")      # these need trained predictors
SCORERS = (*TRAINED, "random", "recent", "earliest", "norm", "attention", "attention16", "expected")


def make_scorer(name, model, schedule, predictors=None, seed=0):
    """A scorer by its name on a command line.

    "prior:W" is the predictors with a preference of weight W for early tokens ("prior": 0.5),
    "neighbours" the predictors with their neighbours' ranks; seed: that of random scores. The
    oracle is made by the caller. Raises ValueError for a trained one without predictors.
    """
    kind, _, weight = name.partition(":")
    need(predictors is not None or kind not in TRAINED, "no trained predictors for this "
         "checkpoint: run train.py, or name a file with --predictors, or use --scorers")
    trained = predictor_scorer(predictors)
    made = {"predictor": trained,
            "prior": with_prior(trained, float(weight or 0.5)),
            "neighbours": with_neighbours(trained),
            "random": random_scorer(seed),
            "recent": recent,
            "earliest": earliest,
            "norm": norm,
            "attention": attention_scorer(model, schedule),
            "attention16": attention_scorer(model, schedule, last=16),
            "expected": expected_scorer(model, schedule)}
    return made[kind]


def random_scorer(seed=0):
    """Any tokens: the floor."""
    generator = torch.Generator().manual_seed(seed)
    return lambda s, x, pos: torch.rand(pos.shape, generator=generator).to(x.device)


def recent(s, x, pos):
    """Keep the latest tokens."""
    return pos.float()


def earliest(s, x, pos):
    """Keep the first tokens."""
    return -pos.float()


def norm(s, x, pos):
    """Keep the tokens of the largest hidden state."""
    return x.float().norm(dim=-1)


# --------------------------------------------------------------------------------------- attention


def entered(model, schedule, s, pos):
    """The block that stage s stands before, and the Rope of the tokens that enter it."""
    b = schedule.after(len(model.blocks))[s - 1]
    # the list counts from 0; the last position is on the device, and not waited for
    return model.blocks[b], model.rope(pos, model.config.max_positions)


def attention_scorer(model, schedule, last=None, chunk=256):
    """The attention that a token would receive in the block after the stage.

    It is summed over heads and (the `last`) queries, `chunk` queries at a time.
    """
    def scorer(s, x, pos):
        block, rope = entered(model, schedule, s, pos)
        q, k, _ = block.qkv(x, rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)            # (1, H, n, d)
        first = -(last or pos.shape[1])
        received = torch.zeros(pos.shape, device=x.device)
        for some, at in zip(q[:, :, first:].split(chunk, 2), pos[:, first:].split(chunk, 1)):
            logit = (some @ k.mT).float() / math.sqrt(q.shape[-1])      # (1, H, chunk, n)
            see = visible(at, pos, rope.window)
            received += logit.masked_fill(~see, -math.inf).softmax(-1).sum((1, 2))
        return received
    return scorer


def expected_scorer(model, schedule, future=512):
    """Expected attention: what the next `future` queries would give a token, times its value.

    The queries to come are taken for a Gaussian with the mean m and the covariance C of the
    prompt's own in the block after the stage, turned to the mean of their positions: the mean of
    exp(q . k / sqrt d) is exp(m . k / sqrt d + k . C k / 2 d). Its share among all tokens times the
    value's norm is summed over heads.
    """
    def scorer(s, x, pos):
        block, rope = entered(model, schedule, s, pos)
        q, k, v = block.qkv(x, rope)
        end = pos[0, -1] + 1
        ahead = model.rope(end + torch.arange(future, device=x.device)[None], 0)    # angles alone
        cos, sin = (t.float().mean(2, keepdim=True) for t in (ahead.cos, ahead.sin))
        q = rotate(rotate(q, rope.cos, -rope.sin).float(), cos, sin)    # back to 0, then ahead
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).float() for t in (k, v))
        n, d = q.shape[2:]
        mean = q.mean(2, keepdim=True)                                  # (1, H, 1, d)
        cov = (q - mean).mT @ (q - mean) / n                            # (1, H, d, d)
        logit = (k @ mean.mT)[..., 0] / math.sqrt(d)                    # (1, H, n)
        logit = logit + ((k @ cov) * k).sum(-1) / (2 * d)
        return (logit.softmax(-1) * v.norm(dim=-1)).sum(1)
    return scorer


def oracle_scorer(saliency):
    """The gradient saliency itself, (S, N): it needs the answer, so it is a ceiling."""
    return lambda s, x, pos: saliency[s - 1][pos]


# --------------------------------------------------------------------------------- beyond the paper


def with_prior(scorer, weight):
    """The score's rank, 0 to 1, plus weight * (1 - pos / N).

    One hidden state hardly tells where in the prompt its token stands; a weight above 0 prefers
    early tokens. A run of lab.quality on --split validation tells which weight is best.
    """
    def scores(s, x, pos):
        N = pos[:, -1:] + 1                     # the last token is never dropped
        return ranks(scorer(s, x, pos)) + weight * (1 - pos / N)
    return scores


def with_neighbours(scorer, share=0.6, window=33):
    """(1 - share) * the score's rank + share * the mean rank of the tokens in a window around.

    What answers a question stands in one place: a token among salient ones is more likely to be
    needed than its own state says. window: odd, the token in its middle.
    """
    def scores(s, x, pos):
        rank = ranks(scorer(s, x, pos))
        sums, counts = (F.avg_pool1d(each, window, 1, window // 2)      # fewer at the ends of a row
                        for each in (rank, torch.ones_like(rank)))
        return (1 - share) * rank + share * sums / counts
    return scores


def ranks(scores):
    """Each score's rank in its row, from 0 to below 1: (1, n) -> (1, n)."""
    return scores.argsort(dim=1, stable=True).argsort(1) / scores.shape[1]


# ---------------------------------------------------------------------------------------- schedules


def one_cut(schedule, blocks):
    """One stage, after the same block as the schedule's first, that costs as much.

    It leaves what the schedule leaves in the mean of the blocks behind it. A schedule without
    stages stays.
    """
    after = schedule.after(blocks)
    if not after:
        return schedule
    many = 10**6                    # tokens of a prompt so long that no protected one matters
    behind = schedule.counts(many, blocks)[after[0]:]
    return replace(schedule, stages=1, keep=sum(behind) / len(behind) / many)
