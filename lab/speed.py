"""Speed and memory of both arms beside what the device can do (Section 4.3, Table 2).

Prefill is bound by arithmetic: its floor is FLOPs over the measured peak of a matmul. Decode is
bound by bytes: its floor is the weights and caches that one token reads, over the pace at which a
large matrix-vector product reads its matrix. The arms are those of `infer.py --bench` and take
turns in the same way; `--vs transformers` adds transformers on the same weights, dtype and tokens.

    python -m lab.speed --ckpt smollm2 --lengths 512 1024 --vs transformers --profile

Shapes: B = 1 row, N prompt tokens, V vocabulary. Times in seconds, sizes in bytes.
"""
import itertools
import statistics
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch

from infer import both_arms, generate
from lab.figures import cost_against_length
from lab.scorers import SCORERS, make_scorer
from model import FEED_FORWARD_CHUNK, hf_name, positions
from prune import UNPRUNED, drop, extend, kv_bytes, prefill, select
from support.caches import compile_model
from support.files import need
from support.linear import Linear
from support.options import (add_json_argument, add_pruning_arguments, add_quiet_argument,
                             at_least, cli, command_parser, hardware, picture_file, print_json)
from support.printing import gigabytes, print_bars
from support.progress import Progress
from support.sampling import fitting
from support.saved import load_pruning, read_pruning
from support.timing import (bench_row, check_bench, check_measured, clock, one_by_one,
                            random_prompt, take_turns, timed_arms)

# ---------------------------------------------------------------------------------------- floors


class Ceilings(NamedTuple):
    """What the device can do at best."""
    flops_s: float                  # FLOP/s of a large square matmul
    bytes_s: float                  # bytes/s of a large matrix-vector product, read


def timed(device, function, repeats):
    """Seconds of each of several calls, after one that is not counted."""
    function()
    found = []
    for _ in range(repeats):
        start = clock(device)
        function()
        found.append(clock(device) - start)
    return found


def ceilings(device, dtype):
    """Measure the Ceilings."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    # b.mT: as nn.Linear reads its weight; some CPUs are far slower the other way in half types
    matmul_s = min(timed(device, lambda: a @ b.mT, 10))
    wide = Linear(8192, 8192, bias=False, device=device, dtype=dtype).requires_grad_(False)
    token = torch.randn(1, 1, 8192, device=device).to(dtype)
    read_s = min(timed(device, lambda: wide(token), 20))
    return Ceilings(2 * size**3 / matmul_s, wide.weight.nbytes / read_s)


def weight_bytes(model):
    """What one decoded token reads of the weights: the blocks and the head, no embedding."""
    parts = (model.blocks, model.norm, model.head)
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def add_floors(row, model, schedule, new, best):
    """Add to a row of `bench_row` what each arm reaches of the Ceilings `best`."""
    row |= {"peak_flops": best.flops_s, "read_bytes_s": best.bytes_s}
    size, floor = model.embed.weight.element_size(), {}
    for name in arms_of(row):
        arm, used = row[name], schedule if name == "sdtp" else UNPRUNED
        held = [m + new // 2 for m in used.counts(row["n"], len(model.blocks))]
        moved = weight_bytes(model) + kv_bytes(model.config, held, size)
        floor[name] = arm["flops"] / best.flops_s + (new - 1) * moved / best.bytes_s
        flops_s = arm["flops"] / arm["prefill_s"]
        bytes_s = moved / arm["decode_s"] if new > 1 else 0.0
        arm |= {"flops_s": flops_s, "of_peak": flops_s / best.flops_s,
                "bytes_s": bytes_s, "of_read": bytes_s / best.bytes_s,
                "must_hold_bytes": must_hold(model, row["n"], used, new, arm["before_bytes"])}
    row["speedup"]["e2e_by_floors"] = floor["full"] / floor["sdtp"]


def must_hold(model, n, schedule, new, before):
    """Bytes that reading n tokens cannot do without: {part: bytes}.

    The weights, what else the process held `before`, the caches with room for new tokens, a hidden
    state for each token, and the inner values of one piece of SwiGLU.
    """
    c, size = model.config, model.embed.weight.element_size()
    weights = sum(p.nbytes for p in model.parameters())
    held = [m + new - 1 for m in schedule.counts(n, c.n_blocks)]
    piece = min(n, FEED_FORWARD_CHUNK.get(model.device.type, n))
    return {"weights": weights, "libraries": max(0, (before or 0) - weights),
            "caches": kv_bytes(c, held, size), "state": n * c.dim * size,
            "swiglu": 3 * piece * c.ffn * size}


def dtype_name(model):
    return str(model.dtype).removeprefix("torch.")


def arms_of(row):
    return [name for name in ("full", "sdtp", "transformers") if name in row]


# ------------------------------------------------------------------------------------- the stages


@torch.no_grad()
def pruning_seconds(model, tokens, schedule, scorer, repeats):
    """Time of all stages of a prefill, apart from the blocks: scorer, selection and drop."""
    total = 0.0
    x, pos = model.embed(tokens), positions(tokens)
    for stage in range(len(schedule.after(len(model.blocks)))):
        run = partial(prune_once, x, pos, stage, tokens.shape[1], schedule, scorer)
        total += statistics.median(timed(model.device, run, repeats))
        x, pos = run()
    return total


def prune_once(x, pos, stage, n, schedule, scorer):
    """A stage (from 0) of a prompt of n tokens, as in prune.prefill."""
    k = schedule.kept(n, stage + 1)
    index = select(scorer(stage, x, pos), pos, k, n, schedule.sink, schedule.local)
    return drop(x, pos, index)


def profile(model, n, schedule, scorer, top=12):
    """Where a prefill of n tokens spends its time: {arm: [(operator, share)]}.

    The time is that spent in an operator itself, on cuda that of its kernels.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    tokens, cuda = random_prompt(model, n), model.device.type == "cuda"
    seen = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    found = {}
    for name, arm in (("full", (None, None)), ("sdtp", (schedule, scorer))):
        prefill(model, tokens, *arm)
        with profiler(activities=seen) as events:
            prefill(model, tokens, *arm)
            clock(model.device)
        found[name] = shares(events.key_averages(), cuda)[:top]
        told = [f"{key.removeprefix('aten::')} {share:.1%}" for key, share in found[name]]
        print(f"{name}, {n} tokens: {', '.join(told)}", flush=True)
    return found


@torch.no_grad()
def products(model, repeats=10):
    """The matrix-vector products of one token alone -> {part: {"s": seconds, "bytes_s": bytes/s}}.

    In the order of a decode, so that each finds its weights in memory and not in a cache.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear)]
    tokens = {layer: model.embed.weight.new_ones(1, 1, layer.in_features) for _, layer in layers}
    spent, read = {}, {}
    for i in range(repeats + 1):
        for name, layer in layers:
            part = name.split(".")[-1]              # blocks.3.q, head
            start = clock(model.device)
            layer(tokens[layer])
            if i:                                   # the first round warms up
                spent[part] = spent.get(part, 0) + (clock(model.device) - start) / repeats
                read[part] = read.get(part, 0) + layer.weight.nbytes / repeats
    found = {part: {"s": spent[part], "bytes_s": read[part] / spent[part]} for part in spent}
    told = [f"{part} {told['bytes_s'] / 1e9:.1f} GB/s" for part, told in found.items()]
    print(f"a token's products alone: {1e3 * sum(spent.values()):.1f} ms; {', '.join(told)}")
    return found


def shares(events, cuda):
    """[(operator, its share of the time)], the longest first."""
    spent = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
             for event in events
             if event.device_type == torch.autograd.DeviceType.CPU}     # not once more its kernel
    total = sum(spent.values())
    longest_first = sorted(spent.items(), key=lambda item: -item[1])
    return [(key, time / total) for key, time in longest_first]


# ----------------------------------------------------------------------------------- transformers


def transformers_config(transformers, c):
    """A model.Config -> the config of transformers' Llama, Mistral, Qwen2 or Qwen3."""
    kind = family(c)
    scaling, more = None, {}
    if c.rope_llama3:
        names = ("factor", "low_freq_factor", "high_freq_factor",
                 "original_max_position_embeddings")
        scaling = {"rope_type": "llama3", **dict(zip(names, c.rope_llama3))}
    if int(transformers.__version__.split(".")[0]) < 5:
        rope = {"rope_theta": c.rope_theta, "rope_scaling": scaling}
    else:
        scaling = scaling or {"rope_type": "default"}
        rope = {"rope_parameters": {**scaling, "rope_theta": c.rope_theta}}
    if kind == "Mistral":
        more["sliding_window"] = c.window
    if kind in ("Llama", "Qwen3"):
        more["attention_bias"] = c.qkv_bias
    return getattr(transformers, f"{kind}Config")(
        hidden_size=c.dim, intermediate_size=c.ffn, num_hidden_layers=c.n_blocks,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        vocab_size=c.vocab, rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_positions,
        tie_word_embeddings=c.tied, attn_implementation="sdpa", **rope, **more)


def family(c):
    """Whose attention a model.Config has; ValueError where none of the four is the same."""
    need(not c.rope_ramp, "--vs transformers: rope types linear and yarn are not compared")
    found = {(False, False, False, False): "Llama", (False, True, True, False): "Llama",
             (True, False, False, False): "Mistral", (False, True, False, False): "Qwen2",
             (False, False, False, True): "Qwen3", (False, True, True, True): "Qwen3"}
    kind = found.get((bool(c.window), c.qkv_bias, c.o_bias, c.qk_norm))
    need(kind, "--vs transformers: this mixture of biases, norms of q and k and a sliding window "
               "is not compared")
    return kind


def as_transformers(model):
    """The same weights, shared and not copied, as transformers' model with SDPA.

    Raises ImportError or ValueError where that cannot be.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError("--vs transformers needs it: pip install transformers") from None
    config = transformers_config(transformers, model.config)
    whole = getattr(transformers, f"{family(model.config)}ForCausalLM")
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with model.device:
            theirs = whole(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    parameters = model.named_parameters(remove_duplicate=False)
    theirs.load_state_dict({hf_name(name): p for name, p in parameters}, assign=True)
    return theirs


@torch.no_grad()
def run_transformers(theirs, tokens, new, first=None):
    """Greedy generation -> seconds of the prefill, and of a further token, the median.

    first: read so many tokens of the prompt only.
    """
    tokens = tokens[:, :first]
    start = clock(tokens.device)
    out = theirs(tokens, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    token.item()                    # infer.generate looks at every token too
    times = [clock(tokens.device)]
    for _ in range(new - 1):
        out = theirs(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.item()
        times.append(clock(tokens.device))
    decode_s = [after - before for before, after in itertools.pairwise(times)]
    return times[0] - start, statistics.median(decode_s or [0.0])


@torch.no_grad()
def against(row, model, theirs, tokens):
    """How many times as fast the full arm is, and how far apart the first logits are."""
    full, other = row["full"], row["transformers"]
    ours = prefill(model, tokens)[0]
    difference = ours - theirs(tokens, logits_to_keep=1).logits[:, -1]
    return {"prefill": other["prefill_s"] / full["prefill_s"],
            "decode": other["decode_s"] / full["decode_s"] if full["decode_s"] else 0.0,
            "logits_differ_by": difference.abs().max().item()}


# -------------------------------------------------------------------------------------- the table

HEAD = ("      N  arm            prefill s (min to max)     GFLOP/s of peak  decode ms   GB/s "
        "of read  peak GB")


def print_row(row):
    """A line for each arm, what they are beside each other, what must be held, and bars."""
    gain, names = row["speedup"], arms_of(row)
    for name in names:
        arm = row[name]
        low, high = arm["prefill_spread_s"]
        print(f"{row['n']:7d}  {name:12} {arm['prefill_s']:9.3f} ({low:.3f} to {high:.3f})"
              f" {arm['flops_s'] / 1e9:9.0f} {arm['of_peak']:7.0%} {1e3 * arm['decode_s']:10.2f}"
              f" {arm['bytes_s'] / 1e9:6.1f} {arm['of_read']:7.0%}"
              f" {gigabytes(arm['peak_bytes']):>8}")
    print(f"         sdtp: prefill {gain['prefill']:.2f}x of {row['ideal']:.2f}x = "
          f"{row['share_of_ideal']:.0%}; end to end {gain['e2e']:.2f}x, by the floors "
          f"{gain['e2e_by_floors']:.2f}x; stages {row['pruning_share']:.1%} of prefill")
    if "vs" in row:
        vs = row["vs"]
        print(f"         full beside transformers: prefill {vs['prefill']:.2f}x as fast, decode "
              f"{vs['decode']:.2f}x; logits differ by {vs['logits_differ_by']:.1g}")
    for name in ("full", "sdtp"):
        parts = row[name]["must_hold_bytes"]
        told = " + ".join(f"{part} {gigabytes(size)}" for part, size in parts.items())
        print(f"         {name} must hold {gigabytes(sum(parts.values()))} GB: {told}")
    print_bars(row, names)


def bench(model, lengths, schedule, scorer, new=128, repeats=5, vs=None, quiet=False,
          **options):
    """Table 2 -> a dict for each prompt length: that of `bench_row`, and the floors.

    vs: "transformers" for a third arm, as it comes. options: those of infer.generate. FLOPs and
    floors of SDTP are those of the predictors, whatever scorer runs.
    """
    check_bench(model, lengths, new)
    theirs = as_transformers(model) if vs else None
    progress = Progress(quiet=quiet)
    progress.note("measuring what the device can do at best")
    best = ceilings(model.device, model.dtype)
    progress.clear()
    print(f"{hardware(model.device)}, {dtype_name(model)}; measured ceilings: matmul "
          f"{best.flops_s / 1e12:.3g} TFLOP/s, matrix-vector product {best.bytes_s / 1e9:.3g} "
          f"GB/s\n{new} new tokens; every time the median of {repeats} in turn with the other arms "
          f"(prefill), of {min(3, repeats)} (decode)\n{HEAD}")
    both = both_arms(schedule, scorer)

    def measure(n):
        tokens = random_prompt(model, n)
        arms = timed_arms(generate, model, tokens, both, **options)
        if vs:
            arms["transformers"] = partial(run_transformers, theirs, tokens)
        times = take_turns(model, n, arms, new, repeats, 2, progress, "step" in options)
        progress.note("timing the stages alone")
        row = bench_row(model, n, schedule, times, new)
        add_floors(row, model, schedule, new, best)
        row["pruning_s"] = pruning_seconds(model, tokens, schedule, scorer, repeats)
        row["pruning_share"] = row["pruning_s"] / row["sdtp"]["prefill_s"]
        if vs:
            row["vs"] = against(row, model, theirs, tokens)
        progress.clear()
        print_row(row)
        return row
    return one_by_one(lengths, measure)


# ------------------------------------------------------------------------------------ command line


LENGTHS, NEW = (512, 1024, 2048, 4096), 128


def usual_lengths(limit, new):
    """The LENGTHS that a model of so many positions can read, the new tokens too."""
    fit = [n for n in LENGTHS if n + (new or NEW) - 1 <= limit]
    return fit or LENGTHS[:1]


def speed_parser():
    parser = command_parser(__doc__)
    add_pruning_arguments(parser, SCORERS)
    parser.add_argument("--lengths", type=at_least(1), nargs="+", metavar="N",
                        help="prompt lengths (default: 512 1024 2048 4096, those that the model "
                             "has positions for)")
    parser.add_argument("--max-new-tokens", type=at_least(1),
                        help="default: 128, or as many as fit")
    parser.add_argument("--repeats", type=at_least(1), default=5,
                        help="timed prefills of each arm")
    parser.add_argument("--vs", choices=("transformers",),
                        help="a third arm, transformers on the same weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, and "
                        "decode in static shapes (on cuda a CUDA graph)")
    parser.add_argument("--profile", action="store_true",
                        help="then say which operators take the time, at the longest prompt, and "
                             "what the products of one token take")
    parser.add_argument("--png", metavar="FILE", type=picture_file,
                        help="draw cost against length (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0)
    add_quiet_argument(parser)
    add_json_argument(parser)
    return parser


def main():
    args = speed_parser().parse_args()
    torch.manual_seed(args.seed)
    pruning = read_pruning(args)
    limit = pruning.config.max_positions
    lengths = args.lengths or usual_lengths(limit, args.max_new_tokens)
    new = fitting(pruning.config, max(lengths), args.max_new_tokens, NEW)
    model, schedule, predictors, metadata = load_pruning(args, pruning)
    prior = metadata.get("prior", 0.0)
    scorer = make_scorer(args.scorer, model, schedule, predictors, args.seed, prior)
    options = compile_model(model, extend) if args.compile else {}
    rows = bench(model, lengths, schedule, scorer, new, args.repeats, args.vs, args.quiet,
                 **options)
    result = {"schedule": asdict(schedule), "bench": rows}
    if args.compile:                # many more than the parts of a block would be a recompile storm
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(f"torch.compile made {result['graphs']} graphs for {len(model.blocks)} blocks and "
              f"{len(lengths)} lengths")
    if args.profile and rows:
        longest = max(row["n"] for row in rows)
        result["products"] = products(model)
        result["profile"] = profile(model, longest, schedule, scorer)
    if args.png and rows:
        title = f"{args.ckpt}, {hardware(model.device)}, {dtype_name(model)}"
        cost_against_length(rows, args.png, title)
    print_json(args, model, result)
    check_measured(rows, lengths)


if __name__ == "__main__":
    cli(main)
