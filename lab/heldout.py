"""How good the predictors are on rows they were not trained on: the reports of train.py.

Shapes: B = 1 row, N tokens, S stages.
"""
from collections import Counter

import torch

from lab.scorers import oracle_scorer, random_scorer, recent_scorer, with_prior
from model import positions
from predictor import score
from prune import candidates, nll, predictor_scorer
from saliency import mark, reduce_saliency
from support.parallel import anyone
from support.progress import Progress

PRIORS = (0.0, 0.25, 0.5, 1.0, -0.25, -0.5)


def spearman(a, b):
    """Rank correlation of two vectors (n,)."""
    a, b = (v.float().argsort().argsort().float() for v in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9)).item()


def overlap(a, b, share):
    """Of the top `share` of vector a (n,), the part that is also in the top of b."""
    k = max(1, round(share * len(a)))
    top_a, top_b = (set(v.topk(k).indices.tolist()) for v in (a, b))
    return len(top_a & top_b) / k


def report(model, rows, schedule, reduce, predictors):
    """-> {"spearman", "overlap"}, means over stages and rows, and "nll_*" per response token.

    The first two are absent where no prompt has two tokens that may be dropped.
    """
    correlations, overlaps, total, count = [], [], Counter(), 0
    for number, example in enumerate(rows):
        tokens, n = example.tokens[None].to(model.device), example.prompt_len
        states, grads, _ = mark(model, tokens, n, schedule.after(len(model.blocks)))
        s = torch.stack([reduce_saliency(g, x, reduce) for g, x in zip(grads, states)])
        free = candidates(positions(tokens), [n], schedule)[0]
        asked = positions(tokens, [n])
        for stage, x in enumerate(states):
            predicted, true = score(predictors[stage](x, asked))[0, free], s[stage][0, free]
            if len(true) > 1:
                correlations.append(spearman(predicted, true))
                overlaps.append(overlap(predicted, true, schedule.share(stage + 1)))
        scorers = {"sdtp": predictor_scorer(predictors), "random": random_scorer(number),
                   "recent": recent_scorer(), "oracle": oracle_scorer(s)}
        total["nll_full"] += nll(model, tokens, n).sum().item()
        for name, scorer in scorers.items():
            total[f"nll_{name}"] += nll(model, tokens, n, schedule, scorer).sum().item()
        count += tokens.shape[1] - n
    found = {}
    if correlations:
        found = {"spearman": sum(correlations) / len(correlations),
                 "overlap": sum(overlaps) / len(overlaps)}
    return found | {name: value / count for name, value in total.items()}


def calibrate(model, predictors, rows, schedule, priors=PRIORS, stop=(), quiet=False):
    """Beyond the paper: the prior under which the pruned model finds these rows likeliest.

    Not the rows trained on: there the predictors know more than they will know later, and the
    prior comes out too small. stop: leaves the program after the row in which it is filled.
    """
    found, progress = {}, Progress(len(priors) * len(rows), "rows", quiet)
    for prior in priors:
        scorer, values = with_prior(predictor_scorer(predictors), prior), []
        for example in rows:
            tokens = example.tokens[None].to(model.device)
            values.append(nll(model, tokens, example.prompt_len, schedule, scorer).flatten())
            progress.step(f"calibrating with prior {prior}")
            if anyone(bool(stop)):
                raise KeyboardInterrupt("stopped while calibrating: the predictors are saved; the "
                                        "same command with --resume calibrates them")
        found[prior] = torch.cat(values).mean().item()
        progress.clear()
        print(f"calibrating: prior {prior} gives NLL {found[prior]:.4f} on {len(rows)} validation "
              "rows", flush=True)
    return min(found, key=found.get)
