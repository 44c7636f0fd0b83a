"""What else could a user pick? KV-cache compression by kvpress, on the rows of lab.quality.

kvpress (github.com/NVIDIA/kvpress) reads the whole prompt first, then each KV head of each block
drops keys and values of its own choice. So it saves memory and decode time, but no prefill. Here
its presses keep as many bytes as our schedule does, and the same answers are read on what is left:

    pip install kvpress 'transformers<5.3'      # in an environment of its own
    python -m lab.peers --ckpt smollm2 --data dolly.jsonl --context --min-prompt 128 \\
        --max-prompt 448 --limit 100

The table has our arms in lower case, those of kvpress with a capital, and the unpruned model once
more as "transformers" reads it. That one has to agree with ours, else the run ends: then all arms
have the same weights, prompts and answers, and differ in what they drop.

    random      ours: tokens at random, dropped for good from all later blocks; 0% of the gap
    Random      kvpress: keys and values at random, others in each block and KV head

All is measured in float32. A press keeps the same number of tokens in each block: the schedule's
mean, rounded. One block at a time is whole while kvpress reads the prompt; the bytes in the table
are those that are held when it is read. Presses have their own default settings.

Rows already measured are kept in --rows-file: the same command goes on where it was stopped.

Shapes: B = 1 row, N prompt tokens, n tokens of an answer, k kept, L blocks, V vocabulary.
"""
import contextlib
import json
import time
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab import quality
from model import Tokenizer
from prune import kv_bytes
from support.data import digest
from support.files import need
from support.options import (add_data_arguments, add_json_argument, add_pruning_arguments,
                             add_quiet_argument, cli, command_parser, print_json, rows_file)
from support.places import find
from support.progress import Progress
from support.sampling import finite
from support.saved import load_pruning, read_pruning
from support.timing import clock

# What a press needs to see: prompts of more than so many tokens.
PRESSES = {"ExpectedAttention": 4, "KeyDiff": 1, "TOVA": 1, "SnapKV": 64, "Knorm": 1,
           "StreamingLLM": 4, "Random": 1}
WHOLE = "transformers"              # the arm that drops nothing
SAME = 1e-4                         # how far two unpruned NLLs per token may be apart
INSTALL = "pip install kvpress 'transformers<5.3'"
TOO_NEW = (5, 3)

# ------------------------------------------------------------------------------- the optional ones


def find_presses(names):
    """kvpress' classes by our names for them; ImportError says how to get it."""
    try:
        check_version(metadata.version("transformers"))
        import kvpress
    except ImportError as e:
        raise ImportError(f"lab.peers needs the optional package kvpress ({e}): {INSTALL}, in an "
                          "environment of its own") from None
    return {name: getattr(kvpress, f"{name}Press") for name in names}


def check_version(version):
    """That kvpress can be used with a version of transformers."""
    if tuple(int(part) for part in version.split(".")[:2]) >= TOO_NEW:
        raise ImportError(f"it does not work with transformers {version}")


class Peers(NamedTuple):
    """What arms of others are measured with."""
    model: Any                      # transformers' own, in float32
    cache: type                     # of an empty KV cache
    presses: dict                   # {name: class}

    @property
    def names(self):
        return [WHOLE, *self.presses]


def load_peers(ckpt, device, presses):
    """The model of a checkpoint as transformers reads it."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        find(ckpt), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True,
        use_safetensors=True)
    model = model.to(device).eval().requires_grad_(False)
    model.source = str(find(ckpt))              # for support.sampling.finite
    return Peers(model, transformers.DynamicCache, presses)


# ---------------------------------------------------------------------------------- the same bytes


def mean_count(schedule, n, blocks):
    """How many of n tokens a block holds, on the average over the blocks, rounded."""
    return round(sum(schedule.counts(n, blocks)) / blocks)


def compression_ratio(kept, n):
    """The ratio for which kvpress keeps `kept` of n: it rounds n * (1 - ratio) down."""
    return 0.0 if kept == n else 1 - (kept + 0.5) / n


def held_bytes(cache):
    """Bytes of the keys and values in a cache of transformers."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# ----------------------------------------------------------------------------------------- measure


@torch.no_grad()
def read_peer(peers, item, press=None):
    """A prompt read by transformers under a press, then its answer on the compressed cache.

    -> [log-likelihood, tokens, whether each is the model's own choice], bytes held after the
    prompt, seconds of the prefill. The answer stands at N, N + 1, ... whatever was dropped.
    """
    model, cache = peers.model, peers.cache()
    N, answer = len(item.prompt), item.answers[0]
    tokens = torch.tensor([item.prompt + answer.tokens], device=model.device)
    start = clock(model.device)
    with press(model) if press else contextlib.nullcontext():
        out = model(tokens[:, :N], past_key_values=cache, logits_to_keep=1)
    seconds, held = clock(model.device) - start, held_bytes(cache)
    logits = [out.logits]                                           # (1, 1, V)
    before = tokens[:, N:-1]
    if before.shape[1]:
        # without them transformers would count on from the tokens that are left
        pos = torch.arange(N, N + before.shape[1], device=model.device)
        out = model(before, past_key_values=cache, position_ids=pos[None])
        logits.append(out.logits)
    log_p = finite(model, torch.cat(logits, 1)[0]).log_softmax(-1)  # (n, V)
    ids = tokens[0, N:]
    value = log_p.gather(1, ids[:, None]).sum().item()
    return [value, len(ids), bool((log_p.argmax(-1) == ids).all())], held, seconds


def measure_peers(setup, peers, item, seed):
    """One row under the arms of others -> {name: as quality.measure_arm}.

    Raises ValueError where a press does not keep as many bytes as our schedule.
    """
    config, N = setup.model.config, len(item.prompt)
    L = config.n_blocks
    counts = setup.schedule.counts(N, L)
    compressed = compression_ratio(mean_count(setup.schedule, N, L), N)
    whole, token = (kv_bytes(config, [n] * L, 4) for n in (N, 1))
    found = {}
    for name in reversed(peers.names) if seed % 2 else peers.names:
        press, ours = None, whole
        if name != WHOLE:
            press = peers.presses[name](compression_ratio=compressed)
            ours = kv_bytes(config, counts, 4)
        torch.manual_seed(seed)                 # of Random
        answer, held, seconds = read_peer(peers, item, press)
        need(abs(held - ours) <= token / 2,     # half a token in each block
             f"row {seed + 1}: {name} holds {held:,} bytes after the prompt, our schedule {ours:,}")
        found[name] = {"answers": [answer], "keep": held / whole, "prefill_s": seconds}
    return found


def measure(setup, peers, item, arms, number):
    """One row under all arms, ours and theirs; odd rows meet theirs first: rows are also timed."""
    parts = [partial(quality.measure, setup, item, arms),
             partial(measure_peers, setup, peers, item)]
    if number % 2:
        parts.reverse()
    found = {}
    for part in parts:
        found |= part(seed=number)
    check_same(found, number)
    return found


def check_same(found, number):
    """That nothing but what is dropped can tell the arms apart."""
    (ours, count, _), (theirs, same, _) = (found[arm]["answers"][0] for arm in ("full", WHOLE))
    need(count == same and abs(ours - theirs) <= SAME * count,
         f"row {number + 1}: the unpruned model's NLL is {-ours / count:.5f} per token here and "
         f"{-theirs / same:.5f} in transformers: the arms could not be compared")


def measure_rows(setup, peers, items, arms, log, run, quiet=False):
    """`measure` for every item -> a list of its dicts; kept as quality.measure_rows keeps them."""
    done = quality.stored_rows(log, run)
    progress = Progress(len(items), "rows", quiet, first=len(done))
    if len(done) < len(items):
        progress.note("warming up")             # rows are also timed
        quality.measure(setup, items[len(done)], ["full"], 0)
        read_peer(peers, items[len(done)])
    with log.open("a", encoding="utf-8") as f:
        for number in range(len(done), len(items)):
            done.append(measure(setup, peers, items[number], arms, number))
            f.write(json.dumps({"row": number, **done[-1]}) + "\n")
            f.flush()
            progress.step()
    progress.clear()
    return done


# ------------------------------------------------------------------------------------------- table


def costs(rows, names, items, config):
    """What each arm holds and takes: means over the rows, and how much faster it reads than full.

    rows: of measure_rows; a dict for each arm.
    """
    whole = [kv_bytes(config, [len(item.prompt)] * config.n_blocks, 4) for item in items]
    found = []
    for name in names:
        held = [row[name]["keep"] * size for row, size in zip(rows, whole)]
        full, own = ([row[arm]["prefill_s"] for row in rows] for arm in ("full", name))
        faster, error = quality.ratio(full, own)
        found.append({"scorer": name, "kv_bytes": sum(held) / len(rows),
                      "prefill_s": sum(own) / len(rows), "prefill_speedup": faster,
                      "prefill_speedup_stderr": error})
    return found


def show_costs(found):
    print(f"\n{'scorer':18} {'KV cache MB':>14}    prefill s   speed-up")
    for row in found:
        print(f"{row['scorer']:18} {row['kv_bytes'] / 1e6:14.3f}   {row['prefill_s']:10.3f}   "
              f"{row['prefill_speedup']:8.2f} +- {row['prefill_speedup_stderr']:.2f}")


# ------------------------------------------------------------------------------------ command line


def options():
    parser = command_parser(__doc__)
    add_pruning_arguments(parser)
    add_data_arguments(parser, limit=100)
    parser.add_argument("--scorers", nargs="+", help="our arms, as lab.quality names them, without "
                        "+h2o and +local (default: full, predictor where there are any, random)")
    parser.add_argument("--presses", nargs="+", choices=tuple(PRESSES), default=list(PRESSES),
                        help="those of kvpress (default: all)")
    parser.add_argument("--rows-file", metavar="FILE", type=rows_file,
                        help="JSONL of the rows measured so far (default: a file under out/peers/ "
                        "named after the command)")
    add_quiet_argument(parser)
    add_json_argument(parser)
    # what quality.read_items and quality.describe ask for, and what all arms are read in
    parser.set_defaults(task="nll", dtype="float32")
    return parser


def chosen_arms(args, trained):
    """Our arms: full first, it is what all are compared with."""
    names = args.scorers or ["full", *(["predictor"] if trained else []), "random"]
    for name in names:
        quality.parse_arm(name, 1)
        need("+" not in name, f"{name}: our arms are only pruned here, leave out +h2o and +local")
    return list(dict.fromkeys(["full", *names]))


def check_items(items, presses, config):
    """That every row can be read under all presses, before any is."""
    quality.check_lengths(items, config.max_positions, 0)
    for number, item in enumerate(items, start=1):
        N, n = len(item.prompt), len(item.answers[0].tokens)
        for name in presses:
            need(N > PRESSES[name],
                 f"row {number}: {name} needs prompts of more than {PRESSES[name]} tokens, this "
                 f"one has {N}; choose --min-prompt {PRESSES[name] + 1}, or other --presses")
        need(not config.window or N + n - 1 <= config.window,
             f"row {number}: a compressed cache does not know its positions, so prompt and answer "
             f"have to fit in the sliding window of {config.window} tokens")


def main():
    args = options().parse_args()
    need(args.dtype == "float32", "the arms are compared in float32: leave out --dtype")
    tokenizer = Tokenizer(args.ckpt)
    pruning = read_pruning(args)        # what can be refused is refused before weights are read
    arms = chosen_arms(args, pruning.predictors is not None)
    items = quality.read_items(args, tokenizer, pruning.metadata)
    check_items(items, args.presses, pruning.config)
    presses = find_presses(args.presses)
    print(pruning.said(args))
    model, schedule, predictors, _ = load_pruning(args, pruning)
    setup = quality.Setup(model, schedule, predictors, pruning.metadata.get("prior", 0.0))
    peers = load_peers(args.ckpt, model.device, presses)
    lengths = [len(item.prompt) for item in items]
    quality.describe(args, setup, lengths)
    versions = {name: metadata.version(name) for name in ("kvpress", "transformers")}
    names = [*arms, *peers.names]
    start = time.time()
    run = json.dumps([quality.identity(args, names, setup, items[0]), versions])
    log = Path(args.rows_file or Path("out", "peers", f"{digest(run)}.jsonl"))
    done = measure_rows(setup, peers, items, arms, log, run, args.quiet)[:len(items)]
    rows, spent = quality.table(done, names, "nll", items), costs(done, names, items, model.config)
    quality.show(rows)
    show_costs(spent)
    told = {"data": args.data and Path(args.data).name, "seconds": time.time() - start,
            "schedule": asdict(schedule), "versions": versions,
            "prompt_tokens": [min(lengths), sum(lengths) / len(lengths), max(lengths)],
            "rows": rows, "costs": spent}
    print_json(args, model, told)


if __name__ == "__main__":
    cli(main)
