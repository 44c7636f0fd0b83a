"""The prompt of infer.py: what the options say, else one of the project's own."""
import sys
from pathlib import Path
from typing import NamedTuple, Optional

from model import Tokenizer
from support.data import read_rows
from support.files import blame, need
from support.places import ROOT, own_rows
from support.templates import chosen_template, prompt_text

# A page of ours and a question about it: first, for predictors that know a token's past alone, and
# again at the end, where chat models look for it.
DEMO = ROOT / "support" / "demo.jsonl"
# Of shorter prompts pruning saves little, and may drop what the answer needs.
SHORT = 200


class Prompt(NamedTuple):
    ids: list                       # token ids
    expected: Optional[str]         # the right answer, where it is known
    tokenizer: Tokenizer


def encode_prompt(args, pruning):
    """The prompt that infer.py's options ask for, in the model's template -> Prompt.

    pruning: support.saved.Pruning. Says what is used; refuses what cannot be read.
    """
    chosen = chosen_template(args, pruning.metadata)
    text, expected = chosen_prompt(args, chosen)
    tokenizer = Tokenizer(args.ckpt)
    print(f"{pruning.said(args)}; template {chosen.template} ({chosen.why})", flush=True)
    return Prompt(tokenizer.encode(text), expected, tokenizer)


def chosen_prompt(args, chosen):
    """The text in a template, a templates.Chosen, and the right answer, or None."""
    row = chosen_row(args)
    return prompt_text(row, chosen.template, system=chosen.system), row.get("response")


def chosen_row(args):
    """The row {instruction, context, response} that infer.py's options ask for.

    Without a prompt it is the toy's own row, or a page of ours with a question about it. The
    response is there where the right answer is known.
    """
    sources = args.prompt, args.prompt_file, args.data
    need(sources.count(None) > 1,
         "--prompt, --prompt-file and --data each say what to read: leave all but one out")
    if args.prompt is not None:
        row = {"instruction": args.prompt}
    elif args.prompt_file is not None:
        row = {"instruction": read_prompt(args.prompt_file)}
    else:
        path = args.data or own_rows(args.ckpt) or DEMO
        rows = read_rows(path, "all" if path == DEMO else "heldout")
        need(args.row < len(rows), f"--row {args.row}: {path} has {len(rows)} held-out rows")
        row = rows[args.row]
    need(row["instruction"].strip(), "the prompt is empty")
    return row


def read_prompt(path):
    """The text of a prompt file, UTF-8 with or without a byte-order mark; "-" is stdin."""
    if path == "-":
        data, path = sys.stdin.buffer.read(), "stdin"
    else:
        need(Path(path).is_file(), f"{path}: no such prompt file")
        data = Path(path).read_bytes()
    with blame(path, "not UTF-8 text"):
        text = data.decode("utf-8-sig")
    need(text.strip(), f"{path}: the prompt is empty")
    return text
