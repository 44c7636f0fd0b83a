"""What stands around a training: progress, held-out reports, saves, a clean stop, row order."""
import json
import os
import signal
import time
from dataclasses import asdict

import torch

from model import Config, Tokenizer
from support.checkpoint import choose_device, describe
from support.data import digest
from support.files import load_tensors, need
from support.options import alone, command_line, let_go, rows_from
from support.parallel import anyone, first_number, join, rank, sharded, world_size
from support.parsers import check_training
from support.places import find, rows_at_hand
from support.progress import ERASE, Progress, on_terminal, speaks
from support.saved import (fingerprint, load_model, load_state, read_progress, save_predictors,
                           save_state)
from support.templates import chosen_template


def read_training(args):
    """What train.py's options name, without weights -> Config, rows to train on, held-out and
    validation rows.
    """
    # from here on only the first process prints
    args.device = str(choose_device(join(args.device)))
    check_training(args, world_size())
    tokenizer = Tokenizer(args.ckpt)
    config = Config(**describe(args.ckpt)[1])
    path, chosen = args.data or rows_at_hand(args.ckpt), chosen_template(args, {})
    print(f"model {find(args.ckpt)}; rows {path}; template {chosen.template} ({chosen.why})",
          flush=True)
    return (config, rows_from(args, tokenizer, "train"),
            rows_from(args, tokenizer, "heldout", args.report_rows),
            rows_from(args, tokenizer, "validation", args.calibrate))


def load_trained(args):
    """The frozen model that train.py's options name, on the devices that they name."""
    return load_model(args, sharded() if args.shard else None)


def state_file(out):
    """Where the state of the training that writes the predictors `out` lies."""
    return out.with_name(f"{out.stem}_state.safetensors")


def check_state(out, args, recipe, config, rows):
    """That no run is overwritten, or gone on with, that should not be; before weights are read."""
    state = state_file(out)
    if args.restart or not state.is_file():
        return
    done, told = read_progress(state)
    if args.resume:
        ours = asdict(recipe), fingerprint(config), digest(rows)
        theirs = told[0], told[2], told[4]
        for what, mine, its in zip(("another recipe", "another model", "other rows"), ours, theirs):
            need(mine == its, f"{state}: it belongs to a run with {what}: repeat that command, or "
                              "begin anew with --restart")
        return
    steps = told[0]["steps"]
    need(done >= steps, f"{state}: a run stopped at step {done} of {steps} is here: --resume goes "
                        "on, --restart begins anew")
    need(not out.is_file(), f"{out}: a finished run of {steps} steps is here: --restart begins "
                            "anew, another --out keeps it")


class Run:
    """One training: it writes `out` (predictors) and, beside it, the state to go on from.

    report(predictors) -> {name: number} on held-out rows, every report_every steps; save_every:
    seconds; stop: save, and raise KeyboardInterrupt, after the step in which it is filled; resume:
    go on from the state, where there is one. log: a list with a dict a step; done: the steps taken
    before. A finished run whose predictors are not in `out` writes them again.
    """

    def __init__(self, out, model, predictors, optimizer, rows, schedule, recipe, report=None,
                 report_every=50, save_every=120, resume=False, stop=(), notes=None,
                 quiet=False):
        self.out, self.state = out, state_file(out)
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
        self.progress = Progress(recipe.steps, "steps", quiet, first=self.done)
        if self.done == recipe.steps and saved_steps(out) != str(self.done):
            self.save(self.done)

    def after_step(self, step):
        """What is done after every train.Step; leaves the program where `stop` is filled."""
        last = step.number == self.recipe.steps
        due = last or step.number % self.report_every == 0
        losses = {name: round(value, 6) for name, value in step.losses.items()}
        self.log.append({"step": step.number, **losses})
        self.show(step, due)
        if self.report and due:
            self.log[-1]["heldout"] = self.report(self.predictors)
            print("  held out: " + numbers(self.log[-1]["heldout"]), flush=True)
        leave = anyone(bool(self.stop))
        if last or leave or time.time() - self.saved > self.save_every:
            self.save(step.number)
        if leave and not last:
            first_number(step.number)       # none leaves before the first process has saved
            raise KeyboardInterrupt(f"stopped and saved after step {step.number} of "
                                    f"{self.recipe.steps}: the same command with --resume goes on")

    def show(self, step, due):
        """Losses and tokens a second: on stderr while it runs, on stdout of the steps that are due.
        """
        self.tokens += step.tokens
        kept = "" if step.kept is None else f"  kept {step.kept:.0%}"
        speed = self.tokens / (time.time() - self.begin)
        text = f"{numbers(step.losses)}{kept}  {speed:.0f} tokens/s"
        self.progress.step(text)
        if due:
            self.progress.clear()
            print(f"step {step.number}/{self.recipe.steps}  {text}", flush=True)

    def save(self, step, **more):
        """Write predictors and state after `step` steps; the first process does."""
        if rank() == 0:
            save_predictors(self.out, self.predictors, self.config, self.schedule, steps=step,
                            steps_planned=self.recipe.steps,
                            reduce=self.recipe.reduce, **self.notes,
                            command=command_line(), **more)
            save_state(self.state, self.predictors, self.optimizer, step, self.log, self.settings)
        self.saved = time.time()


def next_command(args):
    """What to do with the predictors that were just trained, as a command."""
    ckpt = "" if args.ckpt == "toy" else f" --ckpt {args.ckpt}"
    return f"python infer.py{ckpt}" + (f" --predictors {args.out}" if args.out else "")


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
    """-> a list that is no longer empty once SIGTERM or Ctrl-C came; a second one stops at once.

    Files stay whole even then: they are written under another name and renamed. Under torchrun,
    which sends every Ctrl-C of a terminal a second time, the second one changes nothing.
    """
    signals = []

    def asked(number, frame):
        if alone():
            let_go()                # so that Python, busy in one long operation, is not asked again
        if speaks() and not signals:
            text = "stopping after this step; Ctrl-C again: at once\n"
            text = ERASE + text if on_terminal() else text
            os.write(2, text.encode())          # print() may be what was interrupted
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
