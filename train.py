"""Training the predictors (Section 3.3, Eq. 5, 7 and 8; a stage's own losses: predictor.py).

The backbone stays frozen and reads each row twice. Marking: the unpruned model, forward and
backward, gives every stage its saliency (saliency.py). Pruning: at each stage the predictor scores
the tokens, and a mask hides the dropped ones from attention. The loss is cross entropy of the
response + MSE + ranking (Eq. 8), optionally distillation.

    python train.py                             # the toy, from nothing, two minutes
    python train.py --ckpt llama-7b             # two epochs of Dolly; --mask gumbel: the paper's

Shapes: B rows, N tokens, R = N - the shortest prompt, S stages, D hidden, V vocabulary.
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

from model import beyond, causal_attention, masked_attention, positions
from predictor import Predictor, gumbel_mask, mse_loss, ranking_loss, score, straight_through
from prune import Schedule, candidates, select
from saliency import mark, reduce_saliency
from support import parallel
from support.around import blended
from support.data import IGNORE, pad, response_labels
from support.files import need, output
from support.options import cli, print_json, schedule_options
from support.parsers import recipe_options, train_parser
from support.places import PREDICTORS, trained_here
from support.recompute import recomputed
from support.running import (Run, check_state, load_trained, micro_batches, next_command,
                             prompt_share, read_training, remembering, stop_on_signals)
from support.templates import prompt_notes


@dataclass(frozen=True)
class Loss:
    """The weights of the terms of Eq. 8."""
    cls: float = 1.0
    mse: float = 1.0
    rank: float = 1.0
    distill: float = 0.0            # the paper's option


@dataclass(frozen=True)
class Recipe:
    """How predictors are trained."""
    weights: Loss = Loss()
    reduce: str = "norm_gx"         # gradient -> saliency, see reduce_saliency
    around: float = 0.0             # share of it that is the mean of the 65 tokens around
    near: bool = False              # predictors also read the mean state around a token
    pairs: str = "equal"            # see ranking_loss
    mask: str = "topk"              # the scheduled count; the paper samples, "gumbel"
    tau: float = 1.0                # temperature of the Gumbel-Softmax
    states: str = "pruned"          # MSE and ranking read the states of this pass; or "marked"
    lr: float = 1e-3                # peak rate
    warmup: float = 0.05            # share of the steps with a rising rate
    steps: int = 1
    accum: int = 4                  # rows in a step
    batch: int = 1                  # rows in one forward pass
    seed: int = 0

    @property
    def prunes(self):
        """Whether a pruning pass is needed at all."""
        w = self.weights
        return w.cls > 0 or w.distill > 0 or self.states == "pruned"


class Marks(NamedTuple):
    """What the marking pass says about a batch."""
    states: list                    # S of (B, N, D)
    saliency: list                  # S of (B, N)
    logits: torch.Tensor            # (B, R, V) of the unpruned model; None if not distilled


def marking(model, batch, schedule, recipe):
    """`mark` for a Batch, then one saliency for each token and stage -> Marks."""
    tokens, prompt_len, lengths = batch                             # (B, N), B ints, B ints
    after = schedule.after(len(model.blocks))
    states, grads, logits = mark(model, tokens, prompt_len, after, lengths)
    droppable = candidates(positions(tokens, lengths), prompt_len, schedule)
    saliency = []
    for g, x in zip(grads, states):
        s = reduce_saliency(g, x, recipe.reduce)
        saliency.append(blended(s, droppable, recipe.around))
    logits = logits if recipe.weights.distill else None
    return Marks(states, saliency, logits)


def survivors(scores, pos, batch, stage, schedule):
    """What inference would keep at a stage (from 1), and the response: (B, N) of 0 and 1."""
    _, prompt_len, lengths = batch
    k = []
    for p, n in zip(prompt_len, lengths):
        response = n - p
        k.append(schedule.kept(p, stage) + response)
    index = select(scores, pos, k, prompt_len, schedule.sink, schedule.local)
    chosen = ~beyond(k, pos.device)             # (B, max k); fillers write 0
    mask = torch.zeros(pos.shape, device=pos.device)
    return mask.scatter(1, index, chosen.float())


def topk_mask(pi, previous, pos, batch, stage, schedule):
    """The value is inference's choice, the gradient that of the keep probability: (B, N)."""
    scores = score(pi.detach())
    scores = scores.masked_fill(previous == 0, -math.inf)
    hard = survivors(scores, pos, batch, stage, schedule)
    soft = torch.softmax(pi, -1)
    return straight_through(hard, soft[..., 0], previous)


def masked_pass(model, predictors, batch, schedule, mask="topk", tau=1.0):
    """The pass in which nothing is dropped, but the dropped are hidden from all later attention.

    mask: "gumbel" samples every candidate (Eq. 2), "topk" keeps the scheduled count, as inference
    does. -> x (B, N, D) leaving the last block; S predictions pi (B, N, 2); S + 1 masks (B, N),
    masks[s] with 1 for what stage s + 1 still finds; what "topk" dropped gets no later gradient.
    """
    tokens, prompt_len, lengths = batch
    after = schedule.after(len(model.blocks))
    pos = positions(tokens, lengths)
    asked = positions(tokens, prompt_len)                       # the response at PAD
    rope = model.rope(pos, tokens.shape[1])
    droppable = candidates(pos, prompt_len, schedule)
    attend = causal_attention
    now = torch.ones_like(pos, dtype=torch.float32)             # (B, N) 1: not dropped yet
    pis, masks = [], [now]
    x = model.embed(tokens)                                     # (B, N, D)
    for i, block in enumerate(model.blocks, start=1):
        x = recomputed(block, x, rope, attend)      # of long rows no N x N weights are kept
        if i in after:
            stage = len(masks)                                  # from 1
            pi = predictors[stage - 1](x, asked, now)           # (B, N, 2)
            if mask == "gumbel":
                chosen = gumbel_mask(pi, tau, now)
            else:
                chosen = topk_mask(pi, now, pos, batch, stage, schedule)
            now = torch.where(droppable, chosen, 1.0)           # protected and padding stay 1
            pis.append(pi)
            masks.append(now)
            attend = partial(masked_attention, mask=now)
    return x, pis, masks


def losses(pis, competing, marks, logits, labels, w, pairs="equal"):
    """Eq. 8 -> the loss, and its terms {name: number}; all are means over rows.

    pis: S of (B, N, 2); competing: S of (B, N) bool, the tokens with a rank; logits: the pruned
    model's (B, R, V), or None; labels: (B, R). w: a Loss; a term without weight is left out.
    Raises ValueError where a score or a saliency is not finite.
    """
    scores = [score(pi) for pi in pis]
    stages = list(zip(scores, marks.saliency, competing))
    for stage, (pi, saliency, m) in enumerate(stages, start=1):
        finite = saliency[m].isfinite().all()
        need(finite and pi.isfinite().all(), f"stage {stage}: saliency or score is not finite")
    cls = mse = rank = distill = 0.0
    if w.cls:
        flat = logits.flatten(0, 1), labels.flatten()
        entropy = F.cross_entropy(*flat, ignore_index=IGNORE, reduction="none")  # Eq. 7
        cls = answer_mean(entropy, labels)
    if w.mse:
        mse = sum(row_mean(mse_loss, *parts) for parts in stages)
    if w.rank:
        rank_loss = partial(ranking_loss, pairs=pairs)
        rank = sum(row_mean(rank_loss, *parts) for parts in stages)  # Eq. 5
    if w.distill:
        p = logits.log_softmax(-1)
        q = marks.logits.log_softmax(-1)
        divergence = F.kl_div(p, q, log_target=True, reduction="none")
        distill = answer_mean(divergence.sum(-1), labels)
    loss = w.cls * cls + w.mse * mse + w.rank * rank + w.distill * distill  # Eq. 8
    terms = {"cls": cls, "mse": mse, "rank": rank, "distill": distill}
    numbers = {name: term.item() for name, term in terms.items() if getattr(w, name)}
    return loss, numbers


def row_mean(loss, scores, saliency, competing):
    """The mean over rows of a row's own loss: long rows count no more than short ones."""
    total = 0.0
    for row in zip(scores.split(1), saliency.split(1), competing.split(1)):
        total = total + loss(*row)
    return total / len(scores)


def answer_mean(values, labels):
    """Values of (B, R) -> their mean over each row's response tokens, then over rows."""
    answered = labels != IGNORE
    values = values.view(labels.shape) * answered
    mean = values.sum(1) / answered.sum(1)
    return mean.mean()


def pruning(model, predictors, batch, marks, schedule, recipe):
    """`masked_pass`, then the losses -> the loss, its terms, and the share of the prompts left."""
    tokens, prompt_len, lengths = batch
    labels = response_labels(tokens, prompt_len, lengths)               # (B, R)
    R = labels.shape[1]
    pos = positions(tokens, lengths)
    droppable = candidates(pos, prompt_len, schedule)
    logits = left = None
    if recipe.prunes:
        mask, tau = recipe.mask, recipe.tau
        x, pis, masks = masked_pass(model, predictors, batch, schedule, mask, tau)
        logits = model.logits(x[:, -R - 1:-1])      # a token is predicted by the one before it
        competing = [droppable & (m > 0) for m in masks[:-1]]
        left = prompt_share(masks[-1], prompt_len)
    if recipe.states == "marked":
        asked = positions(tokens, prompt_len)           # the response at PAD
        pis, competing = [], []
        for stage, (x, s) in enumerate(zip(marks.states, marks.saliency)):
            # Each stage learns on as many tokens as the one before leaves, the most salient.
            m = survivors(s, pos, batch, stage, schedule)
            pis.append(predictors[stage](x, asked, m))
            competing.append(droppable & (m > 0))
    weights, pairs = recipe.weights, recipe.pairs
    loss, terms = losses(pis, competing, marks, logits, labels, weights, pairs)
    return loss, terms, left


class Step(NamedTuple):
    number: int                     # steps done
    losses: dict                    # each term and "loss", numbers, means over the step's rows
    tokens: int                     # read in this step
    kept: float                     # share left of the last rows' prompts, or None


def train(model, predictors, optimizer, rows, schedule, recipe, done=0, marker=marking):
    """Train the predictors in place; a generator that yields a Step after each optimiser step.

    rows: Examples. done: steps taken before. marker: marking, or one that remembers. Raises
    ValueError for what is not finite; the predictors are unchanged then.
    """
    for step in range(done, recipe.steps):
        lr = recipe.lr * rate(step, recipe.steps, recipe.warmup)
        optimizer.param_groups[0]["lr"] = lr
        groups = micro_batches(step, len(rows), recipe)
        sums = Counter()
        try:
            for first, chosen in parallel.mine(groups):
                torch.manual_seed(recipe.seed + 1000003 * first)    # noise by row, not by process
                batch = pad([rows[i] for i in chosen], model.device)
                marks = marker(model, batch, schedule, recipe)
                loss, terms, left = pruning(model, predictors, batch, marks, schedule, recipe)
                need(torch.isfinite(loss), f"the loss is not finite: {terms}")
                share = len(chosen) / recipe.accum
                (loss * share).backward()
                terms["loss"] = loss.item()
                for name, value in terms.items():
                    sums[name] += share * value
                sums["tokens"] += sum(batch.lengths)
            sums = parallel.add_up(predictors.parameters(), sums)
            norm = nn.utils.clip_grad_norm_(predictors.parameters(), 1.0)
            need(norm.isfinite(), "the gradient is not finite")
        except ValueError as e:
            raise ValueError(f"step {step + 1}: {e}; the files of the last save are kept") from None
        optimizer.step()
        optimizer.zero_grad()
        tokens = sums.pop("tokens")
        yield Step(step + 1, dict(sums), tokens, left)


def rate(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    turn = math.pi * (step - rising) / (steps - rising)
    return 0.1 + 0.45 * (1 + math.cos(turn))


def prepare(model, schedule, recipe):
    """New predictors, one for each stage, and their optimiser."""
    torch.manual_seed(recipe.seed)
    modules = [Predictor(model.config.dim, near=recipe.near) for _ in range(schedule.stages)]
    predictors = nn.ModuleList(modules).to(model.device)
    optimizer = torch.optim.AdamW(
        predictors.parameters(),
        lr=recipe.lr,
        betas=(0.9, 0.98),
        weight_decay=0.01)
    return predictors, optimizer


def fit(model, rows, schedule, recipe, out, marker=marking, **around):
    """Train new predictors, or resume, and write the file `out` -> the finished Run."""
    after = schedule.after(len(model.blocks))
    need(after, f"no stage of {schedule} stands before the last block")
    schedule = replace(schedule, stages=len(after))
    predictors, optimizer = prepare(model, schedule, recipe)
    parts = model, predictors, optimizer, rows, schedule, recipe
    run = Run(out, *parts, **around)    # to resume, it reads the state into the predictors
    for step in train(*parts, run.done, marker):
        run.after_step(step)            # progress, reports, saves, a clean stop
    return run


def main():
    from lab.figures import curve
    from lab.heldout import calibrate, report
    defaults = asdict(Recipe()) | asdict(Loss())
    args = train_parser(__doc__, defaults).parse_args()
    begin = time.time()
    config, rows, heldout, validation = read_training(args)
    schedule = replace(Schedule.scaled(config.n_blocks), **schedule_options(args))
    weights, fields = recipe_options(args, len(rows))
    recipe = Recipe(weights=Loss(**weights), **fields)
    out = output(args.out or trained_here(args.ckpt), PREDICTORS)
    check_state(out, args, recipe, config, rows)
    model = load_trained(args)
    marker = remembering(marking) if args.hold else marking
    measure = partial(report, model, heldout, schedule, args.reduce)
    stop = stop_on_signals()
    run = fit(model, rows, schedule, recipe, out, marker,
              report=measure if heldout else None,
              report_every=args.report_every,
              save_every=args.save_every,
              resume=args.resume,
              stop=stop, quiet=args.quiet,
              notes=prompt_notes(args))
    if validation:
        prior = calibrate(model, run.predictors, validation, run.schedule, stop=stop,
                          quiet=args.quiet)
        run.save(recipe.steps, prior=prior)
    if args.png and parallel.rank() == 0:
        curve(run.log, args.png)
    seconds = time.time() - begin
    print(f"wrote {out} after {seconds:.0f} s; next: {next_command(args)}")
    print_json(args, model, {"seconds": seconds, "out": str(out), "log": run.log})


if __name__ == "__main__":
    cli(main)
