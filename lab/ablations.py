"""Ablations and open questions: Tables 4 and 5, Figures 4 and 5, and what the paper leaves open
(Sections 3.3 and 4.4).

Each table trains its variants with train.py's own loop and reads the same held-out rows under
each, so that rows of a table differ in one thing. Quality is the share of the random-to-full gap in
response likelihood that a variant wins back: it tells variants apart that accuracy on as many rows
could not.

    python -m lab.ablations                             # --table losses on the toy
    R="--ckpt smollm2 --template chatml --data dolly.jsonl"
    python -m lab.ablations $R --table losses           # Tables 4 and 5
    python -m lab.ablations $R --table figures --png results/smollm2    # Figures 4 and 5
    python -m lab.ablations $R --table open --text wikitext.jsonl       # what the paper leaves open
    python -m lab.ablations $R --table tradeoff         # every scorer at five keep ratios

What is trained and measured is kept under --work: the same command goes on where it was stopped.

Shapes: B = 1 row, N tokens, S stages; likelihoods are lists with a number for each row.
"""
import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch

from lab.figures import sweep
from lab.quality import Metric, against_full, difference, ratio, share_of_gap
from lab.schedules import with_shares
from lab.scorers import SCORERS, earliest_scorer, make_scorer, oracle_scorer, random_scorer
from lab.tasks import text_items
from model import Tokenizer, load
from prune import Schedule, nll, predictor_scorer
from saliency import saliency, sparsity
from support.checkpoint import DTYPES
from support.data import Example, digest
from support.files import load_tensors, need, output, save_tensors
from support.options import (add_data_arguments, add_json_argument, add_pruning_arguments,
                             add_quiet_argument, at_least, cli, command_parser, picture_file,
                             print_json, rows_from, schedule_options)
from support.progress import counted
from support.running import remembering
from support.saved import load_predictors, load_pruning, no_predictors, read_pruning
from train import Loss, Recipe, fit, marking

RANK = Loss(cls=0, mse=0)           # the ranking loss alone
ALONE = Recipe(RANK, states="marked")           # it needs no pruning pass
BEST = replace(ALONE, pairs="saliency")
VARIANTS = {
    "SDTP: cross entropy + MSE + ranking": Recipe(),
    "without ranking": Recipe(Loss(rank=0)),
    "without ranking and MSE": Recipe(Loss(rank=0, mse=0)),
    "with distillation": Recipe(Loss(distill=1)),
    "with Gumbel keep/drop": Recipe(mask="gumbel"),
    "MSE alone, unpruned states": Recipe(Loss(cls=0, rank=0), states="marked"),
    "ranking alone, pruned states": Recipe(RANK),
    "ranking alone, unpruned states": ALONE,
    "ranking by saliency difference": BEST,
    "the same, reduction norm of g": replace(BEST, reduce="norm_g"),
    "the same, reduction |g . x|": replace(BEST, reduce="abs_dot"),
    "the same, cross entropy and distillation added":
        Recipe(Loss(mse=0, distill=1), states="marked"),
}
TABLES = {
    "losses": (
        "SDTP: cross entropy + MSE + ranking", "without ranking", "without ranking and MSE",
        "with distillation", "with Gumbel keep/drop", "ranking alone, pruned states",
        "ranking alone, unpruned states", "the same, cross entropy and distillation added"),
    "seeds": ("without ranking and MSE",),
    "targets": (
        "ranking alone, unpruned states", "MSE alone, unpruned states",
        "ranking by saliency difference", "the same, reduction norm of g",
        "the same, reduction |g . x|"),
}


def as_options(recipe):
    """A recipe as the options of train.py that are not their defaults."""
    given, usual = (asdict(r.weights) | asdict(r) for r in (recipe, Recipe()))
    del given["weights"]
    return "".join(f" --{name} {value}" for name, value in given.items() if value != usual[name])


# --------------------------------------------------------------------- what is trained and measured


class Variant(NamedTuple):
    """What one row of a table is measured with."""
    key: Any                        # the predictors that score, or a name: it tells variants apart
    scorer: Callable                # number of a row of data -> the scorer for that row


def every_row(key, scorer):
    """A Variant whose scorer does not depend on the row."""
    return Variant(key, lambda number: scorer)


def scored_by(*trials):
    """A Variant for each of several trainings that differ in their seed alone."""
    return [every_row(predictors, predictor_scorer(predictors)) for predictors in trials]


FULL = every_row("full", None)
RANDOM = Variant("random", random_scorer)       # the row's number is the seed


class Study:
    """A frozen backbone, and what is trained and measured on it, kept in files under `work`.

    epochs: passes of a training over its rows; quiet: say nothing of how far it is.
    """

    def __init__(self, model, work, epochs=2, quiet=False):
        self.model, self.work, self.epochs, self.quiet = model, Path(work), epochs, quiet
        self.backbone = digest(model.blocks[0], model.norm)

    def path(self, kind, *parts):
        """A place under `work` named after what is kept there."""
        return self.work / f"{kind}-{digest(*parts, str(self.model.dtype), self.backbone)}"

    def after(self, schedule):
        return schedule.after(len(self.model.blocks))

    def train(self, rows, schedule, recipe, markers=None):
        """Predictors trained on rows, or read where they are finished already.

        markers: a dict to share between trainings, whose marking passes are then done only once.
        """
        steps = max(1, self.epochs * len(rows) // recipe.accum)
        recipe = replace(recipe, steps=steps)
        folder = self.path("trained", asdict(recipe), asdict(schedule), rows)
        out = folder / "predictors.safetensors"
        markers = {} if markers is None else markers
        # what marks depend on besides their row
        key = recipe.reduce, bool(recipe.weights.distill), schedule
        marker = markers.setdefault(key, remembering(marking))
        fit(self.model, rows, schedule, recipe, out, marker, report_every=10**6, resume=True,
            quiet=self.quiet)
        return load_predictors(out, self.model)[0]

    def likelihoods(self, rows, variant, schedule):
        """The summed NLL of every row's response, measured or read where it was before."""
        used = schedule and asdict(schedule)
        path = self.path("nll", variant.key, used, rows).with_suffix(".safetensors")
        if path.is_file():
            return load_tensors(path)[0]["nll"].tolist()
        values = []
        for number, example in enumerate(counted(rows, "rows", self.quiet)):
            tokens = example.tokens[None].to(self.model.device)
            scorer = variant.scorer(number)
            losses = nll(self.model, tokens, example.prompt_len, schedule, scorer)
            values.append(losses.sum().item())
        tensor = torch.tensor(values, dtype=torch.float64)
        save_tensors(path, {"nll": tensor}, {"backbone": self.backbone})
        return values

    def saliency(self, example, schedule):
        """Of an Example's tokens at every stage: (S, 1, N)."""
        tokens = example.tokens[None].to(self.model.device)
        return saliency(self.model, tokens, example.prompt_len, self.after(schedule))

    def oracle(self, rows, schedule):
        """The Variant that knows the answers of these rows, in a list."""
        def scorer(number):
            return oracle_scorer(self.saliency(rows[number], schedule))
        return [Variant("oracle", scorer)]


def compare(study, rows, schedule, variants, group=""):
    """Variants {name: list of Variant} on the same rows -> rows of a table, dicts.

    Full and random come first. Several Variants of a name are trials: a row's value is their mean,
    and "trials" is the share of the gap that each wins. Each is printed once it is measured.
    """
    lengths = [len(example.tokens) - example.prompt_len for example in rows]
    metric, found = {}, []
    for name, trials in {"full": [FULL], "random": [RANDOM], **variants}.items():
        used = None if name == "full" else schedule
        values = [study.likelihoods(rows, variant, used) for variant in trials]
        mean = [sum(row) / len(trials) for row in zip(*values)]
        metric[name] = Metric(mean, lengths)
        value, error = ratio(*metric[name])
        keep = mean_keep(rows, schedule, len(study.model.blocks)) if used else 1.0
        found.append({"scorer": name, "group": group, "metric": "nll", "value": value,
                      "stderr": error, "n": len(rows), "mean_keep": keep,
                      **against_full(metric, name), **share_of_gap(metric, name)})
        if len(trials) > 1:
            alone = [share_of_gap({**metric, name: Metric(own, lengths)}, name) for own in values]
            found[-1]["trials"] = [share.get("share_of_gap", 0.0) for share in alone]
        print(line(found[-1]), flush=True)
    first = next(iter(variants))
    for row in found[2:]:
        if "share_of_gap" in row:
            row |= against_first(metric, first, row["scorer"])
    return found


def mean_keep(rows, schedule, blocks):
    """Mean share of a prompt in a block."""
    shares = [sum(schedule.counts(e.prompt_len, blocks)) / e.prompt_len / blocks for e in rows]
    return sum(shares) / len(rows)


def against_first(metric, first, name):
    """How much more of the gap a variant wins back than the first one, paired by row."""
    gap = difference(metric["random"].values, metric["full"].values)
    won = difference(metric[first].values, metric[name].values)
    value, error = ratio(won, gap)
    return {"vs_first": value, "vs_first_stderr": error}


def line(row):
    name = f"{row['group']}: " if row["group"] else ""
    text = (f"{name}{row['scorer']:50} NLL {row['value']:.3f} +- {row['stderr']:.3f}"
            f"  kept {row['mean_keep']:.1%}")
    if "share_of_gap" in row:
        text += f"  share of gap {row['share_of_gap']:.1%} +- {row['share_stderr']:.1%}"
    if "trials" in row:
        text += f" ({', '.join(f'{share:.1%}' for share in row['trials'])})"
    return text


# ---------------------------------------------------------------------------- tables of the paper


def trained_variants(study, rows, heldout, schedule, names, seeds):
    """Tables 4 and 5, and what the ranking learns from: VARIANTS of these names, every seed."""
    markers, variants = {}, {}
    for name in names:
        print(f"\n{name}: train.py{as_options(VARIANTS[name])}, seeds {seeds}", flush=True)
        recipes = [replace(VARIANTS[name], seed=seed) for seed in seeds]
        trials = [study.train(rows, schedule, recipe, markers) for recipe in recipes]
        variants[name] = scored_by(*trials)
    print()
    return compare(study, heldout, schedule, variants)


def figures(study, rows, heldout):
    """Figures 4 and 5: the share kept against its cost in likelihood.

    Figure 4: one stage after block 1 to 10. Figure 5: 1 to 7 stages, every third from block 4 on.
    All are scored by predictors of one training, with a stage after every block.
    """
    L = len(study.model.blocks)
    deepest = min(10, L - 1)
    fifth = [b for b in range(4, 23, 3) if b < L]
    last = max([deepest, *fifth])
    # keep 1: every stage learns on every token
    predictors = study.train(rows, Schedule(1, 1, last, 1.0), BEST)
    found = []

    def measure(schedule, name, group):
        placed = predictor_scorer([predictors[b - 1] for b in study.after(schedule)])
        variants = {name: [every_row(predictors, placed)]}
        return compare(study, heldout, schedule, variants, group)[2:]

    for keep in (0.9, 0.8, 0.7):
        for first in range(1, deepest + 1):
            name = f"stage after block {first}, keep {keep}"
            found += measure(Schedule(first, 1, 1, keep), name, "figure 4")
    for stages in range(1, len(fifth) + 1):
        found += measure(Schedule(4, 3, stages, 0.9), f"{stages} stages", "figure 5")
    return found


def draw(found, title, prefix):
    """Both figures as PREFIX_figure4.png and PREFIX_figure5.png."""
    plots = (("figure 4", ("0.9", "0.8", "0.7"), "block after which the one stage stands"),
             ("figure 5", ("",), "stages (from block 4, every third, keep 0.9)"))
    for group, keeps, label in plots:
        rows = [row for row in found if row["group"] == group]
        path = f"{prefix}_{group.replace(' ', '')}.png"
        sweep(rows, keeps, label, f"{group.capitalize()}, {title}", path)


# --------------------------------------------------------------------- what the paper leaves open


def keep_ratios(schedule):
    return 0.95, 0.92, schedule.keep, 0.85, 0.8


def tradeoff(study, heldout, schedule, predictors, prior):
    """Quality against tokens kept: every scorer under gentler and harsher schedules.

    The predictors are the checkpoint's own; prior: theirs, 0 for none.
    """
    names = [name for name in SCORERS if name != "random" and (name != "prior" or prior)]
    key, found = digest(predictors), []

    def variant(name, schedule):
        def scorer(number):
            return make_scorer(name, study.model, schedule, predictors, number, prior)
        return [Variant(f"{name}, prior {prior}, {key}", scorer)]

    for keep in keep_ratios(schedule):
        own = replace(schedule, keep=keep)
        print(f"\nkeep {keep}: {own.share(own.stages):.0%} left after the last stage", flush=True)
        variants = {name: variant(name, own) for name in names}
        rows = compare(study, heldout, own, variants, "keep ratio")
        found += [{**row, "keep": keep} for row in rows]
    return found


def open_questions(study, args, tokenizer, rows, heldout, schedule):
    """Keep ratios, allocation of the budget, place of the question, Dolly or plain text."""
    markers = {}
    own = study.train(rows, schedule, BEST, markers)
    found = softer_and_harsher(study, heldout, schedule, own)
    found += allocations(study, rows, heldout, schedule, own)
    elsewhere = splits(args, tokenizer, question="last")
    found += question_places(study, elsewhere, heldout, schedule, own, markers)
    if args.text:
        texts = text_splits(args, tokenizer)
        found += training_data(study, texts, heldout, schedule, own, markers)
    return found


def softer_and_harsher(study, heldout, schedule, predictors):
    """Predictors at other keep ratios than they were trained for, against the first tokens."""
    found = []
    for keep in keep_ratios(schedule):
        variants = {f"keep {keep}": scored_by(predictors),
                    f"keep {keep}, first tokens": [every_row("earliest", earliest_scorer())]}
        found += compare(study, heldout, replace(schedule, keep=keep), variants, "keep ratio")
    return found


def allocations(study, rows, heldout, schedule, predictors):
    """The same budget divided over the stages in three ways."""
    stages = range(1, schedule.stages + 1)
    budget = sum(schedule.share(stage) for stage in stages)
    salient = salient_shares(study, rows[:32], schedule)
    found = []
    for name, own in (("geometric", schedule),
                      ("from Figure 2", with_shares(schedule, in_proportion(salient, budget))),
                      ("linear", with_shares(schedule, falling_line(schedule.stages, budget)))):
        variants = {f"{name}, predictors": scored_by(predictors),
                    f"{name}, oracle": study.oracle(heldout, schedule)}
        shares = [round(own.share(stage), 3) for stage in stages]
        table = compare(study, heldout, own, variants, "allocation")
        found += [{**row, "shares": shares} for row in table]
    return found


def salient_shares(study, rows, schedule):
    """The share of salient tokens at every stage, as in Figure 2, a mean over rows: (S,)."""
    marks = [study.saliency(e, schedule)[:, 0, :e.prompt_len]
             for e in counted(rows, "rows", study.quiet)]
    return 1 - torch.stack([sparsity(s) for s in marks]).mean(0)


def in_proportion(salient, budget):
    """Shares in proportion to `salient` (S,), at least 0.02, at most 1, never rising.

    Their sum is the budget, found by bisection.
    """
    low, high = 0.0, 1e3
    for _ in range(60):
        scale = (low + high) / 2
        shares = (scale * salient).clamp(0.02, 1).cummin(0).values.tolist()
        if sum(shares) < budget:
            low = scale
        else:
            high = scale
    return shares


def falling_line(stages, budget):
    """Shares that fall by the same amount at every stage, at least 0.02, of the same mean."""
    slope = (1 - budget / stages) * 2 / (stages + 1)
    return [max(0.02, 1 - slope * stage) for stage in range(1, stages + 1)]


def question_places(study, elsewhere, heldout, schedule, own, markers):
    """The question before or after the context; elsewhere: both splits with the question last.

    own: predictors that were trained on rows with the question first.
    """
    last_rows, last_heldout = elsewhere
    last = study.train(last_rows, schedule, BEST, markers)
    found = []
    for name, rows, predictors in (("question first", heldout, own),
                                   ("question last, trained on first", last_heldout, own),
                                   ("question last, trained on last", last_heldout, last)):
        variants = {name: scored_by(predictors), f"{name}, oracle": study.oracle(rows, schedule)}
        found += compare(study, rows, schedule, variants, "question")
    return found


def training_data(study, texts, heldout, schedule, own, markers):
    """Predictors trained on Dolly (own) and on plain text, each read on both."""
    text_rows, text_heldout = texts
    text = study.train(text_rows, schedule, BEST, markers)
    found = []
    for name, rows in (("Dolly", heldout), ("plain text", text_heldout)):
        variants = {f"read {name}, trained on Dolly": scored_by(own),
                    f"read {name}, trained on plain text": scored_by(text)}
        found += compare(study, rows, schedule, variants, "training data")
    return found


# --------------------------------------------------------------------------------- command line


def splits(args, tokenizer, **changes):
    """Rows to train on and held-out rows, by the options with changes."""
    args = argparse.Namespace(**(vars(args) | changes))
    return (rows_from(args, tokenizer, "train", args.rows),
            rows_from(args, tokenizer, "heldout", args.limit))


def text_splits(args, tokenizer):
    """The same of --text: windows of 256 tokens to read and 64 to predict."""
    items = text_items(tokenizer, args.text, 256, 64, args.rows + args.limit)
    need(len(items) > args.limit, f"{args.text}: its text gives {len(items)} windows of 320 tokens,"
                                  f" more than --limit {args.limit} are needed")
    windows = [Example(torch.tensor(item.prompt + item.answers[0].tokens), len(item.prompt))
               for item in items]
    return windows[:-args.limit], windows[-args.limit:]


def options():
    parser = command_parser(__doc__)
    add_pruning_arguments(parser)
    add_data_arguments(parser, limit=40)
    parser.add_argument("--table", choices=(*TABLES, "figures", "open", "tradeoff"),
                        default="losses", help="losses: Tables 4 and 5; seeds: cross entropy "
                        "alone, for several --seeds; targets: what the ranking learns from, no "
                        "pruning pass needed; figures: 4 and 5; open: what the paper leaves open; "
                        "tradeoff: every scorer at five keep ratios, with the checkpoint's own "
                        "predictors")
    parser.add_argument("--rows", type=at_least(1), default=200,
                        help="training rows (--limit counts the held-out ones)")
    parser.add_argument("--epochs", type=at_least(1), default=2, help="passes over them")
    parser.add_argument("--text", help="--table open: JSONL of {text}, to train on and to read")
    parser.add_argument("--png", metavar="PREFIX", help="--table figures: write "
                        "PREFIX_figure4.png and PREFIX_figure5.png (needs matplotlib)")
    parser.add_argument("--work", default="out/ablations",
                        help="where what is trained and measured is kept")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", help="losses, seeds, "
                        "targets: of the trainings (default: 0); of several the mean counts")
    add_quiet_argument(parser)
    add_json_argument(parser)
    return parser


def check_options(args):
    """Refuse options that the table asked for would pass over."""
    given = {"--text": (args.text, ("open",)), "--png": (args.png, ("figures",)),
             "--seeds": (args.seeds, tuple(TABLES))}
    for name, (value, tables) in given.items():
        need(not value or args.table in tables,
             f"--table {args.table} does nothing with {name}: it is for {', '.join(tables)}")
    if args.png:
        picture_file(f"{args.png}_figure4.png")
    output(args.work, "predictors.safetensors")     # --work can be written to


def load_study(args):
    """-> model, schedule, the checkpoint's predictors and their prior, where the table uses any."""
    if args.table == "tradeoff":
        pruning = read_pruning(args)
        need(pruning.predictors is not None, no_predictors(args.ckpt))
        model, schedule, predictors, metadata = load_pruning(args, pruning)
        return model, schedule, predictors, metadata.get("prior", 0.0)
    need(not args.predictors, f"--table {args.table} trains its own predictors: leave out "
                              "--predictors")
    model = load(args.ckpt, DTYPES.get(args.dtype), args.device)
    schedule = replace(Schedule.scaled(len(model.blocks)), **schedule_options(args))
    return model, schedule, None, 0.0


def main():
    args = options().parse_args()
    check_options(args)
    tokenizer, start = Tokenizer(args.ckpt), time.time()
    rows, heldout = splits(args, tokenizer)
    model, schedule, predictors, prior = load_study(args)
    study = Study(model, args.work, args.epochs, args.quiet)
    trains = args.table != "tradeoff"
    if not trains:
        found = tradeoff(study, heldout, schedule, predictors, prior)
    elif args.table == "open":
        found = open_questions(study, args, tokenizer, rows, heldout, schedule)
    elif args.table == "figures":
        found = figures(study, rows, heldout)
    else:
        names = TABLES[args.table]
        seeds = args.seeds or [0]
        found = trained_variants(study, rows, heldout, schedule, names, seeds)
    if args.table == "figures" and args.png:
        draw(found, f"{args.ckpt}, {len(heldout)} rows", args.png)
    told = {"table": args.table, "seconds": time.time() - start, "schedule": asdict(schedule),
            "training_rows": len(rows) if trains else 0, "epochs": args.epochs if trains else 0,
            "rows": found}
    print_json(args, model, told)


if __name__ == "__main__":
    cli(main)
