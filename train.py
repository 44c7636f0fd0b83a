"""Training the predictors (Section 3.3, Eq. 7 and 8): a marking and a pruning pass per row, the backbone frozen.

Marking: the unpruned model reads the row, forward and backward, and gives every stage its saliency (saliency.py).
Pruning: the row is read again; at each stage the predictor scores the tokens and a mask hides the dropped ones from
attention. The loss is cross entropy of the response + MSE + ranking (Eq. 8), optionally distillation.

    python train.py                                            # the toy, from nothing, under two minutes on two cores
    python train.py --ckpt llama-7b --data dolly.jsonl         # as the paper: two epochs of Dolly
    python train.py --ckpt smollm2 --data dolly.jsonl --template chatml --cls 0 --mse 0 --states marked   # ranking alone

Shapes: B rows, N tokens (prompt and response), S stages, D hidden.
"""
import argparse
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import add_data_arguments, at_least, blame, cli, digest, output, provenance, rows_from
from heldout import calibrate, report
from model import DTYPES, PAD, Tokenizer, load, need, positions
from parallel import add_up, first_says, join, place, sharded
from predictor import Predictor, fingerprint, gumbel_mask, load_tensors, mse_loss, ranking_loss, save_predictors, save_tensors, score, straight_through
from prune import Schedule, add_schedule_arguments, beyond, candidates, schedule_from, select
from saliency import IGNORE, REDUCE, mark, reduce_saliency, response_labels


def padded(examples, device):
    """Rows side by side, padded on the right: -> tokens (B, N), their prompts' lengths, their lengths."""
    lengths = [len(e.tokens) for e in examples]
    return torch.nn.utils.rnn.pad_sequence([e.tokens for e in examples], batch_first=True).to(device), [e.prompt_len for e in examples], lengths


def places(tokens, prompt_len, lengths):
    """Positions (B, N) with padding at PAD, and prompt_len and lengths as lists: an int stands for all rows."""
    lengths = lengths or [tokens.shape[1]] * len(tokens)
    return positions(tokens).masked_fill(beyond(lengths, tokens.device), PAD), [prompt_len] * len(tokens) if isinstance(prompt_len, int) else prompt_len, lengths


def survivors(scores, pos, prompt_len, lengths, stage, schedule):
    """The hard mask (B, N) that inference would use at a stage (from 1): of each row's prompt the scheduled count, and its response."""
    k = [schedule.kept(n, stage) + m - n for n, m in zip(prompt_len, lengths)]
    index = select(scores, pos, k, prompt_len, schedule.sink, schedule.local)
    return torch.zeros(pos.shape, device=pos.device).scatter(1, index, (~beyond(k, pos.device)).float())


def masked_pass(model, predictors, tokens, prompt_len, schedule, mask="topk", tau=1.0, lengths=None):
    """The pruning stage of training: tokens (B, N) -> x (B, N, D) leaving the last block, stage logits and masks.

    Nothing is dropped physically; a dropped token is hidden from all later attention (it still sees itself). mask:
    "gumbel" samples every candidate (Eq. 2), "topk" keeps exactly the scheduled count. Returns x, a list of S logits
    (B, N, 2) and a list of S + 1 masks (B, N): masks[s] says which tokens stage s + 1 still found. Rows of different
    length: prompt_len and lengths are lists of B.
    """
    pos, prompt_len, lengths = places(tokens, prompt_len, lengths)
    rope = model.rope(pos, tokens.shape[1])
    after = schedule.after(len(model.blocks))
    free = candidates(pos, prompt_len, schedule)
    x = model.embed(tokens)
    keep, logits, masks = None, [], [torch.ones_like(pos, dtype=torch.float32)]
    for i, block in enumerate(model.blocks, start=1):
        if keep is None or tokens.shape[1] <= 512:
            x = block(x, rope, keep=keep)
        else:                       # the n x n weights of masked attention are computed again in the backward pass, not held
            x = checkpoint(block, x, rope, None, keep, use_reentrant=False)
        if i in after:
            logits.append(predictors[len(logits)](x))
            if mask == "topk":      # the value is inference's choice, the gradient that of the keep probability
                alive = score(logits[-1]).detach().masked_fill(masks[-1].detach() == 0, -math.inf)
                keep = straight_through(survivors(alive, pos, prompt_len, lengths, len(logits), schedule), torch.softmax(logits[-1], -1)[..., 0], masks[-1])
            else:
                keep = gumbel_mask(logits[-1], tau, masks[-1])
            keep = torch.where(free, keep, 1.0)                      # the protected have no choice, so no gradient
            masks.append(keep)
    return x, logits, masks


def marking(model, tokens, prompt_len, schedule, args, lengths=None):
    """The marking stage: S states (B, N, D), S saliencies (B, N), and the unpruned logits where they are distilled."""
    states, grads, logits = mark(model, tokens, prompt_len, schedule.after(len(model.blocks)), lengths)
    return states, [reduce_saliency(g, x, args.reduce) for g, x in zip(grads, states)], logits if args.distill else None


def losses(model, predictors, tokens, prompt_len, schedule, args, marks=None, lengths=None):
    """Everything Eq. 8 adds up, each the mean over rows of a row's own: -> {name: loss}, and the share of the prompt kept per stage."""
    states, targets, full_logits = marks or marking(model, tokens, prompt_len, schedule, args, lengths)
    pos, prompt_len, lengths = places(tokens, prompt_len, lengths)
    free, labels = candidates(pos, prompt_len, schedule), response_labels(tokens, prompt_len, lengths)
    answered = labels != IGNORE
    by_row = lambda values: ((values.view(labels.shape) * answered).sum(1) / answered.sum(1)).mean()
    found, kept = {}, []
    if args.cls or args.distill or args.states == "pruned":
        x, logits, masks = masked_pass(model, predictors, tokens, prompt_len, schedule, args.mask, args.tau, lengths)
        out = model.logits(x[:, min(prompt_len) - 1:-1])             # position t predicts token t + 1
        if args.cls:
            found["cls"] = by_row(F.cross_entropy(out.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"))  # Eq. 7
        if args.distill:
            found["distill"] = by_row(F.kl_div(out.log_softmax(-1), full_logits.log_softmax(-1), log_target=True, reduction="none").sum(-1))
        kept = [sum(m[b, :n].mean().item() for b, n in enumerate(prompt_len)) / len(prompt_len) for m in masks[1:]]
        alive = [free & (m > 0) for m in masks[:-1]]                 # a token dropped earlier has no rank any more
    if args.states == "marked":
        logits, alive = [p(x) for p, x in zip(predictors, states)], [free]
        for s, target in enumerate(targets[1:], start=1):            # a stage learns on as many tokens as it will find, the most salient
            alive.append(free & (survivors(target, pos, prompt_len, lengths, s, schedule) > 0))
    for s, (pi, target, m) in enumerate(zip(logits, targets, alive), start=1):
        need(torch.isfinite(target[m]).all() and torch.isfinite(pi).all(), f"stage {s}: saliency or score is not finite")
        for row in zip(score(pi).split(1), target.split(1), m.split(1)):
            if args.mse:
                found["mse"] = found.get("mse", 0) + mse_loss(*row) / len(tokens)
            if args.rank:
                found["rank"] = found.get("rank", 0) + ranking_loss(*row, args.pairs) / len(tokens)  # Eq. 5
    return found, kept


def settings(model, rows, schedule, args):
    """What two runs must share so that one can go on with the other's state."""
    names = ("accum", "batch", "lr", "warmup", "steps", "epochs", "cls", "mse", "rank", "distill", "reduce", "pairs", "mask", "tau", "states", "seed")
    return json.dumps([{k: getattr(args, k) for k in names}, schedule.__dict__, fingerprint(model.config), str(model.dtype), digest(rows)])


def save_state(path, predictors, optimizer, step, log, run):
    """Everything that an unbroken run would have in memory, as safetensors. Rows and random numbers follow from seed and step."""
    tensors = {f"p.{k}": v for k, v in predictors.state_dict().items()}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"o.{i}.{k}": v for k, v in optimizer.state.get(p, {}).items()}
    save_tensors(path, tensors, {"step": str(step), "log": json.dumps(log), "settings": run})


def load_state(path, predictors, optimizer, run):
    """The reverse of save_state: -> (steps done, log)."""
    tensors, metadata = load_tensors(path)
    need({"step", "log", "settings"} <= set(metadata), f"{path}: not a training state")
    need(metadata["settings"] == run, f"{path}: it belongs to a run with other settings, rows or model; repeat that command, or start without --resume")
    with blame(path, "damaged training state"):
        step, log = int(metadata["step"]), json.loads(metadata["log"])
        need(isinstance(log, list) and len(log) == step and all(isinstance(e, dict) for e in log), f"step {step} does not fit its log")
        predictors.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("p.")})
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            state = {k.split(".")[2]: v for k, v in tensors.items() if k.startswith(f"o.{i}.")}
            shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape} if state else {}
            need({k: v.shape for k, v in state.items()} == shapes and all(v.dtype == torch.float32 and (v.abs() < 1e9).all() for v in (p, *state.values()))
                 and (not state or 1 <= state["step"] <= step and state["exp_avg_sq"].min() >= 0), f"parameter {i} or its optimiser state is damaged")
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    return step, log


def rate(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < warmup * steps:
        return (step + 1) / (warmup * steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup * steps) / max(1, (1 - warmup) * steps)))


def train(model, rows, heldout, schedule, args, out, held=None, validation=(), stop=()):
    """The training loop; writes `out` (predictors.safetensors) and, beside it, the state for --resume. Returns the log. Once `stop` is
    not empty (a signal came) it saves and leaves after the step that it is in."""
    rank, world = place()
    need(world == 1 or args.accum % (args.batch * world) == 0, f"--accum {args.accum} rows a step in batches of {args.batch} do not divide among {world} processes")
    torch.manual_seed(args.seed)
    S = len(schedule.after(len(model.blocks)))
    need(S > 0, f"no stage of {schedule} stands before the last of {len(model.blocks)} blocks")
    schedule = Schedule(**{**schedule.__dict__, "stages": S, "shares": schedule.shares[:S]})
    predictors = nn.ModuleList(Predictor(model.config.dim) for _ in range(S)).to(model.device)
    optimizer = torch.optim.AdamW(predictors.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    steps = args.steps or max(1, (args.epochs or (2 if args.data else 1)) * len(rows) // args.accum)
    state, notes = out.with_name("train_state.safetensors"), {"reduce": args.reduce, "template": args.template or "plain", "command": "python " + " ".join(sys.argv)}
    run = settings(model, rows, schedule, args)
    step, log = load_state(state, predictors, optimizer, run) if args.resume and state.is_file() else (0, [])
    need(first_says(step) == step, f"{state}: not every process finds the same training state there")
    print(f"{len(rows)} rows, {steps} steps of {args.accum} rows, {S} stages after blocks {schedule.after(len(model.blocks))}, keep {schedule.keep}"
          + (f"; going on after step {step}" if step else ""), flush=True)
    began, first, seen, saved, held = time.time(), step, 0, time.time(), {} if held is None else held
    while step < steps:
        optimizer.param_groups[0]["lr"] = args.lr * rate(step, steps, args.warmup)
        sums = {}
        for first_row in range(step * args.accum, (step + 1) * args.accum, args.batch)[rank::world]:
            torch.manual_seed(args.seed + 1000003 * first_row)       # Gumbel noise too is known from the seed and the row alone
            chosen = []
            for micro in range(first_row, min(first_row + args.batch, (step + 1) * args.accum)):
                epoch, i = divmod(micro, len(rows))                  # every epoch in its own order, known from the seed alone
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
                chosen.append(order[i].item())
            try:
                tokens, prompt_len, lengths = padded([rows[i] for i in chosen], model.device)
                marks = held.get(tuple(chosen)) or marking(model, tokens, prompt_len, schedule, args, lengths)
                if args.hold:       # the backbone is frozen, so a row's marks never change
                    held[tuple(chosen)] = marks
                found, kept = losses(model, predictors, tokens, prompt_len, schedule, args, marks, lengths)
                loss = sum(getattr(args, name) * value for name, value in found.items())         # Eq. 8
                need(torch.isfinite(loss), "the loss is not finite: " + ", ".join(f"{k} {v.item():.3g}" for k, v in found.items()))
            except ValueError as e:
                raise ValueError(f"step {step + 1}: {e}; the files of the last save are kept") from None
            share = len(chosen) / args.accum
            (loss * share).backward()
            for name, value in {**found, "loss": loss}.items():
                sums[name] = sums.get(name, 0) + value.item() * share
            sums["tokens"] = sums.get("tokens", 0) + sum(lengths)
        sums, leave = add_up(list(predictors.parameters()), sums, bool(stop))
        seen += sums.pop("tokens")
        need(torch.nn.utils.clip_grad_norm_(predictors.parameters(), 1.0).isfinite(), f"step {step + 1}: the gradient is not finite; the files of the last save are kept")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log.append({"step": step, **{k: round(v, 6) for k, v in sums.items()}})
        spent = time.time() - began
        print(f"\rstep {step}/{steps}  " + "  ".join(f"{k} {v:.3f}" for k, v in sums.items()) + (f"  kept {kept[-1]:.0%}" if kept else "")
              + f"  {seen / spent:.0f} tokens/s  {spent / (step - first) * (steps - step):.0f} s left   ", end="\n" if step % args.report_every == 0 or step == steps else "", flush=True)
        if heldout and (step % args.report_every == 0 or step == steps):
            log[-1]["heldout"] = report(model, predictors.eval(), heldout, schedule, args.reduce)
            predictors.train()
            print("  held out: " + "  ".join(f"{k} {v:.3f}" for k, v in log[-1]["heldout"].items()), flush=True)
        if rank == 0 and (step == steps or leave or time.time() - saved > args.save_every):
            save_predictors(out, predictors, model.config, schedule, steps=step, **notes)
            save_state(state, predictors, optimizer, step, log, run)
            saved = time.time()
        if leave and step < steps:
            first_says(step)        # of several processes none leaves before the first has saved
            sys.exit(f"\nstopped and saved after step {step} of {steps}: the same command with --resume goes on")
    if validation:
        prior = calibrate(model, predictors.eval(), validation, schedule)
        if rank == 0:
            save_predictors(out, predictors, model.config, schedule, steps=step, prior=prior, **notes)
    return log


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="toy", help="checkpoint directory, as given or under checkpoints/")
    add_data_arguments(parser, limit=None)
    parser.add_argument("--epochs", type=at_least(1), help="passes over the rows (default: 2, the paper's; on the toy's own rows 1)")
    parser.add_argument("--steps", type=at_least(1), help="optimiser steps, instead of --epochs")
    parser.add_argument("--accum", type=at_least(1), default=4, help="rows whose gradients are added up before a step")
    parser.add_argument("--batch", type=at_least(1), default=1, help="rows that go through the model together, padded to the longest (the same step, but for the noise of --mask gumbel, and faster on a GPU)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps with a rising rate; a cosine follows")
    parser.add_argument("--cls", type=float, default=1.0, help="weight of the pruned model's cross entropy, Eq. 7")
    parser.add_argument("--mse", type=float, default=1.0, help="weight of the MSE to the saliency, Eq. 4")
    parser.add_argument("--rank", type=float, default=1.0, help="weight of the ranking loss, Eq. 5 and 6")
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the KL divergence from the unpruned model")
    parser.add_argument("--reduce", choices=REDUCE, default="norm_gx", help="how the gradient becomes one number per token")
    parser.add_argument("--pairs", choices=("equal", "saliency"), default="equal",
                        help="beyond the paper: `saliency` weighs each pair of the ranking loss by how far its saliencies lie apart")
    parser.add_argument("--mask", choices=("gumbel", "topk"), default="topk",
                        help="gumbel: sample each token (paper; nothing then ties the number kept to the schedule); topk: keep the scheduled count, as inference does")
    parser.add_argument("--tau", type=float, default=1.0, help="temperature of the Gumbel-Softmax")
    parser.add_argument("--states", choices=("pruned", "marked"), default="pruned",
                        help="what the predictors read for MSE and ranking: the states of the pruning pass (paper) or of the unpruned marking "
                             "pass; with `marked` and no --cls and --distill the pruning pass is left out, which is twice as fast")
    parser.add_argument("--hold", action="store_true", help="hold every row's marking pass in memory (S x N x D values a row, with --distill its logits too): later epochs need no backbone with --states marked")
    parser.add_argument("--calibrate", type=at_least(0), default=0, metavar="ROWS",
                        help="beyond the paper: after training, choose how much a token's position counts, by the pruned likelihood of this many validation rows")
    parser.add_argument("--out", help="where predictors.safetensors goes (default: out/<ckpt>/)")
    parser.add_argument("--resume", action="store_true", help="go on from the state saved beside --out (from the start where there is none)")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between saves")
    parser.add_argument("--report-every", type=at_least(1), default=50, help="steps between held-out reports")
    parser.add_argument("--report-rows", type=at_least(0), default=8, help="held-out rows in a report (0: none)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--device", help="cuda, cpu or mps (default: cuda if there)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the backbone (default: bfloat16 on cuda, else float32)")
    parser.add_argument("--shard", action="store_true", help="under torchrun: spread the frozen blocks over the devices (FSDP2), for a backbone that does not fit on one")
    parser.add_argument("--png", metavar="FILE", help="draw the training curve (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the log as one JSON object on the last line")
    add_schedule_arguments(parser)
    return parser


def main():
    args = arguments().parse_args()
    need(args.cls or args.mse or args.rank or args.distill, "all loss weights are 0: nothing to train on")
    need(0 < args.lr < 10 and args.tau > 0 and 0 <= args.warmup < 1 and all(0 <= w < 1e6 for w in (args.cls, args.mse, args.rank, args.distill)), "--lr and --tau are positive, --warmup a share, weights of losses not negative")
    need(args.batch == 1 or not args.hold, "--hold keeps single rows: leave out --batch")
    device = join(args.device)
    need(place().world > 1 or not args.shard, "--shard needs several processes: put torchrun --nproc-per-node N before the command")
    need(not (args.hold and args.shard), "--shard gathers blocks in step on all processes, so none may pass over a row: leave out --hold")
    tokenizer, model = Tokenizer(args.ckpt), load(args.ckpt, DTYPES.get(args.dtype), device, sharded() if args.shard else None)
    schedule = schedule_from(args, len(model.blocks))
    rows = rows_from(args, tokenizer, "train")
    heldout = rows_from(args, tokenizer, "heldout", limit=args.report_rows) if args.report_rows else []
    validation = rows_from(args, tokenizer, "validation", limit=args.calibrate) if args.calibrate else []
    out = output(args.out or Path("out") / Path(args.ckpt).name, "predictors.safetensors")
    begin, stop = time.time(), []

    def asked(number, frame):
        if stop:                    # twice: at once, without saving
            raise KeyboardInterrupt
        stop.append(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked)
    log = train(model, rows, heldout, schedule, args, out, validation=validation, stop=stop)
    if args.png and place().rank == 0:
        from pictures import curve
        curve(log, args.png)
    print(f"wrote {out} after {time.time() - begin:.0f} s; use it with --predictors {out}")
    if args.json:
        print(json.dumps({**provenance(model), "seconds": time.time() - begin, "out": str(out), "log": log}))


if __name__ == "__main__":
    cli(main)
