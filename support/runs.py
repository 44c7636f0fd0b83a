"""What stands around a run: progress, clocks, saved predictors, resuming, and what was measured.

Nothing here knows the method. All files are written whole or not at all (support/files.py).
"""
import hashlib
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from support.files import (blame, load_metadata, load_tensors, need, open_tensors, save_tensors,
                           writable)
from support.processes import alone, anyone, first_number, rank
from support.rows import digest
from support.weights import find, shards

PREDICTORS = "predictors.safetensors"


# ---------------------------------------------------------------------------------------- progress


class Progress:
    """How far a loop over `total` things, named by `what`, is; on stderr, for results have stdout.

    On a terminal one line is written again and again; a file or a pipe gets a line every five
    seconds. Of several processes only the first speaks. first: so many were done before.
    """

    def __init__(self, total=0, what="", quiet=False, first=0):
        self.total, self.what, self.count, self.first = total, what, first, first
        self.silent = quiet or rank() > 0
        self.begin = self.spoke = time.monotonic()

    def step(self, text=""):
        """One more is done; text: what there is to say about it."""
        self.count += 1
        spent = time.monotonic() - self.begin
        left = spent / (self.count - self.first) * (self.total - self.count)
        self.note(f"{self.count}/{self.total} {self.what}, {left:.0f} s left  {text}")
        if spent < 0.01:            # known from an earlier run: it says nothing of the others
            self.first, self.begin = self.count, time.monotonic()

    def note(self, text):
        """Show a text; nothing is counted."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if self.silent or not terminal and now - self.spoke < 5:
            return
        self.spoke = now
        line = f"\r{text:.99}\x1b[K" if terminal else f"{text}\n"
        print(line, end="", file=sys.stderr, flush=True)

    def clear(self):
        """Wipe out the line, so that a result can be printed."""
        if not self.silent and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def counted(things, what, quiet=False):
    """Go through a list and show how far: yields what it holds."""
    progress = Progress(len(things), what, quiet)
    for thing in things:
        yield thing
        progress.step()
    progress.clear()


# ------------------------------------------------------------------------------------------ clocks


def clock(device):
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_prompt(vocab, n):
    """n tokens drawn from the vocabulary, the same for the same n: (1, n)."""
    return torch.randint(vocab, (1, n), generator=torch.Generator().manual_seed(n))


def take_turns(arms, repeats, progress):
    """Time several arms in turn, there and back, so that none always follows the same one.

    arms: {name: function() -> anything with prefill_s and decode_s}. The first round warms up and
    does not count; where a round takes over a minute, two more are enough.
    -> {name: [(prefill_s, decode_s)]}.
    """
    found = {name: [] for name in arms}
    for i in range(repeats + 1):
        begin = time.monotonic()
        for name in list(arms) if i % 2 else reversed(arms):
            progress.note(f"{name}: {i} of {repeats} timed runs done")
            made = arms[name]()
            found[name].append((made.prefill_s, made.decode_s))
        if i == 2 and time.monotonic() - begin > 60:
            break
    progress.clear()
    return {name: times[1:] for name, times in found.items()}


def table_row(n, new, times, costs):
    """A row of Table 2 for a prompt of n tokens, a dict.

    times: those of take_turns for the arms full, sdtp and others; costs: {name: {"flops", ...}}.
    Each arm's medians and spreads, the speed-up of SDTP, and its ideal by FLOPs.
    """
    row = {"n": n, "repeats": len(times["full"])}
    for name, pairs in times.items():
        row[name] = dict(costs[name])
        for part, values in zip(("prefill", "decode"), zip(*pairs)):
            row[name][f"{part}_s"] = statistics.median(values)
            row[name][f"{part}_spread_s"] = [min(values), max(values)]
        row[name]["e2e_s"] = row[name]["prefill_s"] + row[name]["decode_s"] * (new - 1)
    full, sdtp = row["full"], row["sdtp"]
    row["ideal"] = full["flops"] / sdtp["flops"]
    row["speedup"] = {part: full[f"{part}_s"] / sdtp[f"{part}_s"] for part in ("prefill", "e2e")}
    row["share_of_ideal"] = row["speedup"]["prefill"] / row["ideal"]
    return row


# ------------------------------------------------------------------------------- saved predictors


def fingerprint(config):
    """A short hash of the backbone's shape, so that predictors are not used on another model."""
    shape = asdict(config)
    for name in ("bos", "eos", "max_positions"):    # the same weights may come with others
        del shape[name]
    for name in ("rope_linear", "o_bias", "qk_norm"):
        if not shape[name]:
            del shape[name]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def weights_key(ckpt):
    """A short hash of all tensors of a checkpoint, in whatever files they lie.

    It reads them all, which takes about as long as loading them from the disk.
    """
    found = {}
    for path in shards(find(ckpt))[0]:
        with open_tensors(path) as file:
            for name in file.keys():
                data = file.get_tensor(name).flatten().view(torch.uint8).numpy()
                found[name] = hashlib.sha256(data).hexdigest()
    return digest(sorted(found.items()))


def save_predictors(path, predictors, config, schedule, **notes):
    """Write the S modules trained for a model with `config`; notes are kept as metadata."""
    metadata = {"schedule": json.dumps(asdict(schedule)), "fingerprint": fingerprint(config)}
    metadata |= {key: str(value) for key, value in notes.items()}
    save_tensors(path, predictors.state_dict(), metadata)


def read_predictors(path, config):
    """A predictors file, or the one in a folder -> its path, tensors, and metadata.

    Raises ValueError for a damaged file, or predictors that were made for another model.
    """
    path = predictors_in(path)
    stored, metadata = load_tensors(path)
    made, ours = metadata.get("fingerprint"), fingerprint(config)
    need(made, f"{path}: not a predictors file (no fingerprint in its metadata)")
    need(made == ours, f"{path}: made for another model (its config's fingerprint is {made}, this "
                       f"model's is {ours})")
    need(all(t.isfinite().all() for t in stored.values()),
         f"{path}: damaged predictors, a weight is not finite")
    return path, stored, {**metadata, "schedule": read_schedule(path, metadata)}


def read_schedule(path, metadata):
    """The fields of the prune.Schedule in the metadata of a predictors file."""
    kinds = {"first": int, "step": int, "stages": int, "keep": float, "sink": int, "local": float}
    with blame(path, "not a predictors file, or damaged: no schedule in its metadata"):
        fields = json.loads(metadata["schedule"])
        return {name: kind(fields[name]) for name, kind in kinds.items()}


def predictors_in(place):
    """The predictors file in a folder: the one of the usual name, else the only one; or the file.

    Raises ValueError where there are several, none of the usual name.
    """
    place = Path(place)
    usual = place / PREDICTORS
    if not place.is_dir():
        return place
    if usual.is_file():
        return usual
    found = [file for file in sorted(place.glob("*.safetensors"))
             if "fingerprint" in load_metadata(file)]
    need(len(found) < 2, f"{place} holds several predictors, name one of them with --predictors: "
                         f"{', '.join(file.name for file in found)}")
    return next(iter(found), usual)


def find_predictors(args):
    """The predictors that a command uses -> their file and metadata, or None and {}.

    The file or folder of --predictors, else those trained here, else the checkpoint's own;
    metadata["why"] says which of them, where there is a choice.
    """
    if args.ckpt.startswith("random:"):
        return None, {}
    here, own = (predictors_in(place) for place in (trained_here(args.ckpt), find(args.ckpt)))
    reasons = {here: f"trained here; not those of {own.parent}" * own.is_file(), own: ""}
    if args.predictors:
        reasons = {predictors_in(args.predictors): "asked for"}
    for file, why in reasons.items():
        if file.is_file() or args.predictors:
            metadata = load_metadata(file)
            return file, {**metadata, "schedule": read_schedule(file, metadata), "why": why}
    return None, {}


def tell_other_weights(file, metadata, ckpt):
    """Print a line where predictors were trained for other weights of the same shape."""
    made = metadata.get("weights")
    if made and made != weights_key(ckpt):
        print(f"{file} were trained for other weights than {find(ckpt)} holds: expect worse "
              "choices, or train them anew", flush=True)


def trained_here(ckpt):
    """The folder into which train.py writes for a checkpoint unless --out names another."""
    return Path("out") / (Path(ckpt).name or Path(ckpt).resolve().name)


# ---------------------------------------------------------------------------------------- training


def state_file(out):
    """Where the state of the training that writes the predictors `out` lies."""
    return out.with_name(f"{out.stem}_state.safetensors")


def check_free(args):
    """Where train.py writes its predictors; a run that is there is not overwritten."""
    out = Path(args.out or trained_here(args.ckpt))
    out = out if out.suffix == ".safetensors" else out / PREDICTORS
    state = writable(state_file(out))
    if state.is_file() and not (args.resume or args.restart):
        told = load_metadata(state)
        raise ValueError(
            f"{state}: a run with {told.get('step')} of {told.get('steps')} steps done is here: "
            "--resume goes on, --restart begins anew, another --out keeps it")
    return out


class Run:
    """One training: it writes `out` (predictors) and, beside it, the state to go on from.

    report(predictors) -> {name: number} on held-out rows, every report_every steps; save_every:
    seconds; stop: save, and raise KeyboardInterrupt, after the step in which it is filled; resume:
    go on from the state, where there is one. log: a dict for each step; done: the steps taken
    before; notes: kept with the predictors.
    """

    def __init__(self, out, model, predictors, optimizer, rows, schedule, recipe, report=None,
                 report_every=50, save_every=120, resume=False, stop=(), notes=None, quiet=False):
        self.out, self.state = out, state_file(out)
        self.predictors, self.optimizer = predictors, optimizer
        self.config, self.schedule, self.recipe = model.config, schedule, recipe
        self.report, self.report_every = report, report_every
        self.save_every, self.stop, self.notes = save_every, stop, notes or {}
        # what two runs must share so that one can go on with the other's state
        self.settings = {"recipe": asdict(recipe), "schedule": asdict(schedule),
                         "model": [fingerprint(model.config), str(model.dtype),
                                   self.notes.get("weights")],
                         "rows": digest(rows)}
        self.done, self.log = 0, []
        if resume and self.state.is_file():
            self.load()
        need(first_number(self.done) == self.done,
             f"{self.state}: not every process finds the same training state there")
        print(f"{len(rows)} rows, {recipe.steps} steps of {recipe.accum} rows, {schedule.stages} "
              f"stages, keep {schedule.keep}; {self.done} steps are done", flush=True)
        self.begin = self.saved = time.monotonic()
        self.tokens = 0
        self.progress = Progress(recipe.steps, "steps", quiet, first=self.done)
        if self.done == recipe.steps:           # finished: its predictors are written again
            self.save(self.done)

    def after_step(self, step):
        """What is done after every train.Step; leaves the program where `stop` is filled."""
        last = step.number == self.recipe.steps
        self.log.append({"step": step.number, **{k: round(v, 6) for k, v in step.losses.items()}})
        self.tokens += step.tokens
        speed = self.tokens / (time.monotonic() - self.begin)
        text = "  ".join(f"{name} {value:.3f}" for name, value in step.losses.items())
        self.progress.step(f"{text}  {speed:.0f} tokens/s")
        if last or step.number % self.report_every == 0:
            self.progress.clear()
            print(f"step {step.number}/{self.recipe.steps}  {text}  {speed:.0f} tokens/s")
            if self.report:
                self.log[-1]["heldout"] = found = self.report(self.predictors)
                told = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
                print(f"  held out: {told}", flush=True)
        leave = anyone(bool(self.stop))
        if last or leave or time.monotonic() - self.saved > self.save_every:
            self.save(step.number)
        if leave and not last:
            first_number(step.number)       # none leaves before the first process has saved
            raise KeyboardInterrupt(f"stopped and saved after step {step.number} of "
                                    f"{self.recipe.steps}: the same command with --resume goes on")

    def save(self, step):
        """Write predictors and state after `step` steps; the first process does."""
        if rank() == 0:
            save_predictors(self.out, self.predictors, self.config, self.schedule, steps=step,
                            steps_planned=self.recipe.steps, reduce=self.recipe.reduce,
                            **self.notes)
            state = {f"p.{name}": p for name, p in self.predictors.state_dict().items()}
            for i, p in enumerate(self.predictors.parameters()):
                moments = self.optimizer.state.get(p, {})
                state |= {f"o.{i}.{name}": t for name, t in moments.items()}
            save_tensors(self.state, state, {
                "step": str(step), "steps": str(self.recipe.steps), "log": json.dumps(self.log),
                "settings": json.dumps(self.settings)})
        self.saved = time.monotonic()

    def load(self):
        """Read what `save` wrote: an unbroken run would have the same in memory."""
        stored, metadata = load_tensors(self.state)
        with blame(self.state, "damaged training state, --restart begins anew"):
            theirs = json.loads(metadata["settings"])
            self.done, self.log = int(metadata["step"]), json.loads(metadata["log"])
            need(len(self.log) == self.done, f"step {self.done} does not fit its log")
        for what, ours in json.loads(json.dumps(self.settings)).items():
            need(theirs.get(what) == ours, f"{self.state}: it belongs to a run with another "
                 f"{what}: repeat that command, or begin anew with --restart")
        with blame(self.state, "damaged training state, --restart begins anew"):
            need(all(t.is_floating_point() and t.isfinite().all() for t in stored.values()),
                 "a number is not finite")
            self.predictors.load_state_dict(
                {name[2:]: t for name, t in stored.items() if name.startswith("p.")})
            for i, p in enumerate(self.predictors.parameters()):
                shapes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                state = {name: stored[f"o.{i}.{name}"] for name in shapes}
                need(all(state[name].shape == shape for name, shape in shapes.items()),
                     f"the optimiser's state of parameter {i} has another shape")
                self.optimizer.state[p] = {name: t if name == "step" else t.to(p)
                                           for name, t in state.items()}


def stop_on_signals():
    """-> a list that is filled once SIGTERM or Ctrl-C came; a second one stops at once.

    Files stay whole even then. torchrun sends every Ctrl-C of a terminal a second time: under it
    the second one changes nothing.
    """
    signals = []

    def asked(number, frame):
        signals.append(number)
        if alone():
            signal.signal(number, signal.SIG_DFL)
        if rank() == 0:             # print() may be what was interrupted
            os.write(2, b"\nstopping after this step; once more: at once\n")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked)
    return signals


def remembering(marking):
    """train.marking that keeps every row's Marks: they never change, the backbone is frozen."""
    kept = {}

    def marks(model, example, schedule, recipe):
        marked, distilled = recipe.states == "marked", recipe.distill > 0
        key = (example.tokens.numpy().tobytes(), example.prompt_len, schedule, recipe.reduce,
               marked, distilled)
        if key not in kept:
            found = marking(model, example, schedule, recipe)
            kept[key] = found._replace(states=found.states if marked else None,
                                       logits=found.logits if distilled else None)
        return kept[key]
    return marks


# ------------------------------------------------------------------------------ what was measured


class Measured:
    """What was measured, by a key: kept in a JSONL file, so that a command goes on where it was.

    run: what all of it depends on, anything that JSON knows; it is the file's first line. What a
    kill left of a last line is cut off. Raises ValueError for a file of another command.
    """

    def __init__(self, path, run):
        self.path, self.found = writable(path), {}
        head = json.dumps(run, default=str)
        if not self.path.is_file() or not self.path.stat().st_size:
            self.path.write_text(head + "\n", encoding="utf-8")
        *lines, rest = self.path.read_text(encoding="utf-8").split("\n")
        need(lines[:1] == [head], f"{path}: what it holds belongs to another command: delete it")
        with blame(path, "damaged, delete it"):
            self.found = dict(map(json.loads, lines[1:]))
        if rest:
            os.truncate(self.path, sum(len(line.encode()) + 1 for line in lines))
        if self.found:
            print(f"{len(self.found)} results are in {path} already", flush=True)

    def get(self, key, measure):
        """What measure() says, JSON, now or earlier; key: anything that JSON knows."""
        key = digest(key)
        if key not in self.found:
            self.found[key] = measure()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.found[key]]) + "\n")
        return self.found[key]
