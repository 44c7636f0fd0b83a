"""Gradient saliency (Section 3.2, Eq. 3; Figures 1 and 2): on which tokens does the answer depend?

The unpruned, frozen model reads prompt and response once; one backward pass from the response's
log-likelihood gives the gradient at every stage together. This is the marking pass of the paper,
and the teacher of predictor.py.

    python saliency.py --figure 1 --png fig1.png                      # heat map, block x token
    python saliency.py --figure 2 --ckpt smollm2 --data dolly.jsonl   # sparsity against depth

Shapes: N tokens (prompt, then response), R of the response, S stages, L blocks, D hidden.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import Tokenizer, causal_attention, load
from support import options, runs, show
from support.files import need
from support.weights import DTYPES

REDUCE = ("norm_gx", "norm_g", "abs_dot")


def mark(model, tokens, prompt_len, blocks):
    """The marking pass: one forward and one backward pass for all stages.

    tokens (1, N) are prompt and response; blocks, increasing from 1, say which states are marked:
    x of Eq. 3 leaves block b. T, our choice, is the response's log-likelihood.
    -> states x and gradients of T, lists of S tensors (1, N, D), and the logits (1, R, V) that
    predict the response. Raises ValueError for an empty prompt or response.
    """
    N = tokens.shape[1]
    need(1 <= prompt_len < N, f"marking needs a prompt and a response: {prompt_len} of {N} tokens")
    rope = model.rope(torch.arange(N, device=tokens.device)[None], N)
    states = []
    with torch.enable_grad():
        x = model.embed(tokens)                                     # (1, N, D)
        for b, block in enumerate(model.blocks, start=1):
            x = run_block(block, x, rope)
            if b == blocks[0]:
                x = x.detach().requires_grad_()     # the graph starts here: nothing is needed below
            if b in blocks:
                states.append(x)
        logits = model.logits(x[:, prompt_len - 1:-1])      # a token is predicted by the one before
        T = -F.cross_entropy(logits[0], tokens[0, prompt_len:], reduction="sum")
        grads = torch.autograd.grad(T, states)
    return [x.detach() for x in states], list(grads), logits.detach()


def run_block(block, x, rope, attend=causal_attention):
    """block(x, rope, attend), of which a long row keeps only x for the backward pass."""
    n, D = x.shape[1:]
    quadratic = attend is not causal_attention      # a mask that learns keeps n x n weights
    if n * D > 1 << 20 or quadratic and n > 512:
        return checkpoint(block, x, rope, attend, use_reentrant=False)
    return block(x, rope, attend)


def reduce_saliency(g, x, reduce="norm_gx"):
    """One number per token from gradient g and state x, both (..., D) -> (...) fp32.

    Eq. 3 is the product of both; how it becomes one number is our reading. "abs_dot" is the size of
    its sum, the dot product: there terms of opposite sign cancel. As an oracle the norm keeps far
    more, so "norm_gx", the norm of the product, is the default. "norm_g" ignores x.
    """
    need(reduce in REDUCE, f"unknown reduction {reduce!r}; there are {', '.join(REDUCE)}")
    g = g.float()
    if reduce == "norm_g":
        return g.norm(dim=-1)
    product = g * x.float()  # Eq. 3
    if reduce == "abs_dot":
        return product.sum(-1).abs()
    return product.norm(dim=-1)


def saliency(model, tokens, prompt_len, blocks, reduce="norm_gx"):
    """Saliency of every token at every stage: tokens (1, N) -> (S, N) fp32; see `mark`.

    Columns from prompt_len on are the response's own tokens; they are never dropped.
    """
    states, grads, _ = mark(model, tokens, prompt_len, blocks)
    return torch.cat([reduce_saliency(g, x, reduce) for g, x in zip(grads, states)])


def sparsity(s):
    """Figure 2: the share of tokens with at most 10% of the largest saliency: (..., N) -> (...)."""
    return (s <= 0.1 * s.amax(-1, keepdim=True)).float().mean(-1)


def main():
    args = options.saliency_options(__doc__, REDUCE)
    tokenizer = Tokenizer(args.ckpt)
    rows = options.rows_for_figure(args, tokenizer)
    model = load(args.ckpt, DTYPES.get(args.dtype), args.device)
    blocks = range(1, len(model.blocks) + 1)
    marks = []                                                      # of (L, P)
    for example in runs.counted(rows, "rows", args.quiet):
        tokens = example.tokens[None].to(model.device)
        s = saliency(model, tokens, example.prompt_len, blocks, args.reduce)
        marks.append(s[:, :example.prompt_len].cpu())
    if args.figure == 1:
        result = show.figure1(marks[0], rows[0], tokenizer, args.png)
    else:
        result = show.figure2(torch.stack([sparsity(s) for s in marks]), args.ckpt, args.png)
    options.print_json(args, model, result)


if __name__ == "__main__":
    options.cli(main)
