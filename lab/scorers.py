"""Scorers to compare the predictors with: rules without training, the field's other methods, and
the gradient oracle.

A scorer is a function (s from 1, x (1, n, D), pos (1, n)) -> scores (1, n); the highest stay. Some
methods have one cut instead of stages, before the first block or in the middle (`one_cut`), some
score the whole prompt in a pass of their own (`lookahead`, `early_layer`).

Shapes: n tokens of the N of a prompt, H query heads, G key/value heads, d head size.
"""
import math
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from infer import decode
from model import visible
from prune import Schedule, predictor_scorer, prefill, protected
from support.files import need

TRAINED = ("predictor", "neighbours")               # these need trained predictors
SCORERS = (*TRAINED, "random", "recent", "earliest", "norm", "attention")
FIELD = ("progressive", "middle")                   # scorers of the field's methods
AHEAD = 8                                           # tokens that a lookahead's draft says


def make_scorer(name, model, schedule, predictors=None, seed=0):
    """A scorer by its name on a command line.

    "neighbours" is the predictors with their neighbours' ranks; seed: that of random scores. The
    oracle is made by the caller. Raises ValueError for a trained one without predictors.
    """
    need(predictors is not None or name not in TRAINED, "no trained predictors for this "
         "checkpoint: run train.py, or name a file with --predictors, or use --scorers")
    trained = predictor_scorer(predictors)
    made = {"predictor": trained,
            "neighbours": with_neighbours(trained),
            "random": random_scorer(seed),
            "recent": recent,
            "earliest": earliest,
            "norm": norm,
            "attention": attention_scorer(model, schedule),
            "progressive": attention_scorer(model, schedule, last=1),       # LazyLLM, 2407.14057
            "middle": attention_scorer(model, schedule, last=8, pool=7)}    # FastKV, 2502.01068
    return made[name]


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


def attention(q, k, pos_q, pos_k, window=None):
    """What each query gives each key: q (1, H, n, d), k (1, G, m, d) -> (1, H, n, m) fp32."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logit = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    return logit.masked_fill(~visible(pos_q, pos_k, window), -math.inf).softmax(-1)


def averaged(scores, window):
    """The mean of each score and its neighbours, `window` (odd) in all, fewer at the ends: (1, n).
    """
    return F.avg_pool1d(scores, window, 1, window // 2, count_include_pad=False)


def attention_scorer(model, schedule, last=None, pool=1, chunk=256):
    """The attention that a token would receive in the block after the stage.

    It is summed over heads and (the `last`) queries, `chunk` queries at a time, and averaged over
    `pool` neighbours.
    """
    after = schedule.after(len(model.blocks))

    def scorer(s, x, pos):
        rope = model.rope(pos, model.config.max_positions)  # the last position is not waited for
        q, k, _ = model.blocks[after[s - 1]].qkv(x, rope)   # the list counts from 0
        first = -(last or pos.shape[1])
        received = torch.zeros(pos.shape, device=x.device)
        for some, at in zip(q[:, :, first:].split(chunk, 2), pos[:, first:].split(chunk, 1)):
            received += attention(some, k, at, pos, rope.window).sum((1, 2))
        return averaged(received, pool)
    return scorer


def oracle_scorer(saliency):
    """The gradient saliency itself, (S, N): it needs the answer, so it is a ceiling."""
    return lambda s, x, pos: saliency[s - 1][pos]


# ------------------------------------------------------------------- scores of the whole prompt


@torch.no_grad()
def lookahead(draft, tokens, said=None):
    """Speculative prefill (2502.02789): what the tokens that a draft model says next look at.

    A token's score is the attention that it receives from each of AHEAD greedy tokens, averaged
    over 13 neighbours, the highest of all heads and blocks, and then the mean over the tokens:
    tokens (1, N) -> (1, N). The draft reads the whole prompt; its tokenizer is the model's.
    said (1, n): such tokens that are known, the reference answer's, instead.
    """
    N, new = tokens.shape[1], AHEAD if said is None else said.shape[1]
    logits, caches, _ = prefill(draft, tokens, room=new)
    if said is None:
        said = tokens.new_tensor([list(islice(decode(draft, logits, caches, N), new))])
    pos = torch.arange(N + new, device=draft.device)[None]
    rope, x, best = draft.rope(pos[:, N:], N + new), draft.embed(said), logits.new_zeros(())
    for block, cache in zip(draft.blocks, caches):
        cache.n = N                 # decode has read all but the last of them: once more, together
        q, _, _ = block.qkv(x, rope)
        x = block(x, rope, cache.attend)
        given = attention(q, cache.k, pos[:, N:], pos, rope.window)[0, ..., :N]     # (H, new, N)
        best = torch.maximum(best, averaged(given, 13).amax(0))
    return best.mean(0, keepdim=True)


@torch.no_grad()
def early_layer(model, tokens, b, last=1):
    """The attention that the `last` tokens of a prompt give each of its tokens in block b + 1.

    The b blocks before it read the whole prompt: (1, N) -> (1, N).
    GemFilter (2409.17422): last 1 and b 13/32 of the blocks; the chosen tokens are then read from
    the first block on, as a shorter text. UniPrefill (2605.06221): see `enough`.
    """
    N = tokens.shape[1]
    pos = torch.arange(N, device=tokens.device)[None]
    rope, x = model.rope(pos, N), model.embed(tokens)
    for block in model.blocks[:b]:
        x = block(x, rope)
    q, k, _ = model.blocks[b].qkv(x, rope)
    return attention(q[:, :, -last:], k, pos[:, -last:], pos, rope.window).sum((1, 2))


def enough(scores, mass):
    """How many of the highest scores (1, N), of 0 or more, add up to a share `mass` of all.

    UniPrefill keeps so many: as few as the prompt allows, another number for each.
    """
    summed = scores[0].sort(descending=True).values.cumsum(0)
    return int((summed < mass * summed[-1]).sum()) + 1


# How many queries' attention a scorer asks for; None: all.
QUERIES = {"attention": None, "progressive": 1, "middle": 8, "adaptive": 128}


def scorer_flops(name, config, schedule, counts):
    """What an attention rule's own products cost, at all stages; 0 for the other scorers."""
    q, kv = (heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads))
    total = 0
    for b in schedule.after(len(counts)) if name in QUERIES else ():
        n = counts[b - 1]
        total += 2 * n * config.dim * (q + 2 * kv) + 2 * q * n * min(QUERIES[name] or n, n)
    return total


def by_chunks(scores, size):
    """Scores of whole chunks of a prompt, so that neighbours stay together: (1, N) -> (1, N)."""
    N = scores.shape[1]
    chunk = torch.arange(N, device=scores.device) // size
    means = scores.new_zeros(1, N).index_add_(1, chunk, scores) / chunk.bincount(minlength=N)
    return means[:, chunk]


def known_scorer(scores):
    """Scores of the prompt's tokens, (1, N), that were known before the prompt was read."""
    return lambda s, x, pos: scores[:, pos[0]]


class Front(nn.Module):
    """A block that changes nothing and caches nothing."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x, rope, attend):
        return x


class Fronted:
    """A model with such a block in front: a stage after it drops tokens before the first block.

    The survivors keep their positions. It is what prune.prefill and prune.extend ask of a model.
    """

    def __init__(self, model):
        self.blocks = [Front(model.blocks[0].c), *model.blocks]
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.embed, self.logits, self.rope = model.embed, model.logits, model.rope
        self.check_positions = model.check_positions


# --------------------------------------------------------------------------------- beyond the paper


def with_neighbours(scorer, share=0.6, window=33):
    """(1 - share) * the score's rank + share * the mean rank of the tokens in a window around.

    What answers a question stands in one place: a token among salient ones is more likely to be
    needed than its own state says. window: odd, the token in its middle.
    """
    def scores(s, x, pos):
        rank = ranks(scorer(s, x, pos))
        return (1 - share) * rank + share * averaged(rank, window)
    return scores


def ranks(scores):
    """Each score's rank in its row, from 0 to below 1: (1, n) -> (1, n)."""
    return scores.argsort(dim=1, stable=True).argsort(1) / scores.shape[1]


# ---------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Shares(Schedule):
    """A Schedule whose stage s keeps the share shares[s - 1] of the prompt."""
    shares: tuple = ()

    def share(self, s):
        return self.shares[s - 1]


def by_mass(model, tokens, schedule, scorer, mass):
    """The same stages for one prompt (1, N), each with as few tokens as hold `mass` of the softmax
    of the scores that compete there, so that clear-cut prompts lose more than others.

    The prompt is read once to learn these numbers.
    """
    N, shares = tokens.shape[1], []
    found = Shares(**vars(schedule), shares=shares)

    def counting(s, x, pos):
        scores, fixed = scorer(s, x, pos), protected(pos, N, schedule)
        compete = scores.masked_fill(fixed, -math.inf).softmax(-1)
        shares.append(min(pos.shape[1], int(fixed.sum()) + enough(compete, mass)) / N)
        return scores
    prefill(model, tokens, found, counting)
    return found


def one_cut(schedule, blocks, after=None):
    """One stage that costs as much: it leaves as many tokens in the mean block.

    after: the block that it stands after, 0 for before the first; the schedule's first stage by
    default. A schedule without stages stays. Raises ValueError where a cut there comes too late.
    """
    places = schedule.after(blocks)
    if not places:
        return schedule
    after = places[0] if after is None else after
    many = 10**6                    # tokens of a prompt so long that no protected one matters
    keep = (sum(schedule.counts(many, blocks)) / many - after) / (blocks - after)
    need(keep > 0, f"one cut after block {after} of {blocks} leaves more tokens than the schedule")
    return replace(schedule, first=max(1, after), stages=1, keep=keep)
