"""What stands around a training: progress, held-out reports, saves, a clean stop, row order."""
import json
import signal
import sys
import time
from dataclasses import asdict

import torch

from model import Tokenizer, load
from support.checkpoint import DTYPES
from support.data import digest
from support.files import load_tensors, need
from support.options import command_line, rows_from
from support.parallel import anyone, first_number, join, rank, sharded, world_size
from support.parsers import check_training
from support.saved import fingerprint, load_state, save_predictors, save_state


def load_training(args):
    """What train.py's options name -> model, rows to train on, held-out and validation rows."""
    device = join(args.device)
    check_training(args, world_size())
    tokenizer = Tokenizer(args.ckpt)
    split = sharded() if args.shard else None
    model = load(args.ckpt, DTYPES.get(args.dtype), device, split)
    return (model, rows_from(args, tokenizer, "train"),
            rows_from(args, tokenizer, "heldout", args.report_rows),
            rows_from(args, tokenizer, "validation", args.calibrate))


class Run:
    """One training: it writes `out` (predictors) and, beside it, the state to go on from.

    report(predictors) -> {name: number} on held-out rows, every report_every steps; save_every:
    seconds; stop: leave after the step in which it is filled; resume: go on from the state, where
    there is one. log: a list with a dict a step; done: the steps taken before. A finished run whose
    predictors are not in `out` writes them again.
    """

    def __init__(self, out, model, predictors, optimizer, rows, schedule, recipe, report=None,
                 report_every=50, save_every=120, resume=False, stop=(), notes=None):
        self.out, self.state = out, out.with_name(f"{out.stem}_state.safetensors")
        self.predictors, self.optimizer = predictors, optimizer
        self.config, self.schedule, self.recipe = model.config, schedule, recipe
        self.report, self.report_every = report, report_every
        self.save_every, self.stop, self.notes = save_every, stop, notes or {}
        # what two runs must share so that one can go on with the other's state
        self.settings = json.dumps([asdict(recipe), asdict(schedule), fingerprint(model.config),
                                    str(model.dtype), digest(rows)])
        self.done, self.log, going = 0, [], ""
        if resume and self.state.is_file():
            self.done, self.log = load_state(self.state, predictors, optimizer, self.settings)
            going = f"; going on after step {self.done}"
        elif resume:
            old = out.with_name("train_state.safetensors")
            need(not old.is_file(), f"{old} is the state of an earlier version, with which no run "
                                    "goes on: delete it, or start without --resume")
            going = f"; from the start, there is no {self.state}"
        need(first_number(self.done) == self.done,
             f"{self.state}: not every process finds the same training state there")
        after = schedule.after(len(model.blocks))
        print(f"{len(rows)} rows, {recipe.steps} steps of {recipe.accum} rows, {len(after)} stages "
              f"after blocks {after}, keep {schedule.keep}{going}")
        print(how_often(len(rows), recipe.steps * recipe.accum), flush=True)
        self.begin = self.saved = time.time()
        self.tokens = 0
        if self.done == recipe.steps and saved_steps(out) != str(self.done):
            self.save(self.done)

    def after_step(self, step):
        """What is done after every train.Step; leaves the program where `stop` is filled."""
        last = step.number == self.recipe.steps
        due = last or step.number % self.report_every == 0
        losses = {name: round(value, 6) for name, value in step.losses.items()}
        self.log.append({"step": step.number, **losses})
        self.show(step, end="\n" if due else "")
        if self.report and due:
            self.log[-1]["heldout"] = self.report(self.predictors)
            print("  held out: " + numbers(self.log[-1]["heldout"]), flush=True)
        leave = anyone(bool(self.stop))
        if last or leave or time.time() - self.saved > self.save_every:
            self.save(step.number)
        if leave and not last:
            first_number(step.number)       # none leaves before the first process has saved
            sys.exit(f"\nstopped and saved after step {step.number} of {self.recipe.steps}: the "
                     "same command with --resume goes on")

    def show(self, step, end):
        """Progress in one line: losses, tokens a second, time left."""
        self.tokens += step.tokens
        spent, total = time.time() - self.begin, self.recipe.steps
        left = spent / (step.number - self.done) * (total - step.number)
        kept = "" if step.kept is None else f"  kept {step.kept:.0%}"
        print(f"\rstep {step.number}/{total}  {numbers(step.losses)}{kept}"
              f"  {self.tokens / spent:.0f} tokens/s  {left:.0f} s left   ", end=end, flush=True)

    def save(self, step, **more):
        """Write predictors and state after `step` steps; the first process does."""
        if rank() == 0:
            save_predictors(self.out, self.predictors, self.config, self.schedule, steps=step,
                            reduce=self.recipe.reduce, **self.notes,
                            command=command_line(), **more)
            save_state(self.state, self.predictors, self.optimizer, step, self.log, self.settings)
        self.saved = time.time()


def how_often(n_rows, reads):
    """How often so many reads meet each row, as text: epochs need not come out even."""
    times, more = divmod(reads, n_rows)
    parts = []
    for count, number in ((more, times + 1), (n_rows - more, times)):
        if count:
            parts.append(f"{count} rows {number} time{'' if number == 1 else 's'}")
    return "read in all: " + ", ".join(parts)


def saved_steps(out):
    """The steps behind the predictors in the file `out`, as text; None if it cannot be read."""
    try:
        return load_tensors(out)[1].get("steps")
    except ValueError:              # missing or damaged
        return None


def numbers(named):
    return "  ".join(f"{name} {value:.3f}" for name, value in named.items())


def stop_on_signals():
    """-> a list that is no longer empty once SIGTERM or Ctrl-C came; a second one stops at once."""
    signals = []

    def asked(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    return signals


def prompt_share(mask, prompt_len):
    """The share of the prompts' tokens that a mask (B, N) keeps, the mean over rows."""
    shares = [m[:n].mean().item() for m, n in zip(mask, prompt_len)]
    return sum(shares) / len(shares)


def remembering(marking):
    """train.marking that keeps every batch's Marks: they never change, the backbone is frozen.

    States are kept from the first recipe on that reads them; without them Marks.states is None.
    """
    kept = {}

    def marks(model, batch, schedule, recipe):
        tokens = batch.tokens.cpu().numpy()
        key = tokens.tobytes(), tokens.shape, tuple(batch.prompt_len), tuple(batch.lengths)
        read = recipe.states == "marked"
        if key not in kept or read and kept[key].states is None:
            found = marking(model, batch, schedule, recipe)
            kept[key] = found if read else found._replace(states=None)
        return kept[key]
    return marks


def micro_batches(step, n_rows, recipe):
    """The rows of a step, from a train.Recipe: [(number of the first, up to recipe.batch indices)].

    Rows are numbered through all epochs; each epoch has its own order, known from the seed alone.
    """
    groups, end = [], (step + 1) * recipe.accum
    for first in range(step * recipe.accum, end, recipe.batch):
        numbers = range(first, min(first + recipe.batch, end))
        groups.append((first, [row_at(number, n_rows, recipe.seed) for number in numbers]))
    return groups


def row_at(number, n_rows, seed):
    epoch, place = divmod(number, n_rows)
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(n_rows, generator=generator)[place].item()
