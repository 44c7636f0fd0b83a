"""Prompts of different lengths in one batch, each pruned by its own counts.

    python -m lab.batch --ckpt smollm2 --data dolly.jsonl --batch 8

Shapes: B rows, N tokens of the longest prompt, V vocabulary.
"""
from dataclasses import asdict

import torch

from infer import both_arms
from lab.scorers import SCORERS, make_scorer
from model import Tokenizer
from prune import extend, prefill
from support.data import read_rows
from support.files import need
from support.options import (add_json_argument, add_pruning_arguments, add_quiet_argument,
                             add_template_arguments, add_tp_argument, at_least, cli,
                             command_parser, print_json)
from support.parallel import agreed
from support.places import rows_at_hand
from support.progress import Progress
from support.sampling import ends, finite, fitting, greedy, one_past
from support.saved import load_pruning, read_pruning
from support.templates import chosen_template, prompt_text
from support.timing import clock


@torch.no_grad()
def generate_batch(model, prompts, max_new_tokens, schedule=None, scorer=None, eos=None,
                   pick=greedy):
    """Go on with several prompts in one pass: B lists of token ids -> B lists of new ones.

    A row reads what `infer.generate` gives it alone, up to and with an eos. Not for scorers that
    look at the whole batch: random, attention of the last queries, the oracle.
    """
    need(prompts and all(prompts), "a batch needs at least one prompt, and no empty one")
    lengths, eos = [len(prompt) for prompt in prompts], ends(model, eos)
    for number, n in enumerate(lengths, start=1):   # a row that is too long would cost all others
        one_past(model.config, n, max_new_tokens, f"prompt {number} of {len(prompts)}: ")
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)   # (B, N)
    room = max_new_tokens - 1
    logits, caches, _ = prefill(model, tokens, schedule, scorer, room, lengths=lengths)
    pos = torch.tensor(lengths, device=model.device)[:, None]
    stop = pos.new_tensor(eos)
    token = pick(finite(model, logits))                             # (B, 1)
    new, ended = [token], torch.isin(token, stop)
    while len(new) < max_new_tokens and not ended.all():
        logits = extend(model, token, pos, caches, max(lengths) + len(new))     # (B, 1, V)
        finite(model, logits[~ended[:, 0]])     # a row that has ended cannot spoil the others
        token = pick(logits[:, -1])
        new.append(token)
        ended |= torch.isin(token, stop)
        pos = pos + 1
    return [until(row, eos) for row in torch.cat(new, dim=1).tolist()]


def until(tokens, eos):
    """The tokens up to and with the first that is an eos."""
    for i, token in enumerate(tokens, start=1):
        if token in eos:
            return tokens[:i]
    return tokens


# ------------------------------------------------------------------------------------ command line


def batch_parser():
    parser = command_parser(__doc__)
    add_pruning_arguments(parser, SCORERS)
    parser.add_argument("--data", help="JSONL whose held-out rows are answered (default with the "
                                       "toy: its own)")
    parser.add_argument("--batch", type=at_least(1), default=8, metavar="B",
                        help="so many rows, the first")
    add_template_arguments(parser)
    parser.add_argument("--max-new-tokens", type=at_least(1),
                        help="default: 48, or as many as fit behind the longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    add_tp_argument(parser)
    add_quiet_argument(parser)
    add_json_argument(parser)
    return parser


def answer(model, tokenizer, rows, prompts, new, arms, quiet=False):
    """The rows' answers under several arms, {name: (schedule, scorer)}, and times -> dicts.

    The first pass of each arm says its texts and is a warm-up. Then all make as many tokens as the
    longest text has, past an eos too, in turn there and back: the seconds are the mean.
    """
    pick, said, progress = agreed(greedy), {}, Progress(quiet=quiet)
    for name, arm in arms.items():
        progress.note(f"{name}: answering {len(prompts)} rows")
        said[name] = generate_batch(model, prompts, new, *arm, pick=pick)
    longest = max(len(row) for made in said.values() for row in made)
    seconds = dict.fromkeys(arms, 0.0)
    for name in [*arms, *reversed(arms)]:
        progress.note(f"{name}: timing")
        start = clock(model.device)
        generate_batch(model, prompts, longest, *arms[name], eos=(), pick=pick)
        seconds[name] += (clock(model.device) - start) / 2
    progress.clear()
    read, told = sum(map(len, prompts)) + longest * len(prompts), []
    for name, made in said.items():
        texts = [tokenizer.decode([t for t in row if t not in model.config.eos]) for row in made]
        print(f"\n{name}: {seconds[name]:.2f} s for {longest} new tokens a row, "
              f"{read / seconds[name]:.0f} tokens/s")
        for row, text in zip(rows, texts):
            print(f"  {text!r}   right {row['response']!r}")
        told.append({"arm": name, "seconds": seconds[name], "new_tokens": longest, "texts": texts})
    return told


def main():
    args = batch_parser().parse_args()
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(args.ckpt)
    pruning = read_pruning(args)
    rows = read_rows(args.data or rows_at_hand(args.ckpt), "heldout")[:args.batch]
    need(rows, "no held-out row to read: name a file with --data")
    template, system, _ = chosen_template(args, pruning.metadata)
    prompts = [tokenizer.encode(prompt_text(row, template, system=system)) for row in rows]
    lengths = [len(prompt) for prompt in prompts]
    print(f"{len(rows)} rows in one batch, prompts of {min(lengths)} to {max(lengths)} tokens")
    new = fitting(pruning.config, max(lengths), args.max_new_tokens, 48)
    model, schedule, predictors, metadata = load_pruning(args, pruning)
    prior = metadata.get("prior", 0.0)
    scorer = agreed(make_scorer(args.scorer, model, schedule, predictors, args.seed, prior))
    told = answer(model, tokenizer, rows, prompts, new, both_arms(schedule, scorer), args.quiet)
    print_json(args, model, {"schedule": asdict(schedule), "batch": told})


if __name__ == "__main__":
    cli(main)
