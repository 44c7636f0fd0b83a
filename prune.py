"""Token pruning at inference (Section 3.4): schedule, selection, drop, decode, Table 2's FLOPs.

Stage s comes after block b_s = first + step * (s - 1), blocks counted from 1. It scores the tokens
that leave that block, keeps the protected ones and the top-scored rest, and drops the others from
hidden states and positions: block b_s + 1 is the first to see, and to cache, fewer tokens. So the
caches are ragged: they hold different numbers of tokens from block to block.

    python prune.py --shape mistral-7b      # Table 2's FLOPs and cache sizes; loads no weights

Shapes: B rows, N prompt tokens, n tokens now, k kept, D hidden, L blocks, S stages, V vocabulary.
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import PAD, Config, KVCache, beyond, per_row, positions
from predictor import predictor_width, score
from support.checkpoint import PUBLISHED, shape_of
from support.checks import check_prompts, check_schedule
from support.files import need
from support.options import cli, print_json, schedule_options
from support.parsers import prune_parser
from support.printing import print_flops
from support.sampling import finite


@dataclass(frozen=True)
class Schedule:
    """Where the stages are, and how many tokens survive each: the paper's for 32 blocks."""
    first: int = 4                  # the first stage comes after this block
    step: int = 3                   # blocks from one stage to the next
    stages: int = 10                # S
    keep: float = 0.9               # r: stage s keeps the share r^s of the prompt
    sink: int = 4                   # the first tokens, always kept
    local: float = 0.1              # the share of last tokens, always kept

    def __post_init__(self):
        check_schedule(self)

    def after(self, blocks):
        """The blocks (from 1) with a stage after them; none after the last of `blocks`."""
        end = self.first + self.step * self.stages
        places = range(self.first, end, self.step)
        return [b for b in places if b < blocks]

    def share(self, stage):
        """The share of the prompt that stage 1, 2, ... keeps; stage 0 is the whole prompt."""
        return self.keep ** stage

    def kept(self, n, stage):
        """Tokens of n that survive stage 1, 2, ...: r^s of n, never fewer than are protected."""
        fixed = self.sink + local_tokens(n, self.local)
        target = round(self.share(stage) * n)
        return max(target, min(n, fixed))

    def counts(self, n, blocks):
        """How many of a prompt's n tokens enter each of `blocks` blocks."""
        counts = [n] * blocks
        for stage, b in enumerate(self.after(blocks), start=1):
            left = self.kept(n, stage)
            counts[b:] = [left] * (blocks - b)
        return counts

    @staticmethod
    def scaled(blocks):
        """The paper's schedule in proportion to another depth: about 35% kept at the end."""
        first = max(1, round(blocks / 8))
        step = max(1, round(3 * blocks / 32))
        places = range(first, blocks, step)
        stages = min(10, len(places))
        keep = round(0.9 ** (10 / max(1, stages)), 2)
        return Schedule(first, step, stages, keep)


UNPRUNED = Schedule(stages=0)


def local_tokens(n, local):
    """How many last tokens of a prompt of n always stay: at least one, it predicts the answer."""
    tokens = math.ceil(local * n - 1e-9)            # 0.07 * 100 is a little more than 7
    return max(1, tokens)


def protected(pos, prompt_len, sink, local):
    """Never dropped: the first `sink` tokens, the prompt's last share `local`, all past the prompt.

    pos (B, n) and B prompt lengths -> (B, n) bool. Padding, at PAD, is not protected.
    """
    starts = [p - local_tokens(p, local) for p in prompt_len]
    starts = torch.tensor(starts, device=pos.device)
    late = pos >= starts[:, None]
    return (pos < sink) | (late & (pos < PAD))


def candidates(pos, prompt_len, schedule):
    """The tokens that may be dropped: not protected, and no padding: (B, n) bool."""
    fixed = protected(pos, prompt_len, schedule.sink, schedule.local)
    return (pos < PAD) & ~fixed


def select(scores, pos, k, prompt_len, sink=4, local=0.1):
    """Which tokens survive: scores and pos (B, n) -> increasing indices into the n, (B, max k).

    k and prompt_len are ints, or lists with one for each row. The protected survive, the top-scored
    fill up to k; among equal scores the earlier token wins, on every device. Past its own k a row
    has fillers, other indices, which the caller hides.
    """
    B, n = scores.shape
    k = per_row(k, B)
    prompt_len = per_row(prompt_len, B)
    # Only the protected are +inf. Not a number counts as -inf, and -inf stays.
    s = scores.float()
    s = s.nan_to_num(nan=-math.inf, neginf=-math.inf)
    fixed = protected(pos, prompt_len, sink, local)
    s = s.masked_fill(fixed, math.inf)
    s = s.masked_fill(pos == PAD, -math.inf)
    order = s.argsort(dim=1, descending=True, stable=True)
    best = order[:, :max(k)]
    # Sorted: in reading order causal attention stays causal. Fillers go last: + n, then % n.
    filler = beyond(k, pos.device)
    best = best + n * filler
    return best.sort(dim=1).values % n


def drop(x, pos, index):
    """Keep only the tokens at index (B, k): x (B, n, D) -> (B, k, D), pos (B, n) -> (B, k)."""
    features = index[:, :, None]
    features = features.expand(-1, -1, x.shape[2])
    return x.gather(1, features), pos.gather(1, index)


class Stage(NamedTuple):
    """What one stage did."""
    block: int                      # it came after this block
    seen: torch.Tensor              # (B, n) positions before the drop
    score: torch.Tensor             # (B, n) their scores
    kept: torch.Tensor              # (B, k) positions after the drop


def predictor_scorer(predictors):
    """The paper's scorer; any function (stage from 0, x (B, n, D), pos (B, n)) -> (B, n) is one."""
    def scorer(stage, x, pos):
        logits = predictors[stage](x, pos)
        return score(logits)
    return scorer


@torch.no_grad()
def prefill(model, tokens, schedule=None, scorer=None, room=0, cache=KVCache, lengths=None):
    """Read the prompt, dropping tokens stage by stage: tokens (B, N) -> logits, caches, trace.

    schedule: where tokens are dropped; None: nowhere. scorer: see `predictor_scorer`. room: free
    places in every cache, for tokens to come. cache: the kind of cache. lengths: B prompt lengths
    of rows padded on the right; each is pruned by its own counts, and its padding stands at PAD.
    -> the last token's logits (B, V); L caches of the tokens that entered each block; a Stage for
    each stage. Raises ValueError for an empty or too long prompt, or stages without a scorer.
    """
    B, N = tokens.shape
    schedule = schedule or UNPRUNED
    stages = schedule.after(len(model.blocks))
    need(scorer or not stages, "a schedule needs a scorer")
    lengths = per_row(lengths or N, B)
    check_prompts(lengths, B, N)
    left = lengths                                                  # tokens that each row has now
    pos = positions(tokens, lengths)
    rope = model.rope(pos, N)
    x = model.embed(tokens)                                         # (B, N, D)
    caches, trace = [], []
    for i, block in enumerate(model.blocks, start=1):
        padded = min(left) < max(left)
        capacity = max(left) + room
        memory = cache(block.c, B, capacity, x.device, x.dtype, padded)
        caches.append(memory)
        x = block(x, rope, memory.attend)                           # (B, n, D)
        if i in stages:
            stage = len(trace)
            scores = scorer(stage, x, pos)                          # (B, n)
            left = [schedule.kept(m, stage + 1) for m in lengths]
            index = select(scores, pos, left, lengths, schedule.sink, schedule.local)
            x, kept = drop(x, pos, index)                           # (B, k, D): physically shorter
            kept = kept.masked_fill(beyond(left, x.device), PAD)
            trace.append(Stage(i, pos, scores, kept))
            pos, rope = kept, model.rope(kept, N)                   # original positions
    ends = [n - 1 for n in left]
    last = x[range(B), ends]                                        # (B, D) always kept
    return model.logits(last), caches, trace


@torch.no_grad()
def extend(model, tokens, start, caches, end=None):
    """Decode: read n more tokens on the caches, ragged or not, which grow: (B, n) -> (B, n, V).

    start: where they begin, at first the prompt's original length: an int, or (B, 1) on the device
    with `end`, an int past all of them.
    """
    if end is None:
        end = start + tokens.shape[1]
    pos = start + positions(tokens)
    rope = model.rope(pos, end)
    x = model.embed(tokens)
    for block, cache in zip(model.blocks, caches):
        x = block(x, rope, cache.attend)
    return model.logits(x)


def nll(model, tokens, prompt_len, schedule=None, scorer=None):
    """Negative log-likelihood of each response token: tokens (B, N) -> (B, N - prompt_len).

    The prompt is pruned; the response is read on its caches in one pass, which equals decode.
    Raises ValueError for logits that are not finite.
    """
    prompt = tokens[:, :prompt_len]
    response = tokens[:, prompt_len:]
    R = response.shape[1]
    logits, caches, _ = prefill(model, prompt, schedule, scorer, room=R)
    logits = logits[:, None]                                        # (B, 1, V)
    if R > 1:
        more = extend(model, response[:, :-1], prompt_len, caches)
        logits = torch.cat((logits, more), dim=1)
    logits = finite(model, logits.flatten(0, 1))
    losses = F.cross_entropy(logits, response.flatten(), reduction="none")
    return losses.view(response.shape)


def flops(config, counts, accounting="exact", schedule=None):
    """FLOPs of a prefill in which counts[l] tokens enter block l; a multiply-add is 2.

    exact: grouped projections, causal pairs only, the head on the last token; with a `schedule`
    also its predictors. What a sliding window saves is not counted. paper: Table 2's accounting,
    found by fitting its baselines: nothing grouped, embedding and head for every token, 3 D FLOPs
    for each pair of tokens and block.
    """
    D, V = config.dim, config.vocab
    W = config.ffn                                                  # the paper's F
    if accounting == "paper":
        total = 4 * V * D * counts[0]                               # embedding and head
        weights = 4 * D * D + 3 * D * W
        for n in counts:
            total += 2 * weights * n
            total += 3 * D * n * n
        return total
    need(accounting == "exact", f"accounting is {accounting!r}, expected exact or paper")
    q = config.n_heads * config.head_dim
    kv = config.n_kv_heads * config.head_dim
    total = 2 * D * V                                               # the head
    weights = D * (2 * q + 2 * kv + 3 * W)                          # q, o, k, v; gate, up, down
    for n in counts:
        pairs = n * (n + 1) // 2
        total += 2 * n * weights
        total += 4 * q * pairs                                      # q k^T, weighted sum of v
    stages = schedule.after(len(counts)) if schedule else []
    for b in stages:
        total += 2 * counts[b - 1] * predictor_width(D) * (D + 2)
    return total


def kv_bytes(config, counts, bytes_per_value=2):
    """Bytes of all KV caches after a prefill."""
    values = 2 * config.n_kv_heads * config.head_dim
    return sum(counts) * values * bytes_per_value


def flops_row(config, schedule, n):
    """Table 2's arithmetic for a prompt of n tokens; each list is [unpruned, SDTP]."""
    row = {"n": n, "exact": [], "paper": [], "kv_bytes": []}
    for used in (UNPRUNED, schedule):
        counts = used.counts(n, config.n_blocks)
        row["exact"].append(flops(config, counts, schedule=used))
        row["paper"].append(flops(config, counts, "paper"))
        row["kv_bytes"].append(kv_bytes(config, counts))
        row["counts"] = counts                                      # SDTP's stay
    return row


def main():
    args = prune_parser(__doc__, PUBLISHED).parse_args()
    config = Config(**shape_of(args.shape))
    L = config.n_blocks
    schedule = replace(Schedule.scaled(L), **schedule_options(args))
    rows = [flops_row(config, schedule, n) for n in args.lengths]
    print_flops(args.shape, schedule, L, rows)
    stages = len(schedule.after(L))
    pruned = 1 - schedule.share(stages)
    print_json(args, None, {"pruned": pruned, "rows": rows})


if __name__ == "__main__":
    cli(main)
