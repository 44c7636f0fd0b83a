"""How good the predictors are on rows that they were not trained on, while they are being trained: train.py's reports.

Shapes: B = 1 row, N tokens, S stages.
"""
import torch

from model import positions
from predictor import score
from prune import candidates, nll, oracle_scorer, predictor_scorer, random_scorer, recent_scorer
from saliency import mark, reduce_saliency


def spearman(a, b):
    """Rank correlation of two vectors (n,)."""
    a, b = (v.float().argsort().argsort().float() for v in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9)).item()


def report(model, predictors, rows, schedule, reduce):
    """Held-out measures: mean spearman and top-k overlap with the saliency over stages and rows, and NLL per response token."""
    after = schedule.after(len(model.blocks))
    rho, overlap, total, count = [], [], {}, 0
    for row, example in enumerate(rows):
        tokens, n = example.tokens[None].to(model.device), example.prompt_len
        states, grads, _ = mark(model, tokens, n, after)
        s = torch.stack([reduce_saliency(g, x, reduce) for g, x in zip(grads, states)])
        free = candidates(positions(tokens), [n], schedule)[0]
        for stage, x in enumerate(states):
            predicted, true = score(predictors[stage](x))[0, free], s[stage][0, free]
            if len(true) < 2:
                continue
            k = max(1, round(schedule.share(stage + 1) * len(true)))
            rho.append(spearman(predicted, true))
            overlap.append(len(set(predicted.topk(k).indices.tolist()) & set(true.topk(k).indices.tolist())) / k)
        for name, scorer in (("full", None), ("sdtp", predictor_scorer(predictors)), ("random", random_scorer(row)),
                             ("recent", recent_scorer()), ("oracle", oracle_scorer(s))):
            total[name] = total.get(name, 0) + nll(model, tokens, n, schedule if scorer else None, scorer).sum().item()
        count += tokens.shape[1] - n
    return {"spearman": sum(rho) / max(1, len(rho)), "overlap": sum(overlap) / max(1, len(overlap)), **{f"nll_{k}": v / count for k, v in total.items()}}


def calibrate(model, predictors, rows, schedule, priors=(0.0, 0.25, 0.5, 1.0, -0.25, -0.5)):
    """Beyond the paper: the prior of the scorer under which the pruned model finds these rows likeliest. Not the rows trained on: there
    the predictors know more than they will know later, and the prior comes out too small."""
    total = {}
    for prior in priors:
        values = [nll(model, e.tokens[None].to(model.device), e.prompt_len, schedule, predictor_scorer(predictors, prior)) for e in rows]
        total[prior] = (sum(v.sum() for v in values) / sum(v.numel() for v in values)).item()
        print(f"calibrating: prior {prior} gives NLL {total[prior]:.4f} on {len(rows)} validation rows", flush=True)
    return min(total, key=total.get)
