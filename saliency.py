"""Gradient saliency (Section 3.2, Eq. 3; Figures 1 and 2): which prompt tokens does the answer depend on?

The unpruned, frozen model reads prompt and response once; one backward pass from the response's log-likelihood gives
the gradient at every stage together. This is the marking stage of the paper, and the teacher of predictor.py.

    python saliency.py --figure 1 --png fig1.png                       # heat map, block x token, of one row
    python saliency.py --figure 2 --ckpt smollm2 --data dolly.jsonl    # sparsity against depth over many rows

Shapes: B rows, N tokens (prompt and response), S stages, D hidden, L blocks.
"""
import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F

from common import add_data_arguments, at_least, cli, encode_row, provenance, rows_from
from model import Tokenizer, load, need, positions
from pictures import figure1, figure2, heat_text

REDUCE = ("norm_gx", "norm_g", "abs_dot")
IGNORE = -100       # a label that is not to be predicted


def response_labels(tokens, prompt_len, lengths=None):
    """What is to be predicted: tokens (B, N) -> (B, N - P), P the shortest prompt, IGNORE where a row still has prompt or already padding.

    prompt_len: an int, or a list of B; lengths: B row lengths, where rows are padded on the right.
    """
    B, N = tokens.shape
    prompts, lengths = [prompt_len] * B if isinstance(prompt_len, int) else list(prompt_len), lengths or [N] * B
    for p, n in zip(prompts, lengths):
        need(1 <= p < n <= N, f"marking needs a prompt and a response: {p} prompt tokens of {n}")
    start, end = torch.tensor([prompts, lengths], device=tokens.device)[:, :, None]
    at = positions(tokens)
    return tokens.masked_fill((at < start) | (at >= end), IGNORE)[:, min(prompts):]


def mark(model, tokens, prompt_len, blocks, lengths=None):
    """The marking stage: one forward, one backward, all stages.

    tokens (B, N) = prompt then response, prompt_len < N, blocks = numbers (from 1) of the blocks whose outputs are asked for.
    Returns states and grads, lists of (B, N, D) in the order of `blocks`, and the response's logits (B, N - prompt_len, V).
    A gradient is that of T, the summed log-likelihood of the response tokens. Rows of different length: `response_labels`.
    """
    blocks = list(blocks)
    labels = response_labels(tokens, prompt_len, lengths)
    need(blocks == sorted(set(blocks)) and blocks and 1 <= blocks[0] and blocks[-1] <= len(model.blocks),
         f"stages after blocks {blocks}: expected increasing numbers from 1 to {len(model.blocks)}")
    rope = model.rope(positions(tokens), tokens.shape[1])
    states = []
    with torch.enable_grad():
        x = model.embed(tokens)
        for i, block in enumerate(model.blocks, start=1):
            x = block(x, rope)
            if i == blocks[0]:
                x = x.detach().requires_grad_()      # no gradient is needed below the first stage
            if i in blocks:
                states.append(x)
        logits = model.logits(x[:, -labels.shape[1] - 1:-1])         # position t predicts token t + 1
        T = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        grads = torch.autograd.grad(T, states)
    return [x.detach() for x in states], list(grads), logits.detach()


def reduce_saliency(g, x, reduce="norm_gx"):
    """One number per token from gradient g and state x, both (B, n, D) -> (B, n) fp32.

    abs_dot is the literal Eq. 3, |g . x|; norm_g is the norm of g; norm_gx the norm of the elementwise product g * x: the
    default, because in a sum over features large terms of both signs cancel, and pruning by the norm costs less.
    """
    g, x = g.float(), x.float()
    if reduce == "abs_dot":
        return (g * x).sum(-1).abs()                                 # Eq. 3
    if reduce == "norm_g":
        return g.norm(dim=-1)
    need(reduce == "norm_gx", f"unknown saliency reduction {reduce!r}; there are {', '.join(REDUCE)}")
    return (g * x).norm(dim=-1)


def saliency(model, tokens, prompt_len, blocks, reduce="norm_gx"):
    """Saliency of every token at every stage: tokens (B, N) -> (S, B, N) fp32. Eq. 3; arguments as for `mark`.

    Columns from prompt_len on are the response's own tokens; they are never candidates for dropping.
    """
    states, grads, _ = mark(model, tokens, prompt_len, blocks)
    return torch.stack([reduce_saliency(g, x, reduce) for g, x in zip(grads, states)])


def sparsity(s):
    """Share of tokens whose saliency is at most 10% of the largest of their row (Figure 2): s (..., n) -> (...)."""
    return (s <= 0.1 * s.amax(-1, keepdim=True)).float().mean(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="toy", help="checkpoint directory, as given or under checkpoints/")
    parser.add_argument("--figure", type=int, choices=(1, 2), default=1, help="1: heat map of one row; 2: sparsity per block over rows")
    parser.add_argument("--reduce", choices=REDUCE, default="norm_gx", help="how the gradient becomes one number per token")
    parser.add_argument("--row", type=at_least(0), default=0, help="Figure 1: which of the held-out rows")
    parser.add_argument("--prompt", help="Figure 1: this prompt instead of a row (with --response)")
    parser.add_argument("--response", help="Figure 1: the answer whose log-likelihood is traced back")
    parser.add_argument("--png", help="write the figure here (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object on the last line")
    add_data_arguments(parser, limit=20)
    args = parser.parse_args()
    tokenizer, model = Tokenizer(args.ckpt), load(args.ckpt)
    blocks = range(1, len(model.blocks) + 1)
    if args.figure == 1:
        if args.prompt:
            need(args.response, "--prompt needs --response: saliency is the gradient of the response's log-likelihood")
            row = {"instruction": args.prompt, "response": args.response}
            example = encode_row(tokenizer, row, args.template or "plain", args.max_response)
        else:
            rows = rows_from(args, tokenizer, "heldout", limit=args.row + 1)
            need(args.row < len(rows), f"--row {args.row}: there are {len(rows)} rows")
            example = rows[args.row]
        s = saliency(model, example.tokens[None].to(model.device), example.prompt_len, blocks, args.reduce)[:, 0, :example.prompt_len]
        labels = [tokenizer.piece(t) for t in example.tokens[:example.prompt_len].tolist()]
        print(heat_text(s.cpu(), labels, sys.stdout.isatty()))
        if args.png:
            figure1(s, labels, args.png)
        result = {"figure": 1, "reduce": args.reduce, "tokens": labels, "saliency": s.tolist()}
    else:
        rows = rows_from(args, tokenizer, "heldout")
        total, start = torch.zeros(len(model.blocks)), time.time()
        for done, example in enumerate(rows, start=1):
            s = saliency(model, example.tokens[None].to(model.device), example.prompt_len, blocks, args.reduce)
            total += sparsity(s[:, 0, :example.prompt_len]).cpu()
            left = (time.time() - start) / done * (len(rows) - done)
            print(f"\r{done}/{len(rows)} rows, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        values = (total / len(rows)).tolist()
        for block, value in zip(blocks, values):
            print(f"block {block:3d}  sparsity {value:.3f}  " + "#" * round(50 * value))
        if args.png:
            figure2(values, args.png, f"Sparsity of salient tokens, {args.ckpt}, {len(rows)} rows")
        result = {"figure": 2, "reduce": args.reduce, "rows": len(rows), "sparsity": values}
    if args.json:
        print(json.dumps({**provenance(model), "ckpt": args.ckpt, **result}))


if __name__ == "__main__":
    cli(main)
