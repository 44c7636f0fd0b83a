"""Hierarchical token pruning at inference (Section 3.4): schedule, selection, physical drop, ragged caches, accounting.

A stage stands after block b_s = first + step * (s - 1), blocks counted from 1. It scores the tokens that leave that
block, keeps the protected ones and the top-scored rest, and drops the others from the hidden states and positions:
block b_s + 1 is the first to see, and to cache, fewer tokens.

    python prune.py --shape mistral-7b          # tokens per block, FLOPs and KV bytes of Table 2; loads no weights

Shapes: B rows, N prompt tokens, n tokens now, k tokens kept, D hidden, L blocks, S stages.
"""
import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import at_least, cli
from model import PAD, SHAPES, Config, KVCache, find, need, positions, visible
from predictor import hidden_size, score


@dataclass(frozen=True)
class Schedule:
    """Where the stages stand and how many tokens survive each; the defaults are the paper's for 32 blocks."""
    first: int = 4                  # the first stage stands after this block
    step: int = 3                   # blocks from one stage to the next
    stages: int = 10                # S
    keep: float = 0.9               # r: stage s keeps the share r^s of the prompt
    sink: int = 4                   # the first tokens, always kept
    local: float = 0.1              # the share of last tokens, always kept
    shares: tuple = ()              # beyond the paper: the share of the prompt that each stage keeps, instead of r^s

    def __post_init__(self):
        object.__setattr__(self, "shares", tuple(self.shares))       # a list, after a trip through JSON
        need(not self.shares or len(self.shares) == self.stages and all(type(v) in (int, float) and 0 < v <= 1 for v in self.shares)
             and list(self.shares) == sorted(self.shares, reverse=True), f"{self}: shares are one number in (0, 1] a stage, never rising")
        need(all(type(v) is int for v in (self.first, self.step, self.stages, self.sink)) and all(type(v) in (int, float) for v in (self.keep, self.local)),
             f"{self}: first, step, stages and sink are whole numbers, keep and local shares")
        need(self.first >= 1 and self.step >= 1 and 0 <= self.stages <= 1000, f"{self}: first and step count from 1, stages from 0 to 1000")
        need(0 < self.keep <= 1 and 0 <= self.sink < PAD and 0 <= self.local <= 1, f"{self}: keep lies in (0, 1], local in [0, 1]")

    def after(self, blocks):
        """The blocks (from 1) that carry a stage, of `blocks` in all; stages past the last block fall away."""
        return [b for b in (self.first + self.step * s for s in range(self.stages)) if b < blocks]

    def kept(self, n, stage):
        """Tokens of a prompt of n that survive stage 1, 2, ...: a share of the prompt, not of what is left."""
        protected = min(n, self.sink + local_tokens(n, self.local))
        return max(protected, round(self.share(stage) * n))

    def share(self, stage):
        """Of the prompt, kept by stage 1, 2, ...; stage 0 is the whole prompt."""
        return self.shares[stage - 1] if self.shares and stage else self.keep ** stage

    def counts(self, n, blocks):
        """Tokens of a prompt of n that enter each of `blocks` blocks."""
        after = self.after(blocks)
        return [n if not (s := sum(b < i for b in after)) else self.kept(n, s) for i in range(1, blocks + 1)]

    @staticmethod
    def scaled(blocks):
        """The paper's schedule in proportion to another depth: 4 + 3s of 32 blocks, about 35% kept by the last stage."""
        first, step = max(1, round(blocks / 8)), max(1, round(3 * blocks / 32))
        stages = len(range(first, blocks, step)[:10])
        return Schedule(first, step, stages, round(0.9 ** (10 / max(1, stages)), 2))

    @property
    def pruned(self):
        """Share of the prompt dropped by the last stage, where all stages stand before the model's last block."""
        return 1 - self.share(self.stages)


def local_tokens(prompt_len, local):
    """The last tokens that are always kept; at least one, because the last token's output is the answer's first token."""
    return max(1, math.ceil(local * prompt_len - 1e-9))


class Stage(NamedTuple):
    """What one stage did: the token positions it saw, their scores, and the positions it kept."""
    block: int                      # it stands after this block, counted from 1
    seen: torch.Tensor              # (B, n)
    score: torch.Tensor             # (B, n)
    kept: torch.Tensor              # (B, k)


def candidates(pos, prompt_len, schedule):
    """The tokens that may be dropped: neither sink, nor local, nor response, nor padding. pos (B, n), B prompt lengths -> bool (B, n)."""
    return (pos >= schedule.sink) & (pos < torch.tensor([[n - local_tokens(n, schedule.local)] for n in prompt_len], device=pos.device))


def select(score, pos, k, prompt_len, sink=4, local=0.1):
    """Which of the n tokens survive: score and pos (B, n) -> indices (B, k), increasing.

    Protected are the first `sink` positions, the last ceil(local * prompt_len) of the prompt, and everything after the
    prompt. Among equal scores the earlier token wins, on every device. Rows of different length: k and prompt_len are
    lists of B, padding stands at PAD, and a row's indices beyond its own k are of no use, they only fill the batch.
    """
    ragged = not isinstance(k, int)
    if ragged:
        first_local = torch.tensor([[m - local_tokens(m, local)] for m in prompt_len], device=pos.device)
        protected = (pos < sink) | (pos >= first_local) & (pos < PAD)
        score = score.float().masked_fill(pos == PAD, -math.inf)
    else:
        protected = (pos < sink) | (pos >= prompt_len - local_tokens(prompt_len, local))
    finite = score.float().nan_to_num(nan=-math.inf, posinf=torch.finfo(torch.float32).max, neginf=-math.inf)  # only the protected are inf
    order = finite.masked_fill(protected, math.inf).argsort(dim=1, descending=True, stable=True)
    if not ragged:
        return order[:, :k].sort(dim=1).values  # sorted: survivors stay in reading order, so causal attention stays causal
    late = beyond(k, pos.device) * pos.shape[1]                      # what only fills the batch goes last
    return (order[:, :max(k)] + late).sort(dim=1).values % pos.shape[1]


def beyond(lengths, device):
    """Which places of a right-padded batch are padding: B lengths -> (B, longest) bool."""
    return torch.arange(max(lengths), device=device) >= torch.tensor(lengths, device=device)[:, None]


def drop(x, pos, index):
    """Keep only the tokens at index (B, k): x (B, n, D) -> (B, k, D), pos (B, n) -> (B, k)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2])), pos.gather(1, index)


class H2O(NamedTuple):
    """Heavy-Hitter Oracle (arXiv 2306.14048; Table 6): every KV head of every block keeps only some of its keys and values.

    The prompt itself is read with whole caches, block by block, so the first new token is that of the uncompressed model.
    """
    share: float = 0.4              # of the tokens that have entered the block so far
    heavy: float = 0.5              # the part of those chosen by attention received; the others are the latest (0: local only)


def evict(block, x, rope, cache, h2o):
    """Compress a block's cache: x (B, n, D) is what just entered the block, its keys are the newest n of the cache.

    A key's weight is the attention it has received, summed over all queries so far and over the query heads of its KV
    head. After a prompt and after every decoded token the heaviest and the latest keys stay. O(256 n) memory.
    """
    q, n, m = block.qkv(x, rope)[0], x.shape[1], cache.n
    need(rope.window is None, "H2O is not supported together with a sliding window shorter than the prompt")
    q = q.unflatten(1, (cache.k.shape[1], -1))                       # (B, G, H/G, n, d)
    weight = torch.zeros(*cache.k.shape[:2], m, device=x.device)     # (B, G, m)
    if cache.weight is not None:
        weight[..., :m - n] = cache.weight
    k = cache.k[:, :, None, :m].transpose(-1, -2)                    # (B, G, 1, d, m)
    for i in range(0, n, 256):
        last = torch.arange(m - n + i, m - n + min(n, i + 256), device=x.device)  # the newest key that each query sees
        a = (q[..., i:i + 256, :] @ k).float() / math.sqrt(q.shape[-1])
        weight += a.masked_fill(torch.arange(m, device=x.device) > last[:, None], -math.inf).softmax(-1).sum((2, 3))
    cache.entered += n
    budget = min(m, max(1, math.ceil(h2o.share * cache.entered - 1e-9)))
    if h2o.share < 1:
        latest = torch.arange(m, device=x.device) >= m - (budget - int(h2o.heavy * budget))
        index = weight.masked_fill(latest, math.inf).topk(budget).indices.sort(-1).values        # (B, G, budget)
        cache.keep(index)
        weight = weight.gather(2, index)
    cache.weight = weight


@torch.no_grad()
def prefill(model, tokens, schedule=None, scorer=None, room=0, h2o=None, lengths=None):
    """Read the prompt, dropping tokens stage by stage; without a schedule nothing is dropped and it is the ordinary prefill.

    tokens (B, N). scorer(stage, x, pos) -> (B, n), see below. room: free places in every cache for tokens to come. With
    an H2O, each cache is compressed once its block has read the prompt. lengths: B prompt lengths of rows padded on the
    right; each row is pruned by its own counts, its padding stands last and at PAD, where causal attention never looks.
    Returns the last position's logits (B, V), L caches (block l holds exactly the tokens that entered it) and the trace,
    a list of Stage. Raises ValueError for an empty prompt or one beyond the model's positions.
    """
    B, N = tokens.shape
    L = len(model.blocks)
    need(N > 0, "the prompt is empty")
    need(not h2o or 0 < h2o.share <= 1 and 0 <= h2o.heavy <= 1, f"{h2o}: both are shares")
    need(lengths is None or len(lengths) == B and min(lengths) > 0 and max(lengths) == N, f"lengths {lengths} for a batch of {B} rows of {N}")
    lengths = None if lengths is None or min(lengths) == N else list(lengths)
    need(not (lengths and h2o), "H2O reads rows of one length only")
    counts = schedule.counts(N, L) if schedule else [N] * L          # of the longest row, which has the most at every block
    after = schedule.after(L) if schedule else []
    need(scorer or not after, "a schedule needs a scorer")
    caches = [KVCache(block.c, B, n + room, tokens.device, model.dtype) for block, n in zip(model.blocks, counts)]
    trace, left = [], lengths
    pos = positions(tokens)
    if lengths:
        pos = pos.masked_fill(beyond(lengths, pos.device), PAD)
        for cache in caches:
            cache.padded = True
    rope = model.rope(pos, N)
    x = model.embed(tokens)                                          # (B, N, D)
    for i, block in enumerate(model.blocks, start=1):
        entered = x if h2o else None
        x = block(x, rope, caches[i - 1])                            # (B, n, D)
        if h2o:
            evict(block, entered, rope, caches[i - 1], h2o)
        if i in after:
            scores = scorer(len(trace), x, pos)                      # (B, n)
            if lengths:
                left = [schedule.kept(n, len(trace) + 1) for n in lengths]
            index = select(scores, pos, left or counts[i], lengths or N, schedule.sink, schedule.local)
            seen = pos
            x, pos = drop(x, pos, index)                             # (B, k, D): physically shorter from here on
            if lengths:
                pos = pos.masked_fill(beyond(left, pos.device), PAD)
            rope = model.rope(pos, N)                                # original positions, never renumbered
            trace.append(Stage(i, seen, scores, pos))
    last = x[:, -1] if not lengths else x[range(B), [n - 1 for n in left]]                       # (B, D)
    return model.logits(last), caches, trace


@torch.no_grad()
def extend(model, tokens, start, caches, h2o=None, end=None):
    """Decode: tokens (B, n) at positions start, start + 1, ... on top of the caches, which grow. -> logits (B, n, V).

    Positions go on at the prompt's original length, and each block attends to what its own cache holds. Under H2O one
    token comes at a time, because every one may evict another. start: an int, or (B, 1) on the device for rows of
    different length; then `end`, a position that none of them reaches, has to be given too.
    """
    need(not h2o or tokens.shape[1] == 1, "H2O decodes one token at a time")
    rope = model.rope(start + positions(tokens), start + tokens.shape[1] if end is None else end)
    x = model.embed(tokens)
    for block, cache in zip(model.blocks, caches):
        entered = x if h2o else None
        x = block(x, rope, cache)
        if h2o:
            evict(block, entered, rope, cache, h2o)
    return model.logits(x)


def nll(model, tokens, prompt_len, schedule=None, scorer=None):
    """Negative log-likelihood of each response token after the (pruned) prompt: tokens (B, N) -> (B, N - prompt_len).

    The prompt is pruned; the response is read on its caches in one pass, which equals decode.
    """
    logits, caches, _ = prefill(model, tokens[:, :prompt_len], schedule, scorer, room=tokens.shape[1] - prompt_len)
    rest = extend(model, tokens[:, prompt_len:-1], prompt_len, caches) if tokens.shape[1] - prompt_len > 1 else logits[:, None][:, :0]
    logits = torch.cat((logits[:, None], rest), dim=1)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, prompt_len:].flatten(), reduction="none").view(len(tokens), -1)


# -------------------------------------------------------------------------- scorers: (stage, x (B, n, D), pos (B, n)) -> (B, n)


def predictor_scorer(predictors, prior=0.0):
    """The paper's: the stage's trained module. A prior other than 0 is beyond it: to the score's rank, 0 to 1, prior * (1 - pos / N)
    is added, because one hidden state hardly tells where in the prompt its token stands; above 0 early tokens are preferred."""
    def scorer(stage, x, pos):
        s = score(predictors[stage](x))
        if not prior:
            return s
        real = pos < PAD            # padding takes the lowest ranks, below 0
        rank = s.masked_fill(~real, -math.inf).argsort(dim=1, stable=True).argsort(1) - (~real).sum(1, keepdim=True)
        return rank / real.sum(1, keepdim=True) + prior * (1 - pos / (pos.where(real, 0).amax(1, keepdim=True) + 1))  # the last token always survives
    return scorer


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


def attention_scorer(model, schedule, last=None):
    """Attention that a token would receive in the block after the stage, summed over heads and (the `last`) queries."""
    def scorer(stage, x, pos):
        need(last is None or not (pos == PAD).any(), "the last queries of padded rows are not at the end: use prompts of one length")
        block = model.blocks[schedule.after(len(model.blocks))[stage]]  # block b_s + 1: numbers count from 1, the list from 0
        need(block.c.n_heads == model.config.n_heads, "attention is not summed over the heads of other processes: leave out --tp or the attention scorers")
        q, k, _ = block.qkv(x, model.rope(pos, 0))
        n, heads = pos.shape[1], q.shape[1]
        k = k.repeat_interleave(heads // k.shape[1], 1)
        received = torch.zeros(pos.shape, device=x.device)
        for i in range(0 if last is None else max(0, n - last), n, 256):  # 256 queries at a time: (B, H, 256, n)
            a = (q[:, :, i:i + 256] @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
            a = a.masked_fill(~visible(pos[:, i:i + 256], pos, model.config.window), -math.inf)
            received += (a.softmax(-1) * (pos[:, None, i:i + 256, None] < PAD)).sum((1, 2))      # padding attends, but does not count
        return received
    return scorer


def oracle_scorer(saliency):
    """The gradient saliency itself, (S, B, N): it needs the answer, so it is a ceiling and no method."""
    return lambda stage, x, pos: saliency[stage].gather(1, pos)


SCORERS = ("predictor", "prior", "random", "recent", "earliest", "norm", "attention", "attention16")


def make_scorer(name, model, schedule, predictors=None, seed=0, prior=0.0):
    """A scorer by its name on a command line ("prior": the predictors with their calibrated prior); the oracle is made by the caller."""
    need(name in SCORERS, f"unknown scorer {name!r}; there are {', '.join(SCORERS)}")
    if name in ("predictor", "prior"):
        need(predictors is not None, "no trained predictors for this checkpoint: run train.py, or name a file with --predictors, or use --scorer")
        return predictor_scorer(predictors, prior if name == "prior" else 0.0)
    if name.startswith("attention"):
        return attention_scorer(model, schedule, 16 if name == "attention16" else None)
    return {"random": lambda: random_scorer(seed), "recent": recent_scorer, "earliest": earliest_scorer, "norm": norm_scorer}[name]()


# ---------------------------------------------------------------------------------------------------------- accounting


def flops(config, counts, accounting="exact", schedule=None):
    """FLOPs of a prefill in which counts[l] tokens enter block l (2 per multiply-add).

    exact: the projections as they are (grouped-query), causal pairs only, the head on the last token; with a `schedule`
    also its predictors. A sliding window's saving is not counted. paper: Table 2's own accounting, found by fitting its
    baselines: heads not grouped, embedding and head for every token, 3 D FLOPs per token pair and block.
    """
    D, W, V = config.dim, config.ffn, config.vocab
    if accounting == "paper":
        return sum(2 * (4 * D * D + 3 * D * W) * n + 3 * D * n * n for n in counts) + 4 * V * D * counts[0]
    need(accounting == "exact", f"accounting is {accounting!r}, expected exact or paper")
    qo, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    total = 2 * D * V
    for n in counts:
        total += 2 * n * D * (2 * qo + 2 * kv + 3 * W)               # q, k, v, o, gate, up, down
        total += 4 * qo * (n * (n + 1) // 2)                         # q k^T and the weighted sum of v
    if schedule:
        total += sum(2 * counts[b - 1] * hidden_size(D) * (D + 2) for b in schedule.after(len(counts)))
    return total


def kv_bytes(config, counts, bytes_per_value=2):
    """Bytes of all KV caches after a prefill."""
    return sum(counts) * 2 * config.n_kv_heads * config.head_dim * bytes_per_value


def add_schedule_arguments(parser):
    """The schedule's options."""
    for name, kind, text in (("first", int, "the first stage stands after this block"), ("step", int, "blocks between stages"),
                             ("stages", int, "number of stages"), ("keep", float, "stage s keeps keep^s of the prompt"),
                             ("sink", int, "first tokens always kept"), ("local", float, "share of last tokens always kept")):
        parser.add_argument(f"--{name}", type=kind, help=text + f" (paper, 32 blocks: {getattr(Schedule(), name)})")
    parser.add_argument("--shares", type=float, nargs="+", help="beyond the paper: the share that each stage keeps, instead of --keep")


def schedule_from(args, blocks, made=None):
    """A Schedule from the options given, then the predictors' own (a dict), else the paper's scaled to this depth."""
    given = {k: v for k in Schedule.__dataclass_fields__ if (v := getattr(args, k, None)) is not None}
    if {"keep", "stages"} & set(given):
        given.setdefault("shares", ())
    return Schedule(**{**(made or asdict(Schedule.scaled(blocks))), **given})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-7b", help=f"{', '.join(SHAPES)}, or a checkpoint directory (only its config.json is read)")
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072], help="prompt lengths")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object on the last line")
    add_schedule_arguments(parser)
    args = parser.parse_args()
    config = SHAPES[args.shape] if args.shape in SHAPES else Config.from_json(find(args.shape) / "config.json")
    L = config.n_blocks
    schedule = schedule_from(args, L)
    stages = len(schedule.after(L))
    print(f"{args.shape}: {stages} stages after blocks {schedule.after(L)}, keep {schedule.keep}: {1 - schedule.share(stages):.0%} of the prompt dropped by the last")
    print(f"tokens per block at N = {args.lengths[0]}: {schedule.counts(args.lengths[0], L)}")
    print("\n        TFLOPs, exact (causal, GQA, module)       TFLOPs, the paper's accounting            KV cache, 2 bytes\n"
          "      N     full     SDTP   saved   ideal          full     SDTP   saved                   full GB   SDTP GB")
    rows = []
    for n in args.lengths:
        counts = schedule.counts(n, L)
        row = {"n": n, "counts": counts}
        for accounting in ("exact", "paper"):
            row[accounting] = [flops(config, [n] * L, accounting), flops(config, counts, accounting, schedule)]
        row["kv_bytes"] = [kv_bytes(config, [n] * L), kv_bytes(config, counts)]
        (full, sdtp), (pfull, psdtp) = row["exact"], row["paper"]
        print(f"{n:7d} {full / 1e12:8.2f} {sdtp / 1e12:8.2f} {1 - sdtp / full:7.1%} {full / sdtp:6.2f}x      {pfull / 1e12:8.2f} {psdtp / 1e12:8.2f} {1 - psdtp / pfull:7.1%}"
              f"              {row['kv_bytes'][0] / 1e9:10.2f} {row['kv_bytes'][1] / 1e9:9.2f}")
        rows.append(row)
    if args.json:
        print(json.dumps({"command": "python " + " ".join(sys.argv), "shape": args.shape, "pruned": 1 - schedule.share(stages), "rows": rows}))


if __name__ == "__main__":
    cli(main)
