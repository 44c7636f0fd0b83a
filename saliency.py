"""Gradient saliency (Section 3.2, Eq. 3; Figures 1 and 2): on which tokens does the answer depend?

The unpruned, frozen model reads prompt and response once; one backward pass from the response's
log-likelihood gives the gradient at every stage together. This is the marking stage of the paper,
and the teacher of predictor.py.

    python saliency.py --figure 1 --png fig1.png                      # heat map, block x token
    python saliency.py --figure 2 --ckpt smollm2 --data dolly.jsonl   # sparsity against depth

Shapes: B rows, N tokens (prompt and response), R = N - the shortest prompt, S stages, D hidden.
"""
import torch
import torch.nn.functional as F

from model import Tokenizer, load, positions
from support.checks import check_blocks
from support.data import IGNORE, response_labels
from support.files import need
from support.options import chosen_rows, cli, print_json
from support.parsers import saliency_parser
from support.progress import counted
from support.recompute import recomputed

REDUCE = ("norm_gx", "norm_g", "abs_dot")


def mark(model, tokens, prompt_len, blocks, lengths=None):
    """The marking stage: one forward and one backward pass for all stages.

    tokens (B, N) are prompt and response; blocks, increasing from 1, say which states are marked:
    x of Eq. 3 leaves block b and enters b + 1; T, our choice, is the response's log-likelihood.
    -> states x, gradients of T, lists of (B, N, D), and logits (B, R, V). prompt_len, lengths: see
    support.data.response_labels. Raises ValueError for impossible ones.
    """
    blocks = list(blocks)
    check_blocks(blocks, len(model.blocks))
    labels = response_labels(tokens, prompt_len, lengths)           # (B, R)
    rope = model.rope(positions(tokens), tokens.shape[1])
    states = []
    with torch.enable_grad():
        x = model.embed(tokens)                                     # (B, N, D)
        for i, block in enumerate(model.blocks, start=1):
            x = recomputed(block, x, rope)
            if i == blocks[0]:
                x = x.detach().requires_grad_()     # below the first stage no gradient is needed
            if i in blocks:
                states.append(x)
        R = labels.shape[1]
        logits = model.logits(x[:, -R - 1:-1])      # (B, R, V): predicted by the token before
        flat = logits.flatten(0, 1)
        T = -F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        grads = torch.autograd.grad(T, states)
    states = [x.detach() for x in states]
    return states, list(grads), logits.detach()


def reduce_saliency(g, x, reduce="norm_gx"):
    """One number per token from gradient g and state x, both (B, N, D) -> (B, N) fp32.

    "abs_dot" is the size of Eq. 3's product, read as g . x. "norm_g" ignores x. The default,
    "norm_gx", is the norm of g * x: in a sum terms of both signs cancel, and more is lost by it.
    """
    g, x = g.float(), x.float()
    if reduce == "abs_dot":
        return (g * x).sum(-1).abs()  # Eq. 3
    if reduce == "norm_g":
        return g.norm(dim=-1)
    need(reduce == "norm_gx",
         f"unknown saliency reduction {reduce!r}; there are {', '.join(REDUCE)}")
    return (g * x).norm(dim=-1)


def saliency(model, tokens, prompt_len, blocks, reduce="norm_gx"):
    """Saliency of every token at every stage: tokens (B, N) -> (S, B, N) fp32; see `mark`.

    Columns from prompt_len on are the response's own tokens; they are never dropped.
    """
    states, grads, _ = mark(model, tokens, prompt_len, blocks)
    marks = []
    for g, x in zip(grads, states):
        marks.append(reduce_saliency(g, x, reduce))
    return torch.stack(marks)


def sparsity(s):
    """Figure 2: the share of tokens with at most 10% of the largest saliency: (..., N) -> (...)."""
    low = s <= 0.1 * s.amax(-1, keepdim=True)
    return low.float().mean(-1)


def prompt_saliency(model, example, reduce):
    """The saliency of one row's prompt after every block, (L, prompt_len) on the CPU."""
    tokens = example.tokens[None].to(model.device)
    blocks = range(1, len(model.blocks) + 1)
    s = saliency(model, tokens, example.prompt_len, blocks, reduce)
    return s[:, 0, :example.prompt_len].cpu()


def main():
    from lab.demo import show_figure1, show_figure2
    args = saliency_parser(__doc__, REDUCE).parse_args()
    tokenizer = Tokenizer(args.ckpt)
    rows = chosen_rows(args, tokenizer)
    model = load(args.ckpt)
    if args.figure == 1:
        example = rows[0]
        s = prompt_saliency(model, example, args.reduce)
        result = show_figure1(s, tokenizer, example, args.png)
    else:
        found = []
        for example in counted(rows, "rows", args.quiet):
            s = prompt_saliency(model, example, args.reduce)
            found.append(sparsity(s))
        result = show_figure2(torch.stack(found), args.ckpt, args.png)
    print_json(args, model, result)


if __name__ == "__main__":
    cli(main)
