"""How much memory a model needs to prune and to train predictors, by arithmetic.

    python -m lab.memory                                # Llama-2-7B in 24, 40 and 80 GB
    python -m lab.memory --shape mistral-7b --gb 16

The weights, and what grows with the prompt: of inference the caches and one block's inner values;
of training what the backward passes need. Long rows keep of each block its input alone and compute
the rest again (support/recompute.py). An allocator needs a little more.
"""
from dataclasses import replace

import torch

from lab.plan import SHAPES
from model import FEED_FORWARD_CHUNK, Config, Llama
from predictor import Predictor
from prune import UNPRUNED, Schedule, kv_bytes
from support.checkpoint import DTYPES, shape_of
from support.options import (add_json_argument, add_schedule_arguments, at_least, cli,
                             command_parser, print_json, schedule_options)
from support.recompute import is_long

# fp32 values of (H, n, n) that masked attention and its backward hold at once, and those that stay
# until the backward of a row whose blocks are not recomputed; measured: 9 to 12, and 6.
MASKED, MASKED_KEPT = 12, 6
SPARE = 0.92                        # share of a device's memory that tensors can have


def weights(config):
    """Numbers in the backbone."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def inner(config, n, size):
    """Bytes of one block's inner values for n tokens: queries, keys, values, SwiGLU."""
    c = config
    heads = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    swiglu = 3 * c.ffn * min(n, FEED_FORWARD_CHUNK["cuda"])
    return size * (n * (4 * c.dim + heads) + swiglu)


def inference(config, n, new, schedule, size):
    """Bytes for a prompt of n tokens and `new` decoded ones, without the weights."""
    counts = [m + new for m in schedule.counts(n, config.n_blocks)]
    return kv_bytes(config, counts, size) + inner(config, n, size) + 4 * config.vocab


def training(config, n, response, schedule, size):
    """Bytes for a row of n tokens, `response` of them answer, without the weights."""
    c, S = config, len(schedule.after(config.n_blocks))
    states = n * c.dim * size                   # what one block hands to the next
    block = 2 * inner(c, n, size)               # and its gradients
    pairs = 4 * c.n_heads * n * n
    logits = 4 * 4 * response * c.vocab         # with softmax and gradient
    masked = MASKED * pairs
    few, whole = (c.n_blocks + 1) * states, c.n_blocks * inner(c, n, size)
    kept_marking = few if is_long(n, c.dim, quadratic=False) else whole
    kept_pruning = whole + (c.n_blocks - schedule.first) * MASKED_KEPT * pairs
    if is_long(n, c.dim):
        kept_pruning = few
    marking = kept_marking + S * states + block + logits
    pruning = kept_pruning + block + masked + logits
    return predictor_bytes(c, S) + 2 * S * states + max(marking, pruning)


def predictor_bytes(config, stages):
    """Weights, gradients and AdamW's two moments of the predictors, fp32."""
    with torch.device("meta"):
        one = sum(p.numel() for p in Predictor(config.dim).parameters())
    return 4 * 4 * stages * one


def longest(config, room, need):
    """The most tokens, in steps of 64, whose need(n) bytes fit into `room`, within the model's
    positions; 0 where none do.
    """
    n = 0
    while n + 64 <= config.max_positions and need(n + 64) <= room:
        n += 64
    return n


def plan(config, gb, schedule, args):
    """What fits into so many GB -> a dict."""
    size = DTYPES[args.dtype].itemsize
    room = SPARE * gb * 1e9 - weights(config) * size
    new, response = args.new, args.response
    found = {"gb": gb, "weights_gb": weights(config) * size / 1e9, "left_gb": room / 1e9}
    found["full"] = longest(config, room, lambda n: inference(config, n, new, UNPRUNED, size))
    found["sdtp"] = longest(config, room, lambda n: inference(config, n, new, schedule, size))
    found["train"] = longest(config, room, lambda n: training(config, n, response, schedule, size))
    return found


def memory_parser():
    parser = command_parser(__doc__)
    parser.add_argument("--shape", default="llama-7b",
                        help=f"{', '.join(SHAPES)}, or a checkpoint directory (its config.json)")
    parser.add_argument("--gb", type=at_least(1), nargs="+", default=[24, 40, 80],
                        help="memory of the device, GB")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--new", type=at_least(1), default=128, help="decoded tokens")
    parser.add_argument("--response", type=at_least(1), default=256,
                        help="answer tokens of a training row")
    parser.add_argument("--rows", type=at_least(2), nargs="+", default=[256, 512, 1024, 2048],
                        help="tokens of a training row: what each needs")
    add_json_argument(parser)
    add_schedule_arguments(parser)
    return parser


def main():
    args = memory_parser().parse_args()
    config = Config(**shape_of(args.shape))
    config = replace(config, max_positions=min(config.max_positions, 1 << 18))
    schedule = replace(Schedule.scaled(config.n_blocks), **schedule_options(args))
    size, row_bytes = DTYPES[args.dtype].itemsize, {}
    total = weights(config)
    print(f"{args.shape}, {args.dtype}: {total / 1e9:.2f} billion weights, "
          f"{total * size / 1e9:.1f} GB")
    for n in args.rows:
        row_bytes[n] = training(config, n, min(n - 1, args.response), schedule, size)
        print(f"  a training row of {n:5d} tokens: {row_bytes[n] / 1e9:5.1f} GB more")
    print("   GB   left   longest prompt, full   SDTP   longest training row")
    plans = [plan(config, gb, schedule, args) for gb in args.gb]
    for found in plans:
        print(f"{found['gb']:5d}  {found['left_gb']:5.1f} {found['full']:22,d} "
              f"{found['sdtp']:6,d} {found['train']:22,d}")
    print_json(args, None, {"rows": plans, "training_bytes": row_bytes})


if __name__ == "__main__":
    cli(main)
