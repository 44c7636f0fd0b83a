"""Ablations and open questions: Tables 4 and 5, Figures 4 and 5, and what the paper does not say (Sections 3.3 and 4.4).

Each table trains its variants with train.py's own loop and reads the same held-out rows under each, so that rows of a
table differ in one thing. Quality is the share of the random-to-full gap in response likelihood that a variant wins back:
it tells variants apart that accuracy on as many rows could not.

    python study.py --ckpt smollm2 --template chatml --data dolly.jsonl --table losses --dtype bfloat16           # Tables 4 and 5
    python study.py --ckpt smollm2 --template chatml --data dolly.jsonl --table figures --png results/smollm2     # Figures 4 and 5
    python study.py --ckpt smollm2 --template chatml --data dolly.jsonl --table open --text wikitext.jsonl        # what the paper leaves open
    python study.py --ckpt smollm2 --template chatml --data dolly.jsonl --table tradeoff       # every scorer at five keep ratios; trains nothing
    python study.py                                                                             # --table losses on the toy

What is trained and measured is kept under --work: the same command goes on where it was stopped.

Shapes: B = 1 row, N tokens; an NLL table is (rows,) sums beside (rows,) token counts.
"""
import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import train as training
from common import Example, add_data_arguments, at_least, cli, digest, provenance, rows_from
from eval import ratio
from infer import add_pruning_arguments, load_pruning
from model import DTYPES, Tokenizer, load, need
from pictures import sweep
from predictor import load_predictors, save_tensors, score
from prune import SCORERS, Schedule, make_scorer, nll, oracle_scorer, predictor_scorer, random_scorer, schedule_from
from saliency import saliency, sparsity
from tasks import text_items

RANK = ("--cls", "0", "--mse", "0", "--states", "marked")            # the ranking loss alone, on the unpruned states
BEST = (*RANK, "--pairs", "saliency")
VARIANTS = {  # name: options of train.py
    "SDTP: cross entropy + MSE + ranking": (),
    "without ranking": ("--rank", "0"),
    "without ranking and MSE": ("--rank", "0", "--mse", "0"),
    "with distillation": ("--distill", "1"),
    "with Gumbel keep/drop": ("--mask", "gumbel"),
    "MSE alone, unpruned states": ("--cls", "0", "--rank", "0", "--states", "marked"),
    "ranking alone, pruned states": ("--cls", "0", "--mse", "0"),
    "ranking alone, unpruned states": RANK,
    "ranking by saliency difference": BEST,
    "the same, reduction norm of g": (*BEST, "--reduce", "norm_g"),
    "the same, reduction |g . x|": (*BEST, "--reduce", "abs_dot"),
    "the same, cross entropy and distillation added": (*RANK, "--cls", "1", "--distill", "1"),
}
TABLES = {
    "losses": ("SDTP: cross entropy + MSE + ranking", "without ranking", "without ranking and MSE", "with distillation", "with Gumbel keep/drop",
               "ranking alone, pruned states", "ranking alone, unpruned states", "the same, cross entropy and distillation added"),
    "targets": ("ranking alone, unpruned states", "MSE alone, unpruned states", "ranking by saliency difference", "the same, reduction norm of g", "the same, reduction |g . x|"),
}


def trained(model, rows, schedule, options, args, held):
    """Predictors trained with these options of train.py, or read where they are finished already."""
    words = ["--ckpt", args.ckpt, "--seed", str(args.seed), "--accum", "4", "--epochs", str(args.epochs), "--hold", "--resume", "--report-every", "1000000", *options]
    settings = training.arguments().parse_args(words)
    out = Path(args.work, digest(words, schedule.__dict__, rows, str(model.dtype), args.backbone), "predictors.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    training.train(model, rows, [], schedule, settings, out, held.setdefault((settings.reduce, bool(settings.distill), str(schedule), id(rows)), {}))
    return load_predictors(out, model)[0]


def measured(model, rows, key, schedule, scorer, args):
    """Summed response NLL of every row; scorer(row) -> a scorer or None. Kept in a file named after what it depends on: key is a
    name, or the predictors that score."""
    path = Path(args.work, f"nll-{digest(key, schedule and schedule.__dict__, rows, str(model.dtype), args.backbone)}.safetensors")
    if path.is_file():
        return training.load_tensors(path)[0]["nll"].tolist()
    values, start = [], time.time()
    for i, e in enumerate(rows):
        values.append(nll(model, e.tokens[None].to(model.device), e.prompt_len, schedule, scorer(i)).sum().item())
        print(f"\r{i + 1}/{len(rows)} rows, {(time.time() - start) / (i + 1) * (len(rows) - i - 1):.0f} s left \r", end="", file=sys.stderr, flush=True)
    save_tensors(path, {"nll": torch.tensor(values, dtype=torch.float64)}, {"backbone": args.backbone})
    return values


def compare(model, rows, schedule, variants, args, group=""):
    """variants: {name: (key, scorer(row))} -> rows of the table, full and random first."""
    L, lengths = len(model.blocks), [len(e.tokens) - e.prompt_len for e in rows]
    full = measured(model, rows, "full", None, lambda i: None, args)
    floor, found = measured(model, rows, "random", schedule, random_scorer, args), []
    for name, (key, scorer) in {"full": (None, None), "random": (None, None), **variants}.items():
        sums = full if name == "full" else floor if name == "random" else measured(model, rows, key, schedule, scorer, args)
        value, error = ratio(sums, lengths)
        row = {"scorer": name, "group": group, "metric": "nll", "value": value, "stderr": error, "n": len(rows),
               "mean_keep": 1.0 if name == "full" else sum(sum(schedule.counts(e.prompt_len, L)) / e.prompt_len / L for e in rows) / len(rows)}
        if name != "full":
            row["vs_full"], row["vs_full_stderr"] = ratio([s - f for s, f in zip(sums, full)], lengths)
        if name not in ("full", "random"):
            row["share_of_gap"], row["share_stderr"] = ratio([r - s for r, s in zip(floor, sums)], [r - f for r, f in zip(floor, full)])
            row["sums"] = sums
        found.append(row)
        print(f"{group + ': ' if group else ''}{name:50} NLL {value:.3f} +- {error:.3f}  kept {row['mean_keep']:.1%}"
              + (f"  share of gap {row['share_of_gap']:.1%} +- {row['share_stderr']:.1%}" if "share_of_gap" in row else ""), flush=True)
    for row in found[2:]:           # each against the first variant, paired by row
        gap = [r - f for r, f in zip(floor, full)]
        row["vs_first"], row["vs_first_stderr"] = ratio([a - b for a, b in zip(found[2]["sums"], row["sums"])], gap)
    for row in found:
        row.pop("sums", None)
    return found


def table_of_variants(model, rows, heldout, schedule, names, args):
    held, variants = {}, {}
    for name in names:
        print(f"\n{name}: train.py {' '.join(VARIANTS[name])}", flush=True)
        predictors = trained(model, rows, schedule, VARIANTS[name], args, held)
        variants[name] = (predictors, lambda i, p=predictors: predictor_scorer(p))
    print()
    return compare(model, heldout, schedule, variants, args)


def figures(model, rows, heldout, args):
    """Figures 4 and 5: one stage after block 1 to 10; 1 to 7 stages from block 4 on, every third. Share kept against cost in NLL."""
    L = len(model.blocks)
    last = max(min(10, L - 1), *(b for b in range(4, 23, 3) if b < L))
    predictors = trained(model, rows, Schedule(1, 1, last, 1.0), BEST, args, {})  # keep 1: every stage learns on every token
    scorer = lambda first, step: lambda i: lambda stage, x, pos: score(predictors[first + step * stage - 1](x))
    key, found = predictors, []
    for keep in (0.9, 0.8, 0.7):
        for first in range(1, min(10, L - 1) + 1):
            found += compare(model, heldout, Schedule(first, 1, 1, keep), {f"stage after block {first}, keep {keep}": (key, scorer(first, 1))}, args, "figure 4")[2:]
    for stages in range(1, 8):
        if 4 + 3 * (stages - 1) < L:
            found += compare(model, heldout, Schedule(4, 3, stages, 0.9), {f"{stages} stages": (key, scorer(4, 3))}, args, "figure 5")[2:]
    if args.png:
        for number, label in ((4, "block after which the one stage stands"), (5, "stages (from block 4, every third, keep 0.9)")):
            sweep([r for r in found if r["group"] == f"figure {number}"], ("0.9", "0.8", "0.7") if number == 4 else ("",), label,
                  f"Figure {number}, {args.ckpt}, {len(heldout)} rows", f"{args.png}_figure{number}.png")
    return found


def keep_ratios(schedule):
    return 0.95, 0.92, schedule.keep, 0.85, 0.8


def tradeoff(model, heldout, schedule, predictors, prior, args):
    """Quality against tokens kept: every scorer, the checkpoint's own predictors among them, under gentler and harsher schedules."""
    names, found = [name for name in SCORERS if name != "random" and (name != "prior" or prior)], []
    for keep in keep_ratios(schedule):
        own = replace(schedule, keep=keep, shares=())
        print(f"\nkeep {keep}: {1 - own.pruned:.0%} left after the last stage", flush=True)
        found += [{**row, "keep": keep} for row in compare(model, heldout, own, {
            name: (f"{name}, prior {prior}, {digest(predictors)}", lambda i, name=name: make_scorer(name, model, own, predictors, i, prior)) for name in names}, args, "keep ratio")]
    return found


def open_questions(model, tokenizer, rows, heldout, schedule, args):
    """Question first or last, Dolly or plain text, keep ratios, and the budget's allocation over stages."""
    L, found, held = len(model.blocks), [], {}
    first = key = trained(model, rows, schedule, BEST, args, held)
    by_first = lambda i: predictor_scorer(first)
    for keep in keep_ratios(schedule):
        own = replace(schedule, keep=keep, shares=())
        found += compare(model, heldout, own, {f"keep {keep}": (key, by_first), f"keep {keep}, first tokens": ("earliest", lambda i: lambda s, x, pos: -pos.float())}, args, "keep ratio")

    marks = [saliency(model, e.tokens[None].to(model.device), e.prompt_len, schedule.after(L))[:, 0, :e.prompt_len] for e in rows[:32]]
    salient = 1 - torch.stack([sparsity(s) for s in marks]).mean(0)  # Figure 2 at the stages, training rows
    budget = [schedule.share(s + 1) for s in range(schedule.stages)]
    low, high = 0.0, 1e3            # shares in proportion to the salient share, at most 1, never rising, the geometric mean budget
    for _ in range(60):
        scale = (low + high) / 2
        shares = (scale * salient).clamp(0.02, 1).cummin(0).values.tolist()
        low, high = (scale, high) if sum(shares) < sum(budget) else (low, scale)
    learned = replace(schedule, shares=shares)
    slope = (1 - sum(budget) / len(budget)) * 2 / (len(budget) + 1)
    linear = replace(schedule, shares=[max(0.02, 1 - slope * (s + 1)) for s in range(len(budget))])
    for name, own in (("geometric", schedule), ("from Figure 2", learned), ("linear", linear)):
        found += [{**row, "shares": [round(own.share(s + 1), 3) for s in range(own.stages)]} for row in compare(model, heldout, own, {
            f"{name}, predictors": (key, by_first),
            f"{name}, oracle": ("oracle", lambda i: oracle_scorer(saliency(model, heldout[i].tokens[None].to(model.device), heldout[i].prompt_len, schedule.after(L))))}, args, "allocation")]

    last_rows, last_heldout = (rows_from(argparse.Namespace(**{**vars(args), "question": "last"}), tokenizer, split, limit=limit)
                               for split, limit in (("train", args.rows), ("heldout", args.limit)))
    last = trained(model, last_rows, schedule, BEST, args, held)
    variants = {"question first": (heldout, by_first, key), "question last, trained on first": (last_heldout, by_first, key),
                "question last, trained on last": (last_heldout, lambda i: predictor_scorer(last), last)}
    for name, (where, scorer, k) in variants.items():
        oracle = lambda i, where=where: oracle_scorer(saliency(model, where[i].tokens[None].to(model.device), where[i].prompt_len, schedule.after(L)))
        found += compare(model, where, schedule, {name: (k, scorer), name + ", oracle": ("oracle", oracle)}, args, "question")

    if args.text:
        windows = [Example(torch.tensor(item.prompt + item.answers[0].tokens), len(item.prompt)) for item in text_items(tokenizer, args.text, 256, 64, args.rows + args.limit)]
        need(len(windows) > args.limit, f"{args.text}: its text gives {len(windows)} windows of 320 tokens, more than --limit {args.limit} are needed")
        text_rows, text_heldout = windows[:-args.limit], windows[-args.limit:]
        text = trained(model, text_rows, schedule, BEST, args, held)
        for name, where in (("Dolly", heldout), ("plain text", text_heldout)):
            found += compare(model, where, schedule, {f"read {name}, trained on Dolly": (key, by_first),
                                                      f"read {name}, trained on plain text": (text, lambda i: predictor_scorer(text))}, args, "training data")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pruning_arguments(parser)
    add_data_arguments(parser, limit=40)
    parser.add_argument("--table", choices=(*TABLES, "figures", "open", "tradeoff"), default="losses",
                        help="losses: Tables 4 and 5; targets: what the ranking learns from, no pruning pass needed; figures: 4 and 5; open: what the paper leaves open; tradeoff: every scorer at five keep ratios, with the checkpoint's own predictors")
    parser.add_argument("--rows", type=at_least(1), default=200, help="training rows (--limit counts the held-out ones)")
    parser.add_argument("--epochs", type=at_least(1), default=2, help="passes over them")
    parser.add_argument("--text", help="--table open: JSONL of {text}, to train on and to read")
    parser.add_argument("--png", metavar="PREFIX", help="--table figures: write PREFIX_figure4.png and PREFIX_figure5.png (needs matplotlib)")
    parser.add_argument("--work", default="out/study", help="where what is trained and measured is kept")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object on the last line")
    args = parser.parse_args()
    need(args.table == "tradeoff" or not args.predictors, "study.py trains its own predictors: leave out --predictors")
    tokenizer, start = Tokenizer(args.ckpt), time.time()
    if args.table == "tradeoff":
        model, schedule, predictors, metadata = load_pruning(args)
        need(predictors is not None, f"{args.ckpt} has no trained predictors: name them with --predictors")
    else:
        model = load(args.ckpt, DTYPES.get(args.dtype), args.device)
        schedule = schedule_from(args, len(model.blocks))
    args.backbone = digest(model.blocks[0], model.norm)
    rows, heldout = (rows_from(args, tokenizer, split, limit=limit) for split, limit in (("train", args.rows), ("heldout", args.limit)))
    if args.table == "tradeoff":
        rows, found = [], tradeoff(model, heldout, schedule, predictors, metadata.get("prior", 0.0), args)
    elif args.table == "figures":
        found = figures(model, rows, heldout, args)
    elif args.table == "open":
        found = open_questions(model, tokenizer, rows, heldout, schedule, args)
    else:
        found = table_of_variants(model, rows, heldout, schedule, TABLES[args.table], args)
    if args.json:
        print(json.dumps({**provenance(model), "ckpt": args.ckpt, "table": args.table, "seconds": time.time() - start, "schedule": schedule.__dict__,
                          "training_rows": len(rows), "epochs": args.epochs if rows else 0, "rows": found}))


if __name__ == "__main__":
    cli(main)
