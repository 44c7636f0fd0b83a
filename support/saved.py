"""What a run leaves on disk, and reads again: trained predictors, and the state of a training.

Both are safetensors files that say in their metadata what they belong to.
"""
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import nn

from model import Config, load
from predictor import Predictor
from prune import Schedule
from support.checkpoint import DTYPES, choose_device, describe
from support.files import blame, load_metadata, load_tensors, need, save_tensors
from support.options import schedule_options
from support.parallel import join, tensor_parallel, world_size
from support.places import PREDICTORS, find, predictors_file
from support.progress import Progress

# -------------------------------------------------------------------------------------- predictors


def fingerprint(config):
    """A short hash of the backbone's shape, so that predictors are not used on another model."""
    shape = asdict(config)
    for name in ("bos", "eos", "max_positions"):    # the same weights may come with others
        del shape[name]
    for name in ("rope_ramp", "o_bias", "qk_norm"):     # unknown to older files, which have none
        if not shape[name]:
            del shape[name]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def save_predictors(path, predictors, config, schedule, **notes):
    """Write the S modules trained for a model with `config`; notes are kept as metadata."""
    metadata = {"schedule": json.dumps(asdict(schedule)), "fingerprint": fingerprint(config)}
    metadata |= {key: str(value) for key, value in notes.items()}
    save_tensors(path, predictors.state_dict(), metadata)


def load_predictors(path, model, schedule=None):
    """Read predictors made for `model` -> (nn.ModuleList on its device, in its dtype; metadata).

    path: the file, or its folder. Of the metadata "schedule" is a dict and "prior" a number. If a
    schedule is given, its stages must stand after the same blocks, or after the first of them: then
    the others have nothing to do (the paper's SDTP-low). Another keep ratio is fine, a ranking
    serves any.
    """
    predictors, metadata = read_predictors(path, model.config, schedule)
    return predictors.to(device=model.device, dtype=model.dtype), metadata


def read_predictors(path, config, schedule=None):
    """What `load_predictors` reads, for a model of this Config, which is not needed yet."""
    path = Path(path)
    path = path / PREDICTORS if path.is_dir() else path
    stored, metadata = load_tensors(path)
    need("schedule" in metadata and "fingerprint" in metadata,
         f"{path}: not a predictors file (no schedule in its metadata)")
    ours = fingerprint(config)
    need(metadata["fingerprint"] == ours, f"{path}: made for another model (config fingerprint "
                                          f"{metadata['fingerprint']}, this model has {ours})")
    with blame(path, "the schedule in its metadata is damaged"):
        made = read_schedule(json.loads(metadata["schedule"]))
        prior = float(metadata.get("prior", 0))
        need(made.stages and abs(prior) < 1e6, "no stage, or no prior")
    check_stages(path, made, schedule or made)
    with blame(path, f"its tensors are not those of {made.stages} predictors"):
        need(all(t.dtype in DTYPES.values() and t.isfinite().all() for t in stored.values()),
             "a weight is not finite, or no floating point number")
        hidden, near = stored["0.up.weight"].shape[0], "0.near.weight" in stored
        with torch.device("meta"):  # shapes without memory: a damaged one may be of any size
            modules = [Predictor(config.dim, hidden, near) for _ in range(made.stages)]
        predictors = nn.ModuleList(modules)
        predictors.load_state_dict(stored, assign=True)
    predictors = predictors.eval().requires_grad_(False)
    return predictors, {**metadata, "schedule": asdict(made), "prior": prior}


def check_stages(path, made, schedule):
    """That predictors made for one schedule have all stages of another."""
    asked, places = stage_places(schedule), stage_places(made)
    need(asked and asked == places[:len(asked)],
         f"{path}: predictors stand after blocks {places}, the schedule asks for {asked}")


def read_schedule(fields):
    """A Schedule from a JSON object, every field of the right type."""
    need(isinstance(fields, dict), "expected an object")
    need(not fields.pop("shares", None), "a schedule of other shares than r^s is not read")
    numbers = [fields.get(name, 0) for name in ("keep", "local")]
    counts = [fields.get(name, 0) for name in ("first", "step", "stages", "sink")]
    need(all(type(v) in (int, float) for v in numbers) and all(type(v) is int for v in counts),
         "first, step, stages and sink are whole numbers, keep and local are numbers")
    return Schedule(**fields)


def stage_places(schedule):
    """The blocks that the stages stand after, in a model of any depth."""
    return [schedule.first + schedule.step * s for s in range(schedule.stages)]


# ------------------------------------------------------------------------------ a model that prunes


class Pruning(NamedTuple):
    """What a command prunes by, known before any weights are read."""
    config: Config
    schedule: Schedule
    predictors: Optional[nn.ModuleList]     # None: there are none
    metadata: dict                          # theirs
    source: str                             # where they come from, for people to read

    def said(self, args):
        """Which files a command uses, as text."""
        name = args.ckpt if args.ckpt.startswith("random:") else find(args.ckpt)
        return f"model {name}; {self.source}"


def read_pruning(args):
    """What the options of `add_pruning_arguments` ask for -> Pruning.

    The schedule is what the options give, else the predictors' own, else the paper's, scaled.
    Raises ValueError or FileNotFoundError for what does not fit, or is needed and not there.
    """
    # from here on only the first process prints
    args.device = str(choose_device(join(args.device)))
    parallel = bool(getattr(args, "tp", False))
    need((world_size() > 1) == parallel, "--tp and torchrun --nproc-per-node N belong together: "
                                         "neither is of use without the other")
    config = Config(**describe(args.ckpt)[1])
    given, scaled = schedule_options(args), Schedule.scaled(config.n_blocks)
    if args.ckpt.startswith("random:"):
        return Pruning(config, replace(scaled, **given), None, {}, "untrained predictors")
    path = predictors_file(args.ckpt, args.predictors)
    if path is None:
        need(not by_predictors(args), no_predictors(args.ckpt))
        return Pruning(config, replace(scaled, **given), None, {}, "no predictors")
    predictors, metadata = read_predictors(path, config)
    made = Schedule(**metadata["schedule"])
    schedule = replace(made, **given)
    if by_predictors(args):
        check_stages(path, made, schedule)          # stages elsewhere are refused
    source = f"predictors {path}{unfinished(metadata)}"
    return Pruning(config, schedule, predictors, metadata, source)


def unfinished(metadata):
    """What to say of predictors whose training was stopped; "" of others."""
    steps, planned = metadata.get("steps"), metadata.get("steps_planned")
    return f" (stopped at step {steps} of {planned})" if planned and steps != planned else ""


def by_predictors(args):
    """Whether a scorer that the options ask for needs trained predictors."""
    asked = getattr(args, "scorers", None) or [getattr(args, "scorer", "")]
    return any(name.startswith(("predictor", "prior", "neighbours", "compress")) for name in asked)


def no_predictors(ckpt):
    """What to do where a checkpoint has none, as one line."""
    return (f"{ckpt} has no predictors yet: `python train.py --ckpt {ckpt}` trains them (or name a "
            "file with --predictors); --scorer earliest prunes without training, by keeping the "
            "first tokens")


def load_backbone(args):
    """The model of a command that has done `read_pruning`, on its device or devices."""
    split = tensor_parallel() if world_size() > 1 else None
    return load_model(args, split)


def load_model(args, split=None):
    """model.load for the options of a command, and said."""
    with Progress(quiet=getattr(args, "quiet", False)) as progress:
        progress.note(f"reading {args.ckpt}")
        return load(args.ckpt, DTYPES.get(args.dtype), args.device, split)


def load_pruning(args, pruning=None):
    """-> model, schedule, predictors on its device (None where there are none), their metadata.

    pruning: what `read_pruning` said of these options, if it was asked already.
    """
    pruning = pruning or read_pruning(args)
    model = load_backbone(args)
    predictors = pruning.predictors
    if args.ckpt.startswith("random:"):
        predictors = untrained(pruning.config, pruning.schedule)
    if predictors is not None:
        predictors = predictors.to(device=model.device, dtype=model.dtype)
    return model, pruning.schedule, predictors, pruning.metadata


def untrained(config, schedule):
    """Predictors of the right size, to measure time with."""
    stages = schedule.after(config.n_blocks)
    predictors = nn.ModuleList(Predictor(config.dim) for _ in stages)
    return predictors.requires_grad_(False)


# -------------------------------------------------------------------------- the state of a training


def save_state(path, predictors, optimizer, step, log, run):
    """Write all that an unbroken run would have in memory after `step` steps.

    run: a text that says which run this is. Rows and random numbers follow from seed and step.
    """
    state = {f"p.{name}": p for name, p in predictors.state_dict().items()}
    for i, p in enumerate(predictors.parameters()):
        state |= {f"o.{i}.{name}": t for name, t in optimizer.state.get(p, {}).items()}
    save_tensors(path, state, {"step": str(step), "log": json.dumps(log), "settings": run})


def read_progress(path):
    """Of a training state: steps done, and the settings of its run, a list; without its tensors.

    recipe, schedule, fingerprint of the model, dtype, hash of the rows: see running.Run.
    """
    metadata = load_metadata(path)
    with blame(path, "damaged training state, --restart begins anew"):
        settings = json.loads(metadata["settings"])
        need(len(settings) == 5 and type(settings[0]["steps"]) is int, "no settings")
        return int(metadata["step"]), settings


def load_state(path, predictors, optimizer, run):
    """Read what save_state wrote into predictors and optimizer -> (steps done, log)."""
    stored, metadata = load_tensors(path)
    need({"step", "log", "settings"} <= set(metadata), f"{path}: not a training state")
    need(metadata["settings"] == run, f"{path}: it belongs to a run with other settings, rows or "
                                      "model; repeat that command, or start without --resume")
    with blame(path, "damaged training state"):
        step, log = int(metadata["step"]), json.loads(metadata["log"])
        need(isinstance(log, list) and len(log) == step and all(type(e) is dict for e in log),
             f"step {step} does not fit its log")
        weights = {name[2:]: t for name, t in stored.items() if name.startswith("p.")}
        predictors.load_state_dict(weights)
        for i, p in enumerate(predictors.parameters()):
            prefix = f"o.{i}."
            state = {name.removeprefix(prefix): t for name, t in stored.items()
                     if name.startswith(prefix)}
            need(whole_state(p, state, step), f"parameter {i} or its optimiser state is damaged")
            optimizer.state[p] = {name: t if name == "step" else t.to(p.device)
                                  for name, t in state.items()}
    return step, log


def whole_state(p, state, step):
    """Whether a parameter and its AdamW state (empty before the first step) can be gone on with."""
    if not state:
        return sane(p)
    shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
    if {name: t.shape for name, t in state.items()} != shapes:
        return False
    if not all(sane(t) for t in (p, *state.values())):
        return False
    return 1 <= state["step"] <= step and state["exp_avg_sq"].min() >= 0


def sane(t):
    return t.dtype == torch.float32 and bool((t.abs() < 1e9).all())
