"""Quality of pruned prompts: what a scorer costs in likelihood (the paper's "comparable performance", Section 4.2).

The prompt is pruned by each scorer under the same schedule, the reference response is read on its caches, and the
negative log-likelihood per response token is compared. "share of gap" says where a scorer stands between random
pruning (0%) and the full model (100%).

    python eval.py                                                                         # the toy's held-out rows
    python eval.py --ckpt smollm2 --data dolly.jsonl --context --min-prompt 128 --max-prompt 448 --limit 100

Shapes: B = 1 row, N tokens (prompt and response), S stages.
"""
import argparse
import json
import sys
import time

import torch

from common import add_data_arguments, cli, provenance, rows_from
from infer import add_pruning_arguments, load_pruning
from model import Tokenizer
from prune import SCORERS, make_scorer, nll, oracle_scorer
from saliency import REDUCE, mark, reduce_saliency


def nll_rows(model, rows, schedule, predictors, names, prior=0.0, progress=True):
    """Summed response NLL of every row under every scorer: -> {name: list of one float a row}, response lengths."""
    sums, lengths, start = {name: [] for name in names}, [], time.time()
    for row, example in enumerate(rows):
        tokens, n = example.tokens[None].to(model.device), example.prompt_len
        if any(name.startswith("oracle") for name in names):
            states, grads, _ = mark(model, tokens, n, schedule.after(len(model.blocks)))
        for name in names:
            if name == "full":
                values = nll(model, tokens, n)
            else:
                if name.startswith("oracle:"):
                    reduce = name.removeprefix("oracle:")
                    scorer = oracle_scorer(torch.stack([reduce_saliency(g, x, reduce) for g, x in zip(grads, states)]))
                else:
                    scorer = make_scorer(name, model, schedule, predictors, row, prior)
                values = nll(model, tokens, n, schedule, scorer)
            sums[name].append(values.sum().item())
        lengths.append(tokens.shape[1] - n)
        left = (time.time() - start) / (row + 1) * (len(rows) - row - 1)
        if progress:
            print(f"\r{row + 1}/{len(rows)} rows, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    return sums, lengths


def per_token(sums, lengths):
    """Mean NLL per token over rows and its standard error (ratio estimator, rows independent)."""
    total, n = sum(lengths), len(sums)
    mean = sum(sums) / total
    return mean, (sum((s - mean * k) ** 2 for s, k in zip(sums, lengths)) * n / max(1, n - 1)) ** 0.5 / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pruning_arguments(parser)
    add_data_arguments(parser, limit=100)
    parser.add_argument("--task", choices=("nll",), default="nll", help="nll: response likelihood")
    names = ("full", *SCORERS, *(f"oracle:{r}" for r in REDUCE))
    parser.add_argument("--scorers", nargs="+", choices=names, help="default: all (the oracles need the answer: ceilings, no methods)")
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object on the last line")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.ckpt)
    model, schedule, predictors, metadata = load_pruning(args)
    prior = metadata.get("prior", 0.0)
    names = args.scorers or [name for name in names if not (name == "predictor" and predictors is None or name == "module" and not prior)]
    rows = rows_from(args, tokenizer, "heldout", metadata.get("template"))
    L = len(model.blocks)
    keep = sum(sum(schedule.counts(e.prompt_len, L)) / e.prompt_len / L for e in rows) / len(rows)
    print(f"{args.ckpt}: {len(rows)} held-out rows, prompts of {min(e.prompt_len for e in rows)} to {max(e.prompt_len for e in rows)} tokens, stages after blocks {schedule.after(L)},"
          f" keep {schedule.keep}: {1 - schedule.keep ** len(schedule.after(L)):.0%} dropped by the last stage, {keep:.0%} kept on average over blocks")
    start = time.time()
    sums, lengths = nll_rows(model, rows, schedule, predictors, names, prior)
    means = {name: per_token(values, lengths) for name, values in sums.items()}
    table = []
    print(f"\n{'scorer':16}  NLL per token       share of gap")
    for name in sorted(names, key=lambda k: means[k][0]):
        value, error = means[name]
        row = {"scorer": name, "metric": "nll", "value": value, "stderr": error, "n": len(rows), "mean_keep": 1.0 if name == "full" else keep}
        if "full" in means and "random" in means and name not in ("full", "random") and sum(sums["random"]) != sum(sums["full"]):
            gap = [r - f for r, f in zip(sums["random"], sums["full"])]
            won = [r - s for r, s in zip(sums["random"], sums[name])]
            row["share_of_gap"], row["share_stderr"] = per_token(won, gap)           # the same ratio estimator, paired by row
        print(f"{name:16} {value:6.3f} +- {error:.3f}  " + (f"{row['share_of_gap']:12.1%} +- {row['share_stderr']:.1%}" if "share_of_gap" in row else ""))
        table.append(row)
    if args.json:
        print(json.dumps({**provenance(model), "ckpt": args.ckpt, "seconds": time.time() - start, "schedule": schedule.__dict__,
                          "response_tokens": sum(lengths), "rows": table}))


if __name__ == "__main__":
    cli(main)
