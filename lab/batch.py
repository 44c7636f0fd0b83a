"""Prompts of different lengths in one batch, each pruned by its own counts.

    python -m lab.batch --ckpt smollm2 --data dolly.jsonl --batch 8

Shapes: B rows, N tokens of the longest prompt, V vocabulary.
"""
from dataclasses import asdict

import torch

from lab.scorers import SCORERS, make_scorer
from model import Tokenizer
from prune import extend, prefill
from support.checkpoint import find
from support.data import TEMPLATES, prompt_text, read_rows
from support.files import need
from support.options import (add_json_argument, add_pruning_arguments, add_tp_argument, at_least,
                             cli, command_parser, print_json)
from support.parallel import agreed
from support.sampling import greedy
from support.saved import load_pruning
from support.timing import clock


@torch.no_grad()
def generate_batch(model, prompts, max_new_tokens, schedule=None, scorer=None, eos=None,
                   pick=greedy):
    """Go on with several prompts in one pass: B lists of token ids -> B lists of new ones.

    A row reads what `infer.generate` gives it alone, up to and with an eos. Not for scorers that
    look at the whole batch: random, attention of the last queries, the oracle.
    """
    need(prompts and all(prompts) and max_new_tokens > 0, "a batch needs at least one prompt, no "
                                                          "empty one, and something to generate")
    eos = model.config.eos if eos is None else eos
    lengths = [len(prompt) for prompt in prompts]
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)   # (B, N)
    logits, caches, _ = prefill(model, tokens, schedule, scorer, max_new_tokens, lengths=lengths)
    pos = torch.tensor(lengths, device=model.device)[:, None]
    stop = pos.new_tensor(eos)
    token = pick(logits)                                            # (B, 1)
    new, ended = [token], torch.isin(token, stop)
    while len(new) < max_new_tokens and not ended.all():
        logits = extend(model, token, pos, caches, max(lengths) + len(new))     # (B, 1, V)
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
    parser.add_argument("--template", choices=sorted(TEMPLATES),
                        help="prompt template (default: the predictors', else plain)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=48)
    parser.add_argument("--seed", type=int, default=0)
    add_tp_argument(parser)
    add_json_argument(parser)
    return parser


def answer(model, tokenizer, rows, prompts, new, schedule=None, scorer=None):
    """The rows' answers under one arm, and its time -> a dict."""
    generate_batch(model, prompts, 2, schedule, scorer, pick=agreed(greedy))    # a warm-up
    start = clock(model.device)
    made = generate_batch(model, prompts, new, schedule, scorer, pick=agreed(greedy))
    seconds = clock(model.device) - start
    eos = model.config.eos
    texts = [tokenizer.decode([token for token in row if token not in eos]) for row in made]
    read = sum(map(len, prompts + made))
    name = "sdtp" if schedule else "full"
    print(f"\n{name}: {seconds:.2f} s, {read / seconds:.0f} tokens/s")
    for row, text in zip(rows, texts):
        print(f"  {text!r}   right {row['response']!r}")
    return {"arm": name, "seconds": seconds, "texts": texts}


def main():
    args = batch_parser().parse_args()
    torch.manual_seed(args.seed)
    model, schedule, predictors, metadata = load_pruning(args)
    prior = metadata.get("prior", 0.0)
    scorer = agreed(make_scorer(args.scorer, model, schedule, predictors, args.seed, prior))
    tokenizer = Tokenizer(args.ckpt)
    rows = read_rows(args.data or find(args.ckpt) / "train.jsonl", "heldout")[:args.batch]
    need(rows, "no held-out row to read: name a file with --data")
    template = args.template or metadata.get("template", "plain")
    prompts = [tokenizer.encode(prompt_text(row, template)) for row in rows]
    lengths = [len(prompt) for prompt in prompts]
    print(f"{len(rows)} rows in one batch, prompts of {min(lengths)} to {max(lengths)} tokens")
    arms = (None, None), (schedule, scorer)
    told = [answer(model, tokenizer, rows, prompts, args.max_new_tokens, *arm) for arm in arms]
    print_json(args, model, {"schedule": asdict(schedule), "batch": told})


if __name__ == "__main__":
    cli(main)
