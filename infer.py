"""Generation with and without SDTP side by side, and Table 2 (Sections 3.4 and 4.3).

Both arms run the same code: `prune.prefill` with or without a schedule, then `prune.extend` one token at a time on the
caches, ragged or not. Prefill is bound by arithmetic and gains as the tokens dwindle; decode is bound by bytes moved
(weights and caches) and gains only from the shorter caches.

    python infer.py                                                      # the toy answers a long prompt, full and pruned
    python infer.py --ckpt smollm2 --prompt-file report.txt --html survivors.html
    python infer.py --ckpt smollm2 --data dolly.jsonl --batch 8          # prompts of different length in one batch
    python infer.py --ckpt random:mistral-7b --bench 4096 8192 16384     # Table 2's rows; needs no weights

Shapes: B rows (1 but for `generate_batch`), N prompt tokens, L blocks, V vocabulary.
"""
import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common import TEMPLATES, at_least, cli, hardware, prompt_text, provenance, read_rows
from model import DTYPES, Tokenizer, find, load, need
from parallel import TP, agreed, join, place, same, tensor_parallel
from pictures import dropped_at, survivors_page, survivors_text
from predictor import Predictor, load_predictors
from prune import H2O, SCORERS, add_schedule_arguments, extend, flops, make_scorer, prefill, schedule_from


class Generation(NamedTuple):
    tokens: list                    # the new token ids
    trace: list                     # prune.Stage of every stage
    counts: list                    # prompt tokens that entered each block
    prefill_s: float                # until the first new token is known
    decode_s: float                 # per further token
    kv_bytes: int                   # all caches at the end


def clock(device):
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def generate(model, tokens, max_new_tokens, schedule=None, scorer=None, h2o=None, temperature=0.0, eos=None, generator=None, static=False):
    """Prefill (pruned where a schedule and a scorer are given), then decode: tokens (1, N) -> Generation.

    h2o: a prune.H2O, or the share of the KV cache it keeps (0.4 in Table 6), to compress the caches, pruned or not.
    eos: token ids that end the text (default: the model's; () to go on to max_new_tokens). temperature 0 is greedy.
    static: decode by `static_decode`.
    """
    need(max_new_tokens > 0, "max_new_tokens must be at least 1")
    need(0 <= temperature < float("inf"), f"temperature {temperature}: expected 0 (greedy) or more")
    need(not (static and h2o), "H2O changes the caches, so it cannot decode in static shapes: leave out --h2o or --compile")
    h2o = H2O(h2o) if isinstance(h2o, float) else h2o
    N, eos, new = tokens.shape[1], model.config.eos if eos is None else eos, []
    start = clock(model.device)
    logits, caches, trace = prefill(model, tokens, schedule, scorer, max_new_tokens, h2o)
    overflow = f"{model.source}: the logits are not finite in {model.dtype}: the weights are damaged, or too large for float16"
    need(logits.isfinite().all(), overflow)
    counts = schedule.counts(N, len(caches)) if schedule else [N] * len(caches)

    def choose(logits):             # (1, V) -> (1, 1)
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        need(logits.isfinite().all(), overflow)
        return torch.multinomial(torch.softmax((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-6), -1), 1, generator=generator)

    token = same(choose(logits))
    new.append(token.item())
    first = clock(model.device)
    step = static_decode(model, caches, N, N + max_new_tokens) if static and max_new_tokens > 1 else None
    begin = clock(model.device)                                      # recording a graph is not part of a token's time
    while len(new) < max_new_tokens and new[-1] not in eos:
        token = same(choose(step(token) if step else extend(model, token, N + len(new) - 1, caches, h2o)[:, -1]))
        new.append(token.item())
    decode_s = (clock(model.device) - begin) / max(1, len(new) - 1)
    for cache in caches:
        cache.n += (len(new) - 1) * (cache.slot is not None)         # a static cache counts on the device
    return Generation(new, trace, counts, first - start, decode_s, sum(cache.bytes for cache in caches))


@torch.no_grad()
def static_decode(model, caches, start, end):
    """One decode step in shapes that never change: -> step(token (B, 1)) -> logits (B, V), for positions start up to end - 1.

    The caches, ragged from block to block, become static; all rows stand at the same position. On cuda the step is
    recorded once, as a CUDA graph, and replayed: its logits are the same memory every time.
    """
    need(all(cache.k.shape[2] - cache.n >= end - start for cache in caches), f"the caches have no room for positions {start} to {end - 1}")
    for cache in caches:
        cache.static()
    token, pos = torch.zeros_like(caches[0].pos[:, :1]), torch.full_like(caches[0].pos[:, :1], start)

    def advance(by=1):
        logits = extend(model, token, pos, caches, end=end)[:, -1]
        for counter in (pos, *(cache.slot for cache in caches)):
            counter.add_(by)
        return logits

    if model.device.type != "cuda":
        return lambda new: (token.copy_(new), advance())[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):          # a warm-up before recording; what it writes into the next place the first step writes over
            advance(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):   # recorded, not run
        logits = advance()
    return lambda new, alive=(pos, caches): (token.copy_(new), graph.replay(), logits)[2]        # the graph knows addresses only: their owners must live


@torch.no_grad()
def generate_batch(model, prompts, max_new_tokens, schedule=None, scorer=None, eos=None):
    """Several prompts in one pass, greedily: B lists of token ids, of any length -> B lists of new ones (up to and with eos).

    Each row is pruned by its own counts, so it reads what `generate` gives it alone. Not for scorers that look at the whole
    batch: random, attention of the last queries, the oracle.
    """
    need(prompts and all(prompts) and max_new_tokens > 0, "a batch needs at least one prompt, no empty one, and something to generate")
    lengths, eos = [len(p) for p in prompts], model.config.eos if eos is None else eos
    N = max(lengths)
    tokens = torch.tensor([p + [0] * (N - len(p)) for p in prompts], device=model.device)
    logits, caches, _ = prefill(model, tokens, schedule, scorer, max_new_tokens, lengths=lengths)
    pos = torch.tensor(lengths, device=model.device)[:, None]
    new = [same(logits.argmax(-1, keepdim=True))]
    ended = torch.isin(new[0], pos.new_tensor(eos))
    while len(new) < max_new_tokens and not ended.all():
        new.append(same(extend(model, new[-1], pos, caches, end=N + len(new))[:, -1].argmax(-1, keepdim=True)))
        ended |= torch.isin(new[-1], pos.new_tensor(eos))
        pos = pos + 1
    rows = torch.cat(new, 1).tolist()
    return [row[:next((i for i, t in enumerate(row, 1) if t in eos), len(row))] for row in rows]


# ---------------------------------------------------------------------------------------------------------------- main


def add_pruning_arguments(parser):
    """The options that say which model prunes by what."""
    parser.add_argument("--ckpt", default="toy", help="checkpoint directory, as given or under checkpoints/, or random:NAME")
    parser.add_argument("--predictors", help="predictors.safetensors (default: the one in the checkpoint directory)")
    parser.add_argument("--device", help="cuda, cpu or mps (default: cuda if there)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bfloat16 on cuda, else float32")
    add_schedule_arguments(parser)


def load_pruning(args):
    """-> model, schedule, predictors (None where there are none), and their metadata."""
    device = join(args.device)
    need((place().world > 1) == bool(getattr(args, "tp", False)), "--tp and torchrun --nproc-per-node N belong together: the one is of no use without the other")
    model = load(args.ckpt, DTYPES.get(args.dtype), device, tensor_parallel() if place().world > 1 else None)
    if args.ckpt.startswith("random:"):
        schedule = schedule_from(args, len(model.blocks))
        untrained = nn.ModuleList(Predictor(model.config.dim) for _ in schedule.after(len(model.blocks)))
        return model, schedule, untrained.to(device=model.device, dtype=model.dtype).requires_grad_(False), {}
    path = Path(args.predictors) if args.predictors else find(args.ckpt) / "predictors.safetensors"
    if not args.predictors and not path.is_file():
        return model, schedule_from(args, len(model.blocks)), None, {}
    predictors, metadata = load_predictors(path, model)
    schedule = schedule_from(args, len(model.blocks), metadata["schedule"])
    asked = getattr(args, "scorers", None) or [getattr(args, "scorer", "predictor")]
    if any(name.startswith(("predictor", "prior", "compress")) for name in asked):
        load_predictors(path, model, schedule)                       # other stage positions are refused, other keep ratios are not
    return model, schedule, predictors, metadata


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pruning_arguments(parser)
    parser.add_argument("--scorer", choices=SCORERS, default="predictor", help="what ranks the tokens")
    parser.add_argument("--prompt", help="the user's text")
    parser.add_argument("--prompt-file", help="the user's text, from a file")
    parser.add_argument("--data", help="take the prompt from a row of this JSONL (default with the toy: its held-out rows)")
    parser.add_argument("--row", type=at_least(0), default=0, help="which held-out row of --data")
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="prompt template (default: the predictors', else plain)")
    parser.add_argument("--max-new-tokens", type=at_least(1), help="default: 48; with --bench 128")
    parser.add_argument("--h2o", type=float, metavar="SHARE", help="compress both arms' KV caches to this share by H2O (Table 6: 0.4)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--html", metavar="FILE", help="write the survivors as a self-contained page")
    parser.add_argument("--bench", type=at_least(1), nargs="+", metavar="N", help="print Table 2's rows for these prompt lengths")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="--bench: timed runs per row")
    parser.add_argument("--vs", choices=("transformers",), help="--bench: a third arm, transformers' Llama on the same weights (needs transformers)")
    parser.add_argument("--profile", action="store_true", help="--bench: then say which operators take the time, at the longest prompt")
    parser.add_argument("--png", metavar="FILE", help="--bench: draw cost against length (needs matplotlib)")
    parser.add_argument("--batch", type=at_least(1), metavar="B", help="answer the first B held-out rows of --data in one batch, full and pruned")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, attention apart (lengths dynamic); --bench also decodes in static shapes (on cuda a CUDA graph)")
    parser.add_argument("--tp", action="store_true", help=TP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print everything measured as one JSON object on the last line")
    args = parser.parse_args()
    need(not (args.bench or args.batch) or not (args.h2o or args.temperature), "--bench and --batch read whole caches greedily: leave out --h2o and --temperature")
    need(not (args.bench and args.batch), "--bench or --batch, not both")
    torch.manual_seed(args.seed)
    model, schedule, predictors, metadata = load_pruning(args)
    need(not args.tp or not (args.compile or args.bench), "--tp runs without --compile and --bench (whose ceilings and counts are those of one device)")
    scorer = agreed(make_scorer(args.scorer, model, schedule, predictors, args.seed, metadata.get("prior", 0.0)))
    if place().rank:                 # one writer
        args.html = args.png = None
    if args.compile:                # all but attention and the cache, whose lengths are plain numbers and would each be compiled anew
        torch._dynamo.config.recompile_limit = 32                    # one graph per number of MLP pieces
        for block in model.blocks:
            block.qkv, block.mix = (torch.compile(part, dynamic=True) for part in (block.qkv, block.mix))
    result = {**provenance(model), "ckpt": args.ckpt, "scorer": args.scorer, "schedule": schedule.__dict__}
    if args.bench:
        from bench import bench, profile
        from pictures import cost_against_length
        result["bench"] = bench(model, args.bench, schedule, scorer, args.max_new_tokens or 128, args.repeats, args.vs, args.compile)
        if args.compile:            # one graph per part of a block, shape family and mode: many more would be a recompile storm
            result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            print(f"torch.compile made {result['graphs']} graphs for {len(model.blocks)} blocks and {len(args.bench)} lengths")
        if args.profile:
            result["profile"] = profile(model, max(args.bench), schedule, scorer)
        if args.png:
            cost_against_length(result["bench"], args.png, f"{args.ckpt}, {hardware(model.device)}, {str(model.dtype).removeprefix('torch.')}")
    elif args.batch:
        from bench import batch
        result["batch"] = batch(args, model, schedule, scorer, metadata)
    else:
        result |= side_by_side(args, model, schedule, scorer, metadata)
    if args.json:
        print(json.dumps(result))


def side_by_side(args, model, schedule, scorer, metadata):
    """Both texts, times, FLOPs, bytes and the picture of what was dropped."""
    need(not args.ckpt.startswith("random:"), "random weights have nothing to say: use --bench")
    tokenizer, expected = Tokenizer(args.ckpt), None
    if args.prompt or args.prompt_file:
        row = {"instruction": args.prompt or Path(args.prompt_file).read_text(encoding="utf-8")}
    else:
        path = args.data or find(args.ckpt) / "train.jsonl"
        need(Path(path).is_file(), "say what to read: --prompt TEXT, --prompt-file FILE or --data FILE")
        rows = read_rows(path, "heldout")
        need(args.row < len(rows), f"--row {args.row}: {path} has {len(rows)} held-out rows")
        row, expected = rows[args.row], rows[args.row]["response"]
    need(row["instruction"].strip(), "the prompt is empty")
    ids = tokenizer.encode(prompt_text(row, args.template or metadata.get("template", "plain")))
    tokens, n, L = torch.tensor([ids], device=model.device), len(ids), len(model.blocks)
    arms = {"full": (None, None), "sdtp": (schedule, scorer)}
    runs, times = {}, {arm: [] for arm in arms}
    for i in range(5):              # a warm-up of both arms, then four timed prefills in turn, the last with its text
        for name, arm in arms.items():
            runs[name] = generate(model, tokens, (args.max_new_tokens or 48) if i == 4 else 2, *arm, args.h2o, args.temperature)
            times[name] += [runs[name].prefill_s] * (i > 0)
    runs = {name: run._replace(prefill_s=statistics.median(times[name])) for name, run in runs.items()}
    trace = runs["sdtp"].trace
    pieces, stage_of = [tokenizer.piece(t) for t in ids], dropped_at(trace, n)
    print(survivors_text(pieces, stage_of, len(trace), sys.stdout.isatty()))
    if args.html:
        survivors_page(args.html, pieces, stage_of, trace, schedule)
        print(f"wrote {args.html}")
    result = {"prompt_tokens": n, "expected": expected, "stage_of": stage_of, "ideal": flops(model.config, [n] * L) / flops(model.config, runs["sdtp"].counts, schedule=schedule)}
    print()
    for name, run in runs.items():
        used = flops(model.config, run.counts, schedule=schedule if name == "sdtp" else None)
        said = run.tokens[:-1] if run.tokens[-1] in model.config.eos else run.tokens
        result[name] = {"text": tokenizer.decode(said), "counts": run.counts, "prefill_s": run.prefill_s, "decode_s": run.decode_s,
                        "e2e_s": run.prefill_s + run.decode_s * (len(run.tokens) - 1), "flops": used, "kv_bytes": run.kv_bytes, "new_tokens": len(run.tokens)}
        r = result[name]
        print(f"{name:4}  {r['text']!r}\n      prefill {1e3 * r['prefill_s']:.1f} ms, decode {1e3 * r['decode_s']:.1f} ms a token, end to end {1e3 * r['e2e_s']:.1f} ms,"
              f" prefill {used / 1e9:.2f} GFLOPs, KV {r['kv_bytes'] / 1e6:.3f} MB\n      tokens per block {', '.join(f'{n} x{len(list(same))}' for n, same in itertools.groupby(run.counts))}")
    if expected is not None:
        print(f"right {expected!r}")
    print(f"\n{n} prompt tokens, {1 - runs['sdtp'].counts[-1] / n:.0%} dropped by the last stage; prefill {result['full']['prefill_s'] / result['sdtp']['prefill_s']:.2f}x"
          f" as fast (ideal by FLOPs {result['ideal']:.2f}x), KV cache {1 - result['sdtp']['kv_bytes'] / result['full']['kv_bytes']:.0%} smaller")
    return result


if __name__ == "__main__":
    cli(main)
