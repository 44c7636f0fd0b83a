"""Token pruning at inference (Section 3.4): schedule, selection, drop, decode, Table 2's FLOPs.

Stage s comes after block b_s = first + step * (s - 1); stages and blocks are counted from 1. It
scores the tokens that leave that block, keeps the protected ones and the top-scored rest, and drops
the others from hidden states and positions: block b_s + 1 is the first to see, and to cache, fewer
tokens. So the caches are ragged: they hold different numbers of tokens from block to block.

    python prune.py --shape mistral-7b      # Table 2's FLOPs and cache sizes; loads no weights

Shapes: N prompt tokens (in nll and its response), n tokens now, k kept, D hidden, V vocabulary.
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import Config, KVCache, load
from predictor import NearPredictor, Predictor, predictor_width, score
from support import options, runs, show
from support.files import blame, need
from support.processes import join
from support.weights import DTYPES, shape_of


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
        need(self.first >= 1 and self.step >= 1 and 0 <= self.stages <= 1000 and self.sink >= 0,
             f"{self}: first and step count from 1, stages and sink from 0")
        need(0 < self.keep <= 1 and 0 <= self.local <= 1,
             f"{self}: keep lies in (0, 1], local in [0, 1]")

    def after(self, blocks):
        """The blocks (from 1) with a stage after them; none after the last of `blocks`."""
        end = self.first + self.step * self.stages
        return [b for b in range(self.first, end, self.step) if b < blocks]

    def share(self, s):
        """The share of the prompt that stage s keeps; stage 0 is the whole prompt."""
        return self.keep ** s

    def kept(self, N, s):
        """Tokens of N that survive stage s: r^s of N, never fewer than are protected."""
        fixed = min(N, self.sink + local_tokens(N, self.local))
        return max(fixed, round(self.share(s) * N))

    def leaving(self, left, N, blocks):
        """The same stages, which leave this share of N tokens, or so many, at the end."""
        share = min(1, left / N if left > 1 else left)
        return replace(self, keep=share ** (1 / max(1, len(self.after(blocks)))))

    def counts(self, N, blocks):
        """How many of a prompt's N tokens enter each of `blocks` blocks."""
        counts = [N] * blocks
        for s, b in enumerate(self.after(blocks), start=1):
            counts[b:] = [self.kept(N, s)] * (blocks - b)
        return counts

    @staticmethod
    def scaled(blocks):
        """The paper's schedule in proportion to another depth: about 35% kept at the end."""
        first = max(1, round(blocks / 8))
        step = max(1, round(3 * blocks / 32))
        stages = min(10, len(range(first, blocks, step)))
        keep = round(0.9 ** (10 / max(1, stages)), 2)
        return Schedule(first, step, stages, keep)


UNPRUNED = Schedule(stages=0)


def local_tokens(N, local):
    """How many last tokens of a prompt of N always stay: at least one, it predicts the answer."""
    return max(1, math.ceil(local * N - 1e-9))          # 0.07 * 100 is a little more than 7


def protected(pos, N, schedule):
    """Never dropped: the first tokens, the prompt's last ones, and all behind it: (1, n) bool."""
    start = N - local_tokens(N, schedule.local)
    return (pos < schedule.sink) | (pos >= start)


def select(scores, pos, k, N, schedule):
    """Which k tokens survive: scores and pos (1, n) -> increasing indices into the n, (k,).

    The protected survive, and the top-scored of the others. NaN ranks last, as -inf does; only
    protected tokens are +inf.
    """
    s = scores.float().nan_to_num(nan=-math.inf, neginf=-math.inf)
    s = s.masked_fill(protected(pos, N, schedule), math.inf)
    best = s.argsort(descending=True, stable=True)[0, :k]       # the earlier token wins a tie
    return best.sort().values                   # in reading order causal attention stays causal


class Stage(NamedTuple):
    """What one stage did."""
    block: int                      # it came after this block
    seen: torch.Tensor              # (1, n) positions before the drop
    scores: torch.Tensor            # (1, n) their scores
    kept: torch.Tensor              # (1, k) positions after the drop


def predictor_scorer(predictors):
    """The paper's scorer; any function (s from 1, x (1, n, D), pos (1, n)) -> (1, n) is one."""
    def scorer(s, x, pos):
        return score(predictors[s - 1](x, pos))
    return scorer


@torch.no_grad()
def prefill(model, tokens, schedule=UNPRUNED, scorer=None, room=0, cache=KVCache):
    """Read the prompt, dropping tokens stage by stage: tokens (1, N) -> logits, caches, trace.

    scorer: see `predictor_scorer`. room: free places in every cache, for tokens to come. cache: the
    kind of cache, KVCache or h2o(...). -> the last token's logits (1, V); L caches of the tokens
    that entered each block; a Stage for each stage. Raises ValueError for an empty or too long
    prompt, several rows, or stages without a scorer.
    """
    N = tokens.shape[1]
    need(N > 0, "the prompt is empty")
    need(len(tokens) == 1, f"one prompt is read at a time, not {len(tokens)}")
    stages = schedule.after(len(model.blocks))                      # their blocks, from 1
    need(scorer or not stages, "a schedule needs a scorer")
    pos = torch.arange(N, device=tokens.device)[None]               # (1, N) original positions
    rope = model.rope(pos, N)
    x = model.embed(tokens)                                         # (1, N, D)
    caches, trace = [], []
    for b, block in enumerate(model.blocks, start=1):
        caches.append(cache(block.c, x.shape[1] + room, x))
        x = block(x, rope, caches[-1].attend)                       # (1, n, D); the cache holds n
        if b in stages:
            s = len(trace) + 1
            scores = scorer(s, x, pos)                              # (1, n), Eq. 1
            index = select(scores, pos, schedule.kept(N, s), N, schedule)
            trace.append(Stage(b, pos, scores, pos[:, index]))
            x, pos = x[:, index], pos[:, index]                     # (1, k, D): physically shorter
            rope = model.rope(pos, N)                               # survivors keep their positions
    return model.logits(x[:, -1]), caches, trace


@torch.no_grad()
def extend(model, tokens, start, caches):
    """Decode: read n more tokens on the caches, ragged or not, which grow: (1, n) -> (1, n, V).

    start: the position where they begin, at first the prompt's original length.
    """
    end = start + tokens.shape[1]
    rope = model.rope(torch.arange(start, end, device=tokens.device)[None], end)
    x = model.embed(tokens)
    for block, cache in zip(model.blocks, caches):
        x = block(x, rope, cache.attend)
    return model.logits(x)


def check(trace):
    """Refuse scores that are not finite, which a ranking would hide; it waits for the device.

    trace: a Stage for each stage. -inf is a scorer's way to say last. Raises ValueError.
    """
    for s, stage in enumerate(trace, start=1):
        need((stage.scores < math.inf).all(), f"stage {s}, after block {stage.block}: a score is "
             "not finite: the weights are damaged, or too large for this type of number")


def nll(model, tokens, prompt_len, schedule=UNPRUNED, scorer=None):
    """Negative log-likelihood of each response token: tokens (1, N) -> (N - prompt_len,).

    The prompt is pruned; the response is read on its caches in one pass, which equals decode.
    """
    prompt, response = tokens[:, :prompt_len], tokens[:, prompt_len:]
    first, caches, trace = prefill(model, prompt, schedule, scorer, room=response.shape[1])
    check(trace)
    rest = extend(model, response[:, :-1], prompt_len, caches)
    logits = torch.cat((first, rest[0]))                            # (R, V)
    return F.cross_entropy(logits, response[0], reduction="none")


def flops(config, counts, accounting="exact", schedule=UNPRUNED, predictors=None):
    """FLOPs of a prefill in which counts[l] tokens enter block l; a multiply-add is 2.

    exact: grouped projections, causal pairs only, the head on the last token; with a `schedule`
    also its `predictors`, by default Predictors. What a sliding window saves is not counted. paper:
    Table 2's accounting, found by fitting its baselines: nothing grouped, embedding and head for
    every token, 3 D FLOPs for each pair of tokens and block.
    """
    D, V, W = config.dim, config.vocab, config.ffn
    if accounting == "paper":
        total = 4 * V * D * counts[0]                               # embedding and head
        for n in counts:
            total += 2 * (4 * D * D + 3 * D * W) * n
            total += 3 * D * n * n
        return total
    need(accounting == "exact", f"accounting is {accounting!r}, expected exact or paper")
    q = config.n_heads * config.head_dim
    kv = config.n_kv_heads * config.head_dim
    total = 2 * D * V                                               # the head
    for n in counts:
        total += 2 * n * D * (2 * q + 2 * kv + 3 * W)               # q, o, k, v; gate, up, down
        total += 4 * q * (n * (n + 1) // 2)                         # q k^T, weighted sum of v
    scored = predictor_width(D) * (D + 2)
    if predictors:
        scored = sum(p.numel() for p in predictors[0].parameters() if p.dim() == 2)
    for b in schedule.after(len(counts)):
        total += 2 * counts[b - 1] * scored
    return total


def kv_bytes(config, counts, bytes_per_value=2):
    """Bytes of all KV caches after a prefill."""
    return sum(counts) * 2 * config.n_kv_heads * config.head_dim * bytes_per_value


def flops_row(config, schedule, N):
    """Table 2's arithmetic for a prompt of N tokens; lists are [unpruned, SDTP], counts SDTP's."""
    row = {"n": N, "exact": [], "paper": [], "kv_bytes": []}
    for used in (UNPRUNED, schedule):
        counts = used.counts(N, config.n_blocks)
        row["exact"].append(flops(config, counts, schedule=used))
        row["paper"].append(flops(config, counts, "paper"))
        row["kv_bytes"].append(kv_bytes(config, counts))
    row["counts"] = counts
    return row


def load_predictors(path, model, schedule=None):
    """Read predictors made for `model` -> (nn.ModuleList on its device, in its dtype; metadata).

    path: the file, or its folder. metadata["schedule"] holds the fields of their Schedule. If
    another schedule is given, its stages stand after some of these blocks (the paper's SDTP-low:
    the first ones). Another keep ratio is fine: a ranking serves any.
    """
    path, stored, metadata = runs.read_predictors(path, model.config)
    with blame(path, "damaged predictors"):
        made = Schedule(**metadata["schedule"])
        width = stored["0.up.weight"].shape[0]
        kind = NearPredictor if "0.near.weight" in stored else Predictor
        predictors = nn.ModuleList(kind(model.config.dim, width) for _ in range(made.stages))
        predictors.load_state_dict(stored)
    places, asked = (each.after(len(model.blocks)) for each in (made, schedule or made))
    need({*asked} <= {*places},
         f"{path}: predictors stand after blocks {places}, the schedule asks for {asked}")
    used = nn.ModuleList(predictors[places.index(b)] for b in asked)
    return used.to(model.device, model.dtype), metadata


def load_pruning(args, split=None):
    """What a command prunes by -> model, schedule, predictors; split: see model.load.

    The schedule is what the options give, else the predictors' own, else the paper's, scaled.
    Without trained predictors they are None, for random:NAME untrained.
    """
    path, metadata = runs.find_predictors(args)
    model = load(args.ckpt, DTYPES.get(args.dtype), join(args.device), split)
    L, predictors = len(model.blocks), None
    made = Schedule(**metadata["schedule"]) if path else Schedule.scaled(L)
    schedule = replace(made, **options.schedule_options(args))
    if path:
        predictors, _ = load_predictors(path, model, schedule)
        runs.tell_other_weights(path, metadata, args.ckpt)
    elif args.ckpt.startswith("random:"):
        predictors = nn.ModuleList(Predictor(model.config.dim) for _ in schedule.after(L))
        predictors = predictors.to(model.device, model.dtype)
    return model, schedule, predictors


def main():
    args = options.prune_options(__doc__)
    config = Config(**shape_of(args.shape))
    schedule = replace(Schedule.scaled(config.n_blocks), **options.schedule_options(args))
    rows = [flops_row(config, schedule, N) for N in args.sizes]
    after = schedule.after(config.n_blocks)
    pruned = 1 - schedule.share(len(after))
    show.flops(args.shape, after, schedule.keep, pruned, rows)
    options.print_json(args, None, {"pruned": pruned, "rows": rows})


if __name__ == "__main__":
    options.cli(main)
