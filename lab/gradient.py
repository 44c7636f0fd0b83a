"""Does the mask's gradient say what letting a dropped token in would do? (Section 3.3)

Training through a mask of 0 and 1 asks the gradient which dropped token should have stayed. Here
the answer is known: one stage drops a random half of a prompt, then each dropped token is let in
alone, and the change of the response's cross entropy is set beside two gradients at that token:

  ours          model.masked_attention's: what seeing its key would change, block by block
  derivative    that of the multiplied exponentials at 0, in float64: no bound

    python -m lab.gradient                                              # the toy
    python -m lab.gradient --ckpt smollm2 --data dolly.jsonl --context --max-prompt 200

Shapes: B = 1 row, N tokens (prompt and response), R of the response.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from lab.heldout import spearman
from model import Tokenizer, load, masked_attention, positions, visible
from prune import Schedule, candidates
from support.checkpoint import shape_of
from support.files import need
from support.options import (add_data_arguments, add_json_argument, add_quiet_argument, at_least,
                             cli, command_parser, print_json, rows_from)
from support.parsers import CKPT_HELP
from support.progress import counted


def unbounded_attention(q, k, v, rope, mask):
    """model.masked_attention with the derivative of the multiplied exponentials, in float64."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1).double()
    v = v.repeat_interleave(group, 1).double()
    a = q.double() @ k.mT / math.sqrt(q.shape[-1])                  # (B, H, N, N)
    see = visible(rope.pos, rope.pos, rope.window)
    diagonal = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    m = torch.where(diagonal, 1.0, mask.double()[:, None, None, :])
    a = a.masked_fill(~see, -math.inf)
    kept = a.detach().masked_fill(m == 0, -math.inf)
    e = torch.exp(a - kept.logsumexp(-1, keepdim=True)) * m
    return (e / e.sum(-1, keepdim=True)) @ v


def answer_loss(model, example, mask, after, attention):
    """Mean cross entropy of the response, with mask (1, N) in every block behind block `after`."""
    tokens = example.tokens[None].to(model.device)
    rope = model.rope(positions(tokens), tokens.shape[1])
    hide = partial(attention, mask=mask)
    x = model.embed(tokens)
    for i, block in enumerate(model.blocks, start=1):
        x = block(x, rope) if i <= after else block(x, rope, hide)
    response = tokens[0, example.prompt_len:]
    last = model.norm(x[0, example.prompt_len - 1:-1])
    logits = model.head(last)                   # (R, V), in float64: model.logits gives fp32
    return F.cross_entropy(logits, response)


def measure(model, example, after, most, seed):
    """One row -> {gradient: [(its value, the change of the loss)]} for up to `most` tokens."""
    tokens = example.tokens[None]
    free = candidates(positions(tokens), [example.prompt_len], Schedule())[0].nonzero()[:, 0]
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
    dropped = free[order[:len(free) // 2]]
    need(len(dropped) > 1, "too few tokens may be dropped: choose a larger --min-prompt")
    mask = torch.ones(tokens.shape, dtype=model.dtype, device=model.device)
    mask[0, dropped] = 0
    gradients = {}
    for name, attention in (("ours", masked_attention), ("derivative", unbounded_attention)):
        asked = mask.clone().requires_grad_()
        answer_loss(model, example, asked, after, attention).backward()
        gradients[name] = asked.grad[0, dropped[:most]]
    changes = []
    with torch.no_grad():
        before = answer_loss(model, example, mask, after, masked_attention)
        for token in dropped[:most]:
            one = mask.clone()
            one[0, token] = 1
            changes.append(answer_loss(model, example, one, after, masked_attention) - before)
    return gradients, torch.stack(changes)


def compare(gradients, changes):
    """-> {gradient: its rank correlation and cosine with the changes, and its size over theirs}."""
    found = {}
    for name, g in gradients.items():
        size = g.norm() / changes.norm()
        cosine = (g / g.norm()) @ (changes / changes.norm())
        found[name] = {"spearman": spearman(g, changes), "cosine": cosine.item(),
                       "size": size.item()}
    return found


def main():
    parser = command_parser(__doc__)
    parser.add_argument("--ckpt", default="toy", help=CKPT_HELP)
    add_data_arguments(parser, limit=8)
    parser.add_argument("--after", type=at_least(1), default=4, metavar="BLOCK",
                        help="the stage stands after this block")
    parser.add_argument("--tokens", type=at_least(2), default=60,
                        help="so many dropped tokens of a row are let in, one at a time")
    add_quiet_argument(parser)
    add_json_argument(parser)
    args = parser.parse_args()
    tokenizer = Tokenizer(args.ckpt)
    blocks = shape_of(args.ckpt)["n_blocks"]
    need(args.after < blocks, f"--after {args.after}: expected a block before the last, {blocks}")
    rows = rows_from(args, tokenizer, "heldout")
    model = load(args.ckpt, torch.float64)
    found = []
    for number, example in enumerate(counted(rows, "rows", args.quiet)):
        found.append(compare(*measure(model, example, args.after, args.tokens, number)))
    print("gradient      rank correlation   cosine   size (geometric mean over rows)")
    table = []
    for name in found[0]:
        each = [row[name] for row in found]
        mean = {key: sum(row[key] for row in each) / len(each) for key in ("spearman", "cosine")}
        mean["size"] = math.exp(sum(math.log(row["size"]) for row in each) / len(each))
        table.append({"gradient": name, "n": len(rows), **mean})
        print(f"{name:12} {mean['spearman']:17.2f} {mean['cosine']:8.2f} {mean['size']:10.3g}")
    print_json(args, model, {"rows": table, "each": found})


if __name__ == "__main__":
    cli(main)
