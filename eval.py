"""Quality of pruned prompts: is the performance "comparable" (Section 4.2; Tables 1, 3 and 6)?

Every task is a list of prompts, each with one or more answers. A prompt is read once per scorer, pruned under the same
schedule, and the answers are read on its caches. One row a scorer; every row of data is measured under all scorers
before the next one, so differences between scorers are paired.

    python eval.py                                                                         # the toy's held-out rows
    python eval.py --ckpt smollm2 --data dolly.jsonl --context --min-prompt 128 --max-prompt 448 --limit 100
    python eval.py --ckpt smollm2 --task piqa --data piqa.jsonl --shots 5                  # Table 3
    python eval.py --ckpt smollm2 --task long --data multi_news.jsonl --max-prompt 2048 --rouge    # Table 1
    python eval.py --ckpt smollm2 --task copa --data copa.jsonl --scorers full full+h2o full+local predictor predictor+h2o   # Table 6

tasks: nll     likelihood of the response of Dolly rows {instruction, context, response}; "share of gap" says where a
               scorer stands between random pruning (0%) and the full model (100%)
       text    likelihood of the next --max-response tokens after --max-prompt tokens of plain text, rows {text}
       copa, piqa, winogrande, boolq, choice   accuracy of the likeliest answer, in lm-evaluation-harness' formats: acc by
               likelihood, acc_norm by likelihood per byte; choice reads any rows {context, choices, label}
       lambada the last word of {text}: is it the model's own choice?
       long    rows {context, input, answers} (LongBench), {transcript, queries} (QMSum) or Dolly's: F1 or ROUGE-L of the
               generated answer, its likelihood, and Table 1's times
scorers: full; predictor, prior (the same with its calibrated preference for a position), random, recent, earliest, norm, attention,
       attention16; oracle:norm_gx and so on (they need the answer: ceilings, no methods); compress (the predictors' scores,
       but the tokens leave the text before block 1). Each may be followed by @S (only the first S stages; the paper's
       SDTP-low) and by +h2o or +local (KV caches compressed to --h2o, by heavy hitters and recency or by recency alone,
       once the prompt is read: an answer's first token still comes from the whole prompt).

--min-prompt, --max-prompt, --context, --template and --question shape the tasks nll and long (text: --max-prompt alone).

Rows already measured are kept in --rows-file: the same command goes on where it was stopped.

Shapes: B = 1 row, N prompt tokens, S stages.
"""
import argparse
import copy
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from common import add_data_arguments, at_least, cli, digest, provenance, rows_from
from infer import add_pruning_arguments, clock, generate, load_pruning
from model import Tokenizer, need, positions
from parallel import TP, agreed, first_says, place
from prune import H2O, SCORERS, extend, make_scorer, oracle_scorer, prefill, select
from saliency import REDUCE, saliency
from tasks import CHOICE, Answer, Item, choice_items, f1, long_items, rouge_l, text_items


# ------------------------------------------------------------------------------------------------------------- measure


def compress(model, tokens, schedule, scorer):
    """Prompt compression (what LLMLingua does, with our scores): tokens (1, N) -> (1, k), k = the schedule's mean tokens per block.

    Every stage scores the whole prompt in an unpruned pass; the tokens of lowest mean rank leave the text.
    """
    N = tokens.shape[1]
    counts = schedule.counts(N, len(model.blocks))
    trace = prefill(model, tokens, dataclasses.replace(schedule, keep=1.0, shares=()), scorer)[2]
    rank = sum(stage.score.argsort(1).argsort(1) for stage in trace).float()
    return tokens.gather(1, select(rank, positions(tokens), round(sum(counts) / len(counts)), N, schedule.sink, schedule.local))


@torch.no_grad()
def read_answers(model, tokens, answers, schedule=None, scorer=None, h2o=None):
    """Log-likelihood of several answers after one (pruned) prompt: tokens (1, N) -> [[log-likelihood, tokens, greedy]], seconds of prefill.

    The caches are the prompt's again before every answer. Under H2O an answer is read token by token, as decode would.
    """
    start, N = clock(model.device), tokens.shape[1]
    first, caches, _ = prefill(model, tokens, schedule, scorer, max(len(a.tokens) for a in answers), h2o)
    seconds, held, found = clock(model.device) - start, [cache.n for cache in caches], []
    for answer in answers:
        ids = torch.tensor([answer.tokens], device=tokens.device)
        used = copy.deepcopy(caches) if h2o else caches
        pieces = [ids[:, i:i + 1] for i in range(ids.shape[1] - 1)] if h2o else [ids[:, :-1]] if ids.shape[1] > 1 else []
        logits, at = [first[:, None]], N
        for piece in pieces:
            logits.append(extend(model, piece, at, used, h2o))
            at += piece.shape[1]
        logits = torch.cat(logits, 1)[0, answer.start:].log_softmax(-1)                          # (n, V)
        counted = ids[0, answer.start:]
        found.append([logits.gather(1, counted[:, None]).sum().item(), len(counted), bool((logits.argmax(-1) == counted).all())])
        for cache, n in zip(caches, held):
            cache.n = n
    return found, seconds


def parse_arm(arm, stages, share):
    """An arm's name -> scorer's name, stages, H2O or None."""
    match = re.fullmatch(r"([a-z_0-9:]+?)(?:@(\d+))?(\+h2o|\+local)?", arm)
    names = ("full", "compress", *SCORERS, *(f"oracle:{r}" for r in REDUCE))
    need(match and match[1] in names and match[2] != "0", f"unknown scorer {arm!r}; there are {', '.join(names)}, each with @STAGES and +h2o or +local after it")
    return match[1], min(stages, int(match[2] or stages)), {None: None, "+h2o": H2O(share), "+local": H2O(share, 0.0)}[match[3]]


def measure(model, item, arms, schedule, predictors, prior, seed, share=0.4, new=0, tokenizer=None, rouge=False):
    """One row of data under every arm -> {arm: {"answers": see read_answers, "keep", "prefill_s", ...}}."""
    tokens, found, oracle = torch.tensor([item.prompt], device=model.device), {}, {}
    gold, L = torch.tensor([item.answers[item.gold].tokens], device=model.device), len(model.blocks)
    for arm in arms:
        name, stages, h2o = parse_arm(arm, schedule.stages, share)
        used, scorer, text, begin = dataclasses.replace(schedule, stages=stages, shares=schedule.shares[:stages]), None, tokens, None
        if name == "full":
            used = None
        elif name.startswith("oracle:"):
            reduce = name.removeprefix("oracle:")
            if reduce not in oracle:
                oracle[reduce] = saliency(model, torch.cat((tokens, gold), 1), tokens.shape[1], schedule.after(L), reduce)
            scorer = agreed(oracle_scorer(oracle[reduce]))
        elif name == "compress":
            begin = clock(model.device)
            text, used = compress(model, tokens, used, agreed(make_scorer("predictor", model, used, predictors, seed))), None
        else:
            scorer = agreed(make_scorer(name, model, used, predictors, seed, prior))
        spent = clock(model.device) - begin if begin else 0.0        # before the prefill: compression scores the whole prompt first
        answers, seconds = read_answers(model, text, item.answers, used, scorer, h2o)
        counts = used.counts(text.shape[1], L) if used else [text.shape[1]] * L
        found[arm] = {"answers": answers, "keep": sum(counts) / L / tokens.shape[1], "prefill_s": spent + seconds}
        if new:
            run = generate(model, text, new, used, scorer, h2o, eos=())
            ends = [i for i, t in enumerate(run.tokens) if t in model.config.eos]
            said = tokenizer.decode(run.tokens[:ends[0]] if ends else run.tokens)
            found[arm] |= {"said": said, "score": max((rouge_l if rouge else f1)(said, right) for right in item.texts),
                           "prefill_s": spent + run.prefill_s, "e2e_s": spent + run.prefill_s + run.decode_s * (new - 1)}
    return found


def measure_rows(model, items, log, run, arms, *rest, **options):
    """`measure` for every item; each row is appended to the file `log` at once, and rows found there are not measured again."""
    done = []
    if place().rank:                # of several processes the first keeps the file
        log = Path(os.devnull)
    elif log.is_file():
        lines = log.read_text(encoding="utf-8").split("\n")
        need(lines[0] == run, f"{log}: these rows belong to another command; name another file with --rows-file")
        done = [json.loads(line) for line in lines[1:-1]]            # what follows the last newline was cut off by a kill
        need([row.pop("row", None) for row in done] == list(range(len(done))), f"{log}: its rows are not in order; name another file with --rows-file")
        with log.open("r+b") as f:
            f.truncate(len("\n".join(lines[:-1]).encode()) + 1)
        print(f"{len(done)} rows are in {log} already")
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(run + "\n", encoding="utf-8")
    start, had = time.time(), first_says(len(done))
    done = done or [None] * had
    with log.open("a", encoding="utf-8") as f:
        for row in range(had, len(items)):
            if row == had:          # a warm-up, thrown away, because rows are also timed
                measure(model, items[row], arms[:2], *rest, row, **options)
            done.append(measure(model, items[row], arms, *rest, row, **options))
            f.write(json.dumps({"row": row, **done[-1]}) + "\n")
            f.flush()
            left = (time.time() - start) / (row + 1 - had) * (len(items) - row - 1)
            print(f"\r{row + 1}/{len(items)} rows, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return done


# --------------------------------------------------------------------------------------------------------------- table


def ratio(sums, lengths):
    """Sum over sum, and its standard error (ratio estimator, rows independent): mean NLL per token, say."""
    total, n = sum(lengths), len(sums)
    mean = sum(sums) / total
    return mean, (sum((s - mean * k) ** 2 for s, k in zip(sums, lengths)) * n / max(1, n - 1)) ** 0.5 / abs(total)


def metrics(done, arm, task, items):
    """One arm's metrics: {name: (one value a row, weight of each row)}; the metric is the ratio of their sums."""
    answers, one = [row[arm]["answers"] for row in done], [1.0] * len(done)
    first = [a[0] for a in answers]
    if task in CHOICE:
        gold = [item.gold for item in items]
        best = [max(range(len(a)), key=lambda i: a[i][0]) for a in answers]
        norm = [max(range(len(a)), key=lambda i: a[i][0] / max(1, item.answers[i].bytes)) for a, item in zip(answers, items)]
        return {"acc": ([float(b == g) for b, g in zip(best, gold)], one), "acc_norm": ([float(b == g) for b, g in zip(norm, gold)], one)}
    nll = ([-a[0] for a in first], [a[1] for a in first])
    if task == "lambada":
        return {"acc": ([float(a[2]) for a in first], one), "nll": nll}
    if task == "long":
        score = ([row[arm]["score"] for row in done], one)
        return {"score": score, "nll": nll, **{f"{part}_speedup": ([row["full"][f"{part}_s"] for row in done], [row[arm][f"{part}_s"] for row in done]) for part in ("prefill", "e2e") if "full" in done[0]}}
    return {"nll": nll}


def table(done, arms, task, items, rouge):
    """Rows of the result, one an arm and metric, and the same as text. `vs_full` is the paired difference from the full model."""
    rows, found = [], {arm: metrics(done, arm, task, items) for arm in arms}
    for metric in found[arms[0]]:
        for arm in arms:
            values, weights = found[arm][metric]
            value, error = ratio(values, weights)
            name = {"score": "rouge_l" if rouge else "f1"}.get(metric, metric)
            row = {"scorer": arm, "metric": name, "value": value, "stderr": error, "n": len(done), "mean_keep": sum(r[arm]["keep"] for r in done) / len(done)}
            if "full" in arms and arm != "full" and not metric.endswith("speedup"):
                full = found["full"][metric][0]
                row["vs_full"], row["vs_full_stderr"] = ratio([v - f for v, f in zip(values, full)], weights)
                if metric == "nll" and "random" in arms and arm != "random" and sum(found["random"][metric][0]) != sum(full):
                    floor = found["random"][metric][0]
                    row["share_of_gap"], row["share_stderr"] = ratio([r - v for r, v in zip(floor, values)], [r - f for r, f in zip(floor, full)])
            rows.append(row)
    for metric in dict.fromkeys(row["metric"] for row in rows):
        these = [row for row in rows if row["metric"] == metric]
        print(f"\n{'scorer':18} {metric:>14}             kept   against full         share of gap")
        for row in sorted(these, key=lambda r: r["value"], reverse=metric != "nll"):
            print(f"{row['scorer']:18} {row['value']:14.3f} +- {row['stderr']:.3f}  {row['mean_keep']:7.1%}"
                  + (f"   {row['vs_full']:+.3f} +- {row['vs_full_stderr']:.3f}" if "vs_full" in row else 20 * " ")
                  + (f"   {row['share_of_gap']:8.1%} +- {row['share_stderr']:.1%}" if "share_of_gap" in row else ""))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pruning_arguments(parser)
    add_data_arguments(parser, limit=100)
    parser.add_argument("--task", choices=("nll", "text", *CHOICE, "lambada", "long"), default="nll", help="see above")
    parser.add_argument("--scorers", nargs="+", help="see above; default: those that suit the task")
    parser.add_argument("--shots", type=at_least(0), default=0, help="few-shot examples before a multiple-choice or LAMBADA prompt")
    parser.add_argument("--h2o", type=float, default=0.4, metavar="SHARE", help="what +h2o and +local keep of every KV cache")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, help="task long: tokens generated in every arm (the text ends at eos)")
    parser.add_argument("--rouge", action="store_true", help="task long: ROUGE-L instead of F1 (for summaries)")
    parser.add_argument("--tp", action="store_true", help=TP)
    parser.add_argument("--seed", type=int, default=0, help="draws the few-shot examples")
    parser.add_argument("--rows-file", metavar="FILE", help="JSONL of the rows measured so far (default: a file under out/eval/ named after the command)")
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object on the last line")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.ckpt)
    model, schedule, predictors, metadata = load_pruning(args)
    trained = () if predictors is None else ("predictor", "prior") if metadata.get("prior") else ("predictor",)
    default = {"nll": (*(n for n in SCORERS if n not in ("predictor", "prior")), *(f"oracle:{r}" for r in REDUCE)),
               "text": ("random", "recent", "earliest", "norm", "attention", "oracle:norm_gx"), "long": ("compress", "random", "recent")}
    default = [a for a in default.get(args.task, ("random", "recent", "attention")) if (trained or a != "compress") and not (args.tp and a.startswith("attention"))]
    arms = args.scorers or ["full", *trained, *default]
    for arm in arms:
        parse_arm(arm, 1, args.h2o)
    template = args.template or metadata.get("template", "plain")
    need(args.task == "nll" or args.data, f"--task {args.task} needs --data")
    if args.task == "nll":
        items = [Item(e.tokens[:e.prompt_len].tolist(), [Answer(e.tokens[e.prompt_len:].tolist(), 0, 1)], 0) for e in rows_from(args, tokenizer, "heldout", template)]
    elif args.task == "text":
        items = text_items(tokenizer, args.data, args.max_prompt, args.max_response, args.limit)
    elif args.task == "long":
        items = long_items(tokenizer, args.data, args, template)
    else:
        items = choice_items(tokenizer, args.data, args.task, args.limit, args.shots, args.seed)
    lengths = [len(item.prompt) for item in items]
    print(f"{args.ckpt}, {args.task}: {len(items)} rows, prompts of {min(lengths)} to {max(lengths)} tokens, stages after blocks {schedule.after(len(model.blocks))},"
          f" keep {schedule.keep}: {1 - schedule.share(len(schedule.after(len(model.blocks)))):.0%} dropped by the last stage", flush=True)
    start, options = time.time(), {k: v for k, v in vars(args).items() if k not in ("rows_file", "json", "limit")}
    depends = [model.blocks[0], model.norm] + ([predictors] if predictors is not None else []) + ([Path(args.data)] if args.data else [])
    run = json.dumps([options, arms, schedule.__dict__, metadata.get("prior", 0.0), str(model.dtype), str(model.device), digest(*depends)])  # a --limit may grow
    log = Path(args.rows_file or Path("out", "eval", f"{args.task}-{digest(run)}.jsonl"))
    done = measure_rows(model, items, log, run, arms, schedule, predictors, metadata.get("prior", 0.0), share=args.h2o,
                        new=args.max_new_tokens if args.task == "long" else 0, tokenizer=tokenizer, rouge=args.rouge)
    if place().rank:
        return
    rows = table(done[:len(items)], arms, args.task, items, args.rouge)
    if args.json:
        print(json.dumps({**provenance(model), "ckpt": args.ckpt, "task": args.task, "data": args.data and Path(args.data).name, "seconds": time.time() - start,
                          "schedule": schedule.__dict__, "prompt_tokens": [min(lengths), sum(lengths) / len(lengths), max(lengths)], "rows": rows}))


if __name__ == "__main__":
    cli(main)
