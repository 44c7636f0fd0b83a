"""Training the predictors (Section 3.3, Eq. 5, 7 and 8; a stage's own losses: predictor.py).

The backbone stays frozen and by default reads each row twice. Marking: the unpruned model, forward
and backward, gives every stage its saliency (saliency.py). Pruning: at each stage the predictor
scores the tokens, and a mask hides the dropped ones from attention. The loss is cross entropy of
the response + MSE + ranking (Eq. 8), optionally distillation.

    python train.py                             # the toy, from nothing, two minutes
    python train.py --ckpt llama-7b             # two epochs of Dolly; --mask gumbel: the paper's

Saving, progress, resuming and several processes stand around it: support/runs.py, processes.py.
Shapes: N tokens of a row, P of its prompt, R = N - P of its response, S stages, D hidden.
"""
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import Tokenizer, causal_attention, load, masked_attention
from predictor import (NearPredictor, Predictor, gumbel_mask, mse_loss, ranking_loss, score,
                       straight_through)
from prune import Schedule, nll, predictor_scorer, protected, select
from saliency import mark, reduce_saliency, run_block
from support import options, processes, runs, show
from support.files import blame, need
from support.rows import row_at
from support.weights import DTYPES


@dataclass(frozen=True)
class Recipe:
    """How predictors are trained."""
    cls: float = 1.0                # the weights of the terms of Eq. 8
    mse: float = 1.0
    rank: float = 1.0
    distill: float = 0.0            # the paper's option
    reduce: str = "norm_gx"         # gradient -> saliency, see reduce_saliency
    mask: str = "topk"              # the scheduled count; the paper samples, "gumbel"
    tau: float = 1.0                # temperature of the Gumbel-Softmax
    pairs: str = "equal"            # not in the paper: "saliency", see ranking_loss
    states: str = "pruned"          # not in the paper: "marked", see competing_marked
    near: bool = False              # not in the paper: NearPredictors
    around: float = 0.0             # not in the paper: see blending
    lr: float = 1e-3                # peak learning rate
    warmup: float = 0.05            # share of the steps with a rising rate
    steps: int = 1
    accum: int = 4                  # rows whose gradients are added up in a step
    seed: int = 0

    def __post_init__(self):
        masked = self.cls or self.distill or self.states == "pruned"
        need(not (self.near and masked), "near predictors read the marked states alone: set the "
                                         "weights cls and distill to 0")


class Marks(NamedTuple):
    """What the marking pass says about a row."""
    states: list                    # S of (1, P, D)
    saliency: list                  # S of (P,)
    logits: torch.Tensor            # (R, V) of the unpruned model


def marking(model, example, schedule, recipe):
    """The marking pass for one row -> Marks."""
    P = example.prompt_len
    tokens = example.tokens[None].to(model.device)                  # (1, N)
    after = schedule.after(len(model.blocks))
    states, grads, logits = mark(model, tokens, P, after)
    saliency = [reduce_saliency(g, x, recipe.reduce)[0, :P] for g, x in zip(grads, states)]
    return Marks([x[:, :P] for x in states], saliency, logits[0])


def blending(marking, window=65):
    """Not in the paper: a marking in which recipe.around of a token's saliency is the mean of the
    tokens around it that may be dropped. What answers a question stands in one place.
    """
    def marks(model, example, schedule, recipe):
        found, blended = marking(model, example, schedule, recipe), []
        for s in found.saliency:                                    # (P,)
            free = ~protected(torch.arange(len(s), device=s.device), len(s), schedule)
            both = torch.stack((s * free, free.to(s.dtype)))        # (2, P) values, counts
            sums, counts = F.avg_pool1d(both, window, 1, window // 2)
            mean = sums / counts.clamp(min=1e-9)
            s = torch.where(free, s.lerp(mean, recipe.around), s)
            blended.append(s)
        return found._replace(saliency=blended)
    return marks


def topk_mask(pi, previous, pos, P, s, schedule):
    """The value is inference's choice, the gradient that of the keep probability: (1, N)."""
    scores = score(pi.detach()).masked_fill(previous == 0, -math.inf)
    k = schedule.kept(P, s) + pos.shape[1] - P                      # and the response
    index = select(scores, pos, k, P, schedule)
    hard = torch.zeros_like(previous)
    hard[:, index] = 1
    return straight_through(hard, pi.softmax(-1)[..., 0], previous)


def masked_pass(model, predictors, example, schedule, mask="topk", tau=1.0):
    """The pruning pass: no token is removed; a dropped one is hidden from all later attention.

    mask: "gumbel" samples every token that may be dropped (Eq. 2), "topk" keeps the scheduled
    count, as inference does. -> x (1, N, D) leaving the last block; S predictions pi (1, N, 2);
    S + 1 masks (1, N), masks[s] with 1 for what stage s has left.
    """
    P = example.prompt_len
    tokens = example.tokens[None].to(model.device)
    N = tokens.shape[1]
    after = schedule.after(len(model.blocks))
    pos = torch.arange(N, device=tokens.device)[None]
    rope = model.rope(pos, N)
    fixed = protected(pos, P, schedule)                             # and the response
    left = torch.ones(1, N, device=tokens.device)
    attend = causal_attention
    pis, masks = [], [left]
    x = model.embed(tokens)                                         # (1, N, D)
    for b, block in enumerate(model.blocks, start=1):
        x = run_block(block, x, rope, attend)
        if b in after:
            s = len(masks)
            pi = predictors[s - 1](x, pos)                          # (1, N, 2)
            if mask == "gumbel":
                chosen = gumbel_mask(pi, tau, left)
            else:
                chosen = topk_mask(pi, left, pos, P, s, schedule)
            left = torch.where(fixed, 1.0, chosen)
            pis.append(pi)
            masks.append(left)
            attend = partial(masked_attention, mask=left)
    return x, pis, masks


def competing_pruned(pis, masks, marks, free):
    """What each stage is trained on: S pairs of scores and saliencies (m,).

    Only tokens count that the stage still sees and may drop. free (P,): where dropping is allowed.
    """
    P = len(free)
    for pi, saliency, before in zip(pis, marks.saliency, masks[:-1]):
        competing = free & (before[0, :P] > 0)
        yield score(pi)[0, :P][competing], saliency[competing]


def competing_marked(predictors, marks, free, schedule):
    """Not in the paper: the same on the states of the marking pass.

    Each stage trains on as many tokens as it will find: the most salient ones.
    """
    P = len(free)
    pos = torch.arange(P, device=free.device)[None]
    for s, (x, saliency) in enumerate(zip(marks.states, marks.saliency), start=1):
        index = select(saliency[None], pos, schedule.kept(P, s - 1), P, schedule)
        pi = predictors[s - 1](x[:, index], pos[:, index])          # (1, k, 2)
        competing = free[index]
        yield score(pi)[0, competing], saliency[index][competing]


def losses(stages, logits, response, marks, w):
    """The terms of Eq. 8, {name: scalar}; a term without weight in the Recipe w is left out.

    stages: S pairs of scores and saliencies (m,); logits (R, V): the pruned model's, or None;
    response (R,): the tokens that they should predict.
    """
    terms = {}
    if w.mse:
        terms["mse"] = sum(mse_loss(*stage) for stage in stages)
    if w.rank:
        terms["rank"] = sum(ranking_loss(*stage, w.pairs) for stage in stages)  # Eq. 5
    if w.cls:
        terms["cls"] = F.cross_entropy(logits, response)  # Eq. 7
    if w.distill:
        p, q = logits.log_softmax(-1), marks.logits.log_softmax(-1)
        divergence = F.kl_div(p, q, log_target=True, reduction="none")
        terms["distill"] = divergence.sum(-1).mean()
    return terms


def pruning(model, predictors, example, marks, schedule, recipe):
    """The pruning pass and its loss for one row -> the loss (Eq. 8), and its terms as numbers.

    Raises ValueError, with the stage, for what is not finite.
    """
    P = example.prompt_len
    response = example.tokens[P:].to(model.device)
    free = ~protected(torch.arange(P, device=model.device), P, schedule)
    logits, kept = None, 1.0
    if recipe.cls or recipe.distill or recipe.states == "pruned":
        x, pis, masks = masked_pass(model, predictors, example, schedule, recipe.mask, recipe.tau)
        logits = model.logits(x[:, P - 1:-1])[0]    # a token is predicted by the one before it
        kept = masks[-1][0, :P].mean().item()
        stages = list(competing_pruned(pis, masks, marks, free))
    if recipe.states == "marked":
        stages = list(competing_marked(predictors, marks, free, schedule))
    for s, stage in enumerate(stages, start=1):
        need(torch.cat(stage).isfinite().all(), f"stage {s}: a score or saliency is not finite")
    terms = losses(stages, logits, response, marks, recipe)
    loss = sum(getattr(recipe, name) * term for name, term in terms.items())  # Eq. 8
    need(loss.isfinite(), f"the loss is not finite: {terms}")
    numbers = {name: term.item() for name, term in terms.items()}
    return loss, {**numbers, "loss": loss.item(), "kept": kept}


class Step(NamedTuple):
    number: int                     # steps done
    losses: dict                    # each term, "loss" and "kept": means over the step's rows
    tokens: int                     # read in this step


def train(model, predictors, optimizer, rows, schedule, recipe, done=0, marker=marking):
    """Train the predictors in place; a generator that yields a Step after each optimiser step.

    rows: Examples. done: steps taken before. marker: marking, or one that remembers. Raises
    ValueError, with step and stage, for what is not finite; no step is taken then.
    """
    for step in range(done, recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.lr * rate(step, recipe.steps, recipe.warmup)
        optimizer.zero_grad()
        sums = Counter()
        with blame(f"step {step + 1}", "the files of the last save are kept"):
            # each process takes its share of the step's rows
            for number in processes.mine(range(step * recipe.accum, (step + 1) * recipe.accum)):
                example = rows[row_at(number, len(rows), recipe.seed)]
                torch.manual_seed(recipe.seed + 1000003 * number)   # noise by row, not by process
                marks = marker(model, example, schedule, recipe)
                loss, numbers = pruning(model, predictors, example, marks, schedule, recipe)
                (loss / recipe.accum).backward()
                sums.update(numbers, tokens=len(example.tokens))
            sums = processes.add_up(predictors.parameters(), sums)
            norm = nn.utils.clip_grad_norm_(predictors.parameters(), 1.0)
            need(norm.isfinite(), "the gradient is not finite")
        optimizer.step()
        tokens = sums.pop("tokens")
        means = {name: value / recipe.accum for name, value in sums.items()}
        yield Step(step + 1, means, tokens)


def rate(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    turn = math.pi * (step - rising) / (steps - rising)
    return 0.1 + 0.45 * (1 + math.cos(turn))


def fit(model, rows, schedule, recipe, out, marker=marking, **given):
    """Train new predictors, or resume, and write the file `out` -> the finished Run.

    given: options of support.runs.Run.
    """
    after = schedule.after(len(model.blocks))
    need(after, f"no stage of {schedule} stands before the last block")
    schedule = replace(schedule, stages=len(after))
    torch.manual_seed(recipe.seed)
    kind = NearPredictor if recipe.near else Predictor
    predictors = nn.ModuleList(kind(model.config.dim) for _ in after).to(model.device)
    optimizer = torch.optim.AdamW(
        predictors.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    if recipe.around:
        marker = blending(marker)
    run = runs.Run(out, model, predictors, optimizer, rows, schedule, recipe, **given)
    for step in train(model, predictors, optimizer, rows, schedule, recipe, run.done, marker):
        run.after_step(step)            # progress, reports, saves, a clean stop
    return run


def report(model, rows, schedule, predictors):
    """NLL per response token of held-out rows: unpruned and pruned."""
    arms = {"nll_full": (), "nll_sdtp": (schedule, predictor_scorer(predictors))}
    found = {}
    for name, arm in arms.items():
        values = [nll(model, example.tokens[None].to(model.device), example.prompt_len, *arm)
                  for example in rows]
        found[name] = torch.cat(values).mean().item()
    return found


def main():
    args = options.train_options(__doc__, asdict(Recipe()))
    begin, device = time.time(), processes.join(args.device)
    out = runs.check_free(args)         # no run is overwritten
    rows, heldout, notes = options.training_rows(args, Tokenizer(args.ckpt))
    recipe = Recipe(**options.recipe_options(args, len(rows)))
    split = processes.sharded() if args.shard else None
    model = load(args.ckpt, DTYPES.get(args.dtype), device, split)
    schedule = replace(Schedule.scaled(len(model.blocks)), **options.schedule_options(args))
    run = fit(model, rows, schedule, recipe, out,
              marker=runs.remembering(marking) if args.hold else marking,
              report=partial(report, model, heldout, schedule) if heldout else None,
              report_every=args.report_every,
              save_every=args.save_every,
              resume=args.resume,
              stop=runs.stop_on_signals(),
              quiet=args.quiet,
              notes=notes)
    result = show.trained(args, run.log, out, time.time() - begin)
    options.print_json(args, model, result)


if __name__ == "__main__":
    options.cli(main)
