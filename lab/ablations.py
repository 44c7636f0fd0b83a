"""Ablations: Tables 4 and 5 (losses), targets, seeds; Figures 4 and 5; keep ratios (Section 4.4).

A table trains its variants with train.fit and reads the same held-out rows under each, so its rows
differ in one thing. Quality is the share of the gap between random pruning (0%) and the full model
(100%), by the likelihood of the response: it tells variants apart that accuracy on as many rows
could not.

    python -m lab.ablations                                             # --table losses, the toy
    R="--ckpt smollm2 --data dolly.jsonl"
    python -m lab.ablations $R --table losses                           # Tables 4 and 5
    python -m lab.ablations $R --table figures --png results/smollm2    # Figures 4 and 5
    python -m lab.ablations $R --table tradeoff         # every scorer at several keep ratios

What is trained and measured is kept under --work: the same command goes on where it was stopped.
The names there hold a hash of all weights of the backbone, so no other model's numbers are read.
"""
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from lab.quality import Setup, difference, measure_arm, metrics, ratio, table
from lab.scorers import SCORERS, lookahead
from lab.tasks import as_item
from model import Tokenizer, load
from prune import UNPRUNED, Schedule, load_predictors, load_pruning
from support import options, runs, show
from support.chat import choose_chat
from support.files import need
from support.rows import digest
from support.weights import DTYPES
from train import Recipe, fit, marking



@dataclass(frozen=True)
class Taught(Recipe):
    """A Recipe for predictors that may have another teacher than the gradient."""
    teacher: str = "gradient"       # see with_attention for the others: attention, product


ALONE = Recipe(cls=0, mse=0, states="marked")   # the ranking loss alone: no pruning pass is needed
BEST = replace(ALONE, pairs="saliency")
CROSS_ENTROPY = Recipe(mse=0, rank=0)
PASSAGES = Taught(cls=0, mse=0, states="marked", pairs="saliency", near=True, around=0.5)
TABLES = {
    "losses": {
        "SDTP: cross entropy + MSE + ranking": Recipe(),
        "without ranking": Recipe(rank=0),
        "without ranking and MSE": CROSS_ENTROPY,
        "with distillation": Recipe(distill=1),
        "with Gumbel keep/drop": Recipe(mask="gumbel"),
        "ranking alone, pruned states": Recipe(cls=0, mse=0),
        "ranking alone, unpruned states": ALONE,
        "the same, cross entropy and distillation added": replace(ALONE, cls=1, distill=1),
    },
    "seeds": {"without ranking and MSE": CROSS_ENTROPY},
    "targets": {
        "ranking alone, unpruned states": ALONE,
        "MSE alone, unpruned states": replace(ALONE, mse=1, rank=0),
        "ranking by saliency difference": BEST,
        "the same, reduction norm of g": replace(BEST, reduce="norm_g"),
        "the same, reduction |g . x|": replace(BEST, reduce="abs_dot"),
    },
    "teachers": {f"{teacher}, pairs {pairs}": replace(PASSAGES, teacher=teacher, pairs=pairs)
                 for pairs in ("saliency", "equal")
                 for teacher in ("gradient", "attention", "product")},
}


# --------------------------------------------------------------------- what is trained and measured

ROW = "{group}, keep {keep}: {scorer:50} NLL {value:.3f} +- {stderr:.3f}  kept {mean_keep:.1%}"
GAP = "  share of gap {share_of_gap:.1%} +- {share_stderr:.1%}"


def with_attention(marker, alone=False):
    """A marking whose saliency is times, or `alone`, the attention that the answer gives a token.

    It is that of speculative prefill, from the tokens of the reference answer.
    """
    def marks(model, example, schedule, recipe):
        found, P = marker(model, example, schedule, recipe), example.prompt_len
        tokens = example.tokens[None].to(model.device)
        given = lookahead(model, tokens[:, :P], tokens[:, P:])[0]   # (P,), the same for all stages
        return found._replace(saliency=[given if alone else given * s for s in found.saliency])
    return marks


class Study:
    """A frozen backbone, and what is trained and measured on it, kept in files under `work`.

    epochs: passes of a training over its rows; quiet: say nothing of how far it is.
    """

    def __init__(self, model, work, epochs=2, quiet=False):
        self.model, self.work, self.epochs, self.quiet = model, Path(work), epochs, quiet
        self.backbone = digest(model, asdict(model.config), str(model.dtype), model.device.type)
        self.kept = runs.Measured(self.work / f"nll-{self.backbone}.jsonl", self.backbone)
        marker = runs.remembering(marking)          # variants share their marking passes
        self.markers = {
            "gradient": marker,
            "attention": runs.remembering(with_attention(marker, True)),
            "product": runs.remembering(with_attention(marker))}

    def train(self, rows, schedule, recipe):
        """Predictors trained on rows: from nothing, from where it was stopped, or as they lie."""
        steps = max(1, self.epochs * len(rows) // recipe.accum)
        recipe = replace(recipe, steps=steps)
        name = digest(self.backbone, asdict(recipe), asdict(schedule), rows)
        out = self.work / f"trained-{name}" / runs.PREDICTORS
        marker = self.markers[getattr(recipe, "teacher", "gradient")]
        fit(self.model, rows, schedule, recipe, out, marker, report_every=steps, save_every=30,
            resume=True, quiet=self.quiet)
        return load_predictors(out, self.model)[0]

    def measure(self, number, example, schedule, scorer, predictors=None):
        """A row under one arm, measured now or earlier -> what quality.measure_arm says of it.

        scorer: the name of one; number: the row's, which draws its random scores.
        """
        setup, item = Setup(self.model, schedule, predictors), as_item(*example)
        key = [scorer, digest(predictors), asdict(schedule), number, digest([example])]
        return self.kept.get(key, partial(measure_arm, setup, item, scorer, number, {}))


def compare(study, rows, schedule, arms, group):
    """Several arms on the same rows -> rows of a table, dicts; full and random come first.

    arms: {name: (scorer's name, predictors or None)}. vs_first: how much more of the gap an arm
    wins back than the first one, paired by row.
    """
    done, first = [{} for _ in rows], next(iter(arms))
    arms = {"full": ("full",), "random": ("random",), **arms}
    for name, arm in arms.items():
        used = UNPRUNED if name == "full" else schedule     # it is measured once, not by schedule
        for number, example in enumerate(runs.counted(rows, name, study.quiet)):
            done[number][name] = study.measure(number, example, used, *arm)
    values = {name: metrics(done, name, "nll")["nll"].values for name in arms}
    found = table(done, list(arms), "nll")
    for row in found:
        row |= {"group": group, "keep": schedule.keep}
        if "share_of_gap" in row:
            won = difference(values[first], values[row["scorer"]])
            gap = difference(values["random"], values["full"])
            row["vs_first"], row["vs_first_stderr"] = ratio(won, gap)
        print((ROW + GAP * ("share_of_gap" in row)).format(**row), flush=True)
    return found


# -------------------------------------------------------------------------------------- the tables


def losses(study, rows, heldout, schedule, recipes, seeds):
    """Tables 4 and 5, and what the ranking learns from: recipes {name: Recipe}, seed by seed."""
    found = []
    for seed in seeds:
        arms = {}
        for name, recipe in recipes.items():
            print(f"\n{name}: {recipe}", flush=True)
            predictors = study.train(rows, schedule, replace(recipe, seed=seed))
            arms[name] = "predictor", predictors
        found += compare(study, heldout, schedule, arms, f"seed {seed}")
    return found


def figures(study, rows, heldout):
    """Figures 4 and 5: the share kept against its cost in likelihood.

    Figure 4: one stage after block 1 to 10. Figure 5: 1 to 7 stages, every third from block 4 on.
    All are scored by predictors of one training, with a stage after every block.
    """
    blocks, found = len(study.model.blocks), []
    deepest, places = min(10, blocks - 1), Schedule(4, 3, 7).after(blocks)
    # keep 1: every stage learns on every token
    predictors = study.train(rows, Schedule(1, 1, max([deepest, *places]), 1.0), BEST)
    wanted = [("figure 4", f"stage after block {first}, keep {keep}", Schedule(first, 1, 1, keep))
              for keep in (0.9, 0.8, 0.7) for first in range(1, deepest + 1)]
    wanted += [("figure 5", f"{stages} stages", Schedule(4, 3, stages))
               for stages in range(1, len(places) + 1)]
    for group, name, schedule in wanted:
        arm = "predictor", predictors[schedule.first - 1::schedule.step]
        found += compare(study, heldout, schedule, {name: arm}, group)[2:]
    return found


def draw(found, prefix):
    """Both figures as PREFIX_figure4.png and PREFIX_figure5.png."""
    for figure, label in ((4, "block after which the one stage stands"),
                          (5, "stages, after block 4 and every third")):
        points = [(f"keep {row['keep']}", int(re.search(r"\d+", row["scorer"])[0]), row["vs_full"],
                   row["vs_full_stderr"]) for row in found if row["group"] == f"figure {figure}"]
        show.points(f"{prefix}_figure{figure}.png", points, xlabel=label,
                    ylabel="NLL per token above the full model")


def tradeoff(study, heldout, schedule, predictors):
    """Quality against tokens kept: every scorer under gentler and harsher schedules.

    predictors: the checkpoint's own, whatever keep ratio they were trained at.
    """
    found, arms = [], {name: (name, predictors) for name in SCORERS if name != "random"}
    for keep in sorted({0.95, 0.92, schedule.keep, 0.85, 0.8}, reverse=True):
        found += compare(study, heldout, replace(schedule, keep=keep), arms, "keep ratio")
    return found


# ------------------------------------------------------------------------------------ command line


def read_options():
    parser = options.command_parser(__doc__)
    options.add_pruning_options(parser)
    options.add_data_options(parser, limit=40)
    parser.add_argument("--table", choices=(*TABLES, "figures", "tradeoff"), default="losses",
                        help="losses: Tables 4 and 5; seeds: cross entropy alone, for several "
                        "--seeds; targets, teachers: what the ranking learns from; figures: 4 and "
                        "5; tradeoff: every scorer at several keep ratios, with the checkpoint's "
                        "own predictors")
    parser.add_argument("--rows", type=options.at_least(1), default=200,
                        help="training rows (--limit counts the held-out ones)")
    parser.add_argument("--epochs", type=options.at_least(1), default=2, help="passes over them")
    parser.add_argument("--seeds", type=options.at_least(0), nargs="+", help="of the trainings "
                        "(default: 0)")
    parser.add_argument("--png", metavar="PREFIX", type=options.picture_file, help="draw "
                        "PREFIX_figure4.png and PREFIX_figure5.png (needs matplotlib)")
    parser.add_argument("--work", default="out/ablations",
                        help="where what is trained and measured is kept")
    args = parser.parse_args()
    idle = {"figures": "seeds predictors", "tradeoff": "seeds png rows epochs"}
    options.refuse_idle(parser, args, f"with --table {args.table}",
                        idle.get(args.table, "png predictors"))
    return args


def main():
    args = read_options()
    tokenizer, metadata = Tokenizer(args.ckpt), {}
    if args.table == "tradeoff":
        options.check_predictors(args)
        _, metadata = runs.find_predictors(args)
    chat = choose_chat(tokenizer.path, args.template, args.system, metadata)
    rows = options.rows_from(args, tokenizer, chat, "train", args.rows)
    heldout = options.rows_from(args, tokenizer, chat, "heldout")
    need(len(heldout) > 1, f"{len(heldout)} held-out row: of one no error can be estimated")
    if args.table == "tradeoff":
        model, schedule, predictors = load_pruning(args)
    else:
        model = load(args.ckpt, DTYPES.get(args.dtype), args.device)
        schedule = replace(Schedule.scaled(len(model.blocks)), **options.schedule_options(args))
    study = Study(model, args.work, args.epochs, args.quiet)
    if args.table == "tradeoff":
        found = tradeoff(study, heldout, schedule, predictors)
    elif args.table == "figures":
        found = figures(study, rows, heldout)
    else:
        found = losses(study, rows, heldout, schedule, TABLES[args.table], args.seeds or [0])
    if args.png:
        draw(found, args.png)
    options.print_json(args, model, {
        "table": args.table, "schedule": asdict(schedule), "training_rows": len(rows),
        "epochs": args.epochs, "rows": found})


if __name__ == "__main__":
    options.cli(main)
