"""What tensor parallel inference and sharded training take and give, by arithmetic; loads nothing.

    python -m lab.plan --shape llama-3-70b --devices 8

Shapes: N prompt tokens, L blocks, D hidden, V vocabulary, W devices.
"""
from dataclasses import replace

from model import FEED_FORWARD_CHUNK, Config
from prune import Schedule, flops, kv_bytes
from support.checkpoint import PUBLISHED, find
from support.files import need
from support.options import (add_json_argument, add_schedule_arguments, at_least, cli,
                             command_parser, print_json, schedule_options)

SHAPES = {name: Config(**fields) for name, fields in PUBLISHED.items()}


def block_bytes(config):
    """Bytes of a block's weights in bf16."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    matrices = config.dim * (2 * q + 2 * kv + 3 * config.ffn)
    norms = 2 * config.dim
    return 2 * (matrices + norms)


def plan(config, n, schedule, devices, peak, memory, link, latency=15e-6):
    """A prompt of n tokens on `devices` devices in bf16 -> bytes and seconds of each, a dict.

    peak FLOP/s, memory bytes/s and link bytes/s (each way) are those of one device, latency the
    seconds of one all-reduce. Embedding, head and predictors are not divided. Activations are a
    block's input, its sum with attention, the norm of that and the result, and a piece of the
    SwiGLU.
    """
    W, L, D = devices, config.n_blocks, config.dim
    block, head = block_bytes(config), 2 * config.vocab * D
    whole = head if config.tied else 2 * head           # the embedding is as large
    # A block adds up twice, after o and after down; a ring sends 2 (W - 1) / W times the bytes.
    sent = 2 * 2 * D * 2 * (W - 1) / W                  # bytes per token and block
    waiting = 2 * L * latency if W > 1 else 0.0
    piece = 2 * min(n, FEED_FORWARD_CHUNK["cuda"]) * config.ffn // W
    found = {"n": n, "devices": W,
             "weights_bytes": block * L / W + whole,
             "activation_bytes": 4 * 2 * D * n + 3 * piece,
             "traffic_per_token_bytes": sent * L,
             # forward and backward; a ring sends (W - 1) / W times what is gathered
             "train_gather_bytes": 2 * block * L * (W - 1) / W}
    for arm, counts in (("full", [n] * L), ("sdtp", schedule.counts(n, L))):
        in_blocks = flops(config, counts) - 2 * D * config.vocab
        everything = flops(config, counts, schedule=schedule if arm == "sdtp" else None)
        compute = (in_blocks / W + everything - in_blocks) / peak
        traffic = sent * sum(counts)
        held = kv_bytes(config, counts) / W
        read = block * L / W + head + held              # for one decoded token
        found[arm] = {"kv_bytes": held, "traffic_bytes": traffic,
                      "compute_s": compute,
                      "traffic_s": traffic / link + waiting,
                      "prefill_s": compute + traffic / link + waiting,
                      "decode_s": read / memory + sent * L / link + waiting}
    found["speedup"] = {part: found["full"][f"{part}_s"] / found["sdtp"][f"{part}_s"]
                        for part in ("compute", "traffic", "prefill", "decode")}
    return found


# ------------------------------------------------------------------------------------ command line


def plan_parser():
    parser = command_parser(__doc__)
    parser.add_argument("--shape", default="llama-3-70b",
                        help=f"{', '.join(SHAPES)}, or a checkpoint directory (its config.json)")
    parser.add_argument("--devices", type=at_least(2), default=8,
                        help="W, processes with a device each")
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=[8192, 32768, 131072],
                        help="prompt lengths")
    parser.add_argument("--peak", type=float, default=600.0, help="TFLOP/s that a large bf16 "
                        "matmul reaches on one device (the default is a guess for an H100; "
                        "lab.speed measures yours)")
    parser.add_argument("--memory", type=float, default=3000.0,
                        help="GB/s that one device reads from its memory")
    parser.add_argument("--link", type=float, default=350.0, help="GB/s that one device sends to "
                        "the next while it receives as much (NVLink 4; PCIe 5: 50)")
    parser.add_argument("--latency", type=float, default=15.0,
                        help="microseconds of an all-reduce of next to nothing")
    add_json_argument(parser)
    add_schedule_arguments(parser)
    return parser


HEAD = ("      N   arm    KV GB   activations GB   prefill s = arithmetic + traffic   decode ms"
        "   prefill speed-up (arithmetic, traffic)")


def print_devices(args, config, schedule, first):
    """What does not depend on the prompt's length."""
    stages = len(schedule.after(config.n_blocks))
    weights = f"{first['weights_bytes'] / 1e9:.1f} GB"
    gathered = first["train_gather_bytes"] / 1e9
    print(f"{args.shape} on {args.devices} devices of {args.peak:g} TFLOP/s, {args.memory:g} GB/s, "
          f"{args.link:g} GB/s to the next; bf16, {stages} stages, keep {schedule.keep}\n"
          f"each device: weights {weights}; sends "
          f"{first['traffic_per_token_bytes'] / 1e6:.2f} MB a token that passes all blocks\n"
          f"training with --shard: the same {weights}, and {gathered:.0f} GB gathered per device "
          f"for a forward and its backward: {gathered / args.link:.2f} s, however many rows "
          f"(--batch) share it\n")


def print_row(row):
    """Both arms of one prompt length."""
    for arm in ("full", "sdtp"):
        r = row[arm]
        line = (f"{row['n']:7d}   {arm:4} {r['kv_bytes'] / 1e9:7.2f} "
                f"{row['activation_bytes'] / 1e9:16.2f} {r['prefill_s']:11.3f} = "
                f"{r['compute_s']:10.3f} + {r['traffic_s']:7.3f} {1e3 * r['decode_s']:11.2f}")
        if arm == "sdtp":
            gain = row["speedup"]
            line += (f"   {gain['prefill']:16.2f}x ({gain['compute']:.2f}x, "
                     f"{gain['traffic']:.2f}x); decode {gain['decode']:.2f}x")
        print(line)


def main():
    args = plan_parser().parse_args()
    need(min(args.peak, args.memory, args.link) > 0 and args.latency >= 0,
         "--peak, --memory and --link are positive")
    if args.shape in SHAPES:
        config = SHAPES[args.shape]
    else:
        config = Config.from_json(find(args.shape) / "config.json")
    need(config.n_heads % args.devices == 0 and config.n_kv_heads % args.devices == 0,
         f"{config.n_heads} attention and {config.n_kv_heads} key/value heads do not divide among "
         f"{args.devices} devices")
    schedule = replace(Schedule.scaled(config.n_blocks), **schedule_options(args))
    device = args.peak * 1e12, args.memory * 1e9, args.link * 1e9, args.latency * 1e-6
    rows = [plan(config, n, schedule, args.devices, *device) for n in args.lengths]
    print_devices(args, config, schedule, rows[0])
    print(HEAD)
    for row in rows:
        print_row(row)
    print_json(args, None, {"rows": rows})


if __name__ == "__main__":
    cli(main)
