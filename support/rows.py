"""Rows of a data file -> prompts and responses as token ids.

A data file holds one JSON object a line, or a JSON array of them, in one of three forms:
    Dolly   instruction, context, response
    Alpaca  instruction, input, output
    chat    messages, turns of role and content: the last assistant's turn is the response, the
            user's turn before it the instruction
The last 10% of a file is never used for training: 5% to measure on, 5% to choose settings by.
"""
import codecs
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from support.chat import render
from support.files import blame, need
from support.processes import rank
from support.weights import ROOT, find, snapshots

DOLLY = "databricks/databricks-dolly-15k"


PARTS = ("instruction", "context", "response")
ALPACA = {"input": "context", "output": "response"}
# Text that repeats or sorts a row, in Dolly, in Alpaca and in what lab.tasks writes.
ASIDE = (*PARTS, "category", "text", "passage")


class Example(NamedTuple):
    tokens: torch.Tensor            # (N,) prompt, then response
    prompt_len: int
    row: dict = {}                  # what it was made of


# ------------------------------------------------------------------------------------------- files


def read_rows(path, split="all", fields=PARTS, lost=None):
    """Rows of a data file, a list of dicts; `fields` have to be text (a context may be absent).

    Alpaca's and chat rows get Dolly's names; "before": the turns of a chat that stand before its
    instruction. split: "train" is the first 90%, "heldout" the next 5% (to measure on),
    "validation" the last 5% (to choose by), both without rows whose context, or instruction where
    there is none, stands in an earlier split; lost, a Counter, is told how many. "all": every row.
    Raises ValueError with file and line number for what is not such a row.
    """
    path = Path(path)
    need(path.is_file(), f"{path}: no such data file")
    rows = [named(row, where, fields) for where, row in parsed(path)]
    if split == "all":
        return rows
    train_end = len(rows) - max(1, len(rows) // 10)
    heldout_end = len(rows) - len(rows) // 20
    parts = {"train": (0, train_end), "heldout": (train_end, heldout_end),
             "validation": (heldout_end, len(rows))}
    start, end = parts[split]
    need(start < end, f"{path}: too few rows, {len(rows)}, for any {split} ones: the last 10% of a "
                      "file, at least one row, are held out, and half of these to choose by")
    known = set(map(asked_of, rows[:start]))
    found = [row for row in rows[start:end] if asked_of(row) not in known]
    if lost is not None:
        lost["with the text of a row of an earlier split"] += end - start - len(found)
    return found


def parsed(path):
    """What each line of a file holds, or each entry of its array: yields (where, value)."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if data.lstrip().startswith(b"["):
        for number, value in enumerate(parse(data, path), start=1):
            yield f"{path}, entry {number}", value
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse(line, where)


def parse(data, where):
    """The value of a JSON text, bytes."""
    try:
        value = json.loads(data.decode())
        json.dumps(value, ensure_ascii=False).encode()      # a lone surrogate is no text
        return value
    except (ValueError, RecursionError) as e:               # also bytes that are not UTF-8
        raise ValueError(f"{where}: not valid JSON, expected one object a line or an array of "
                         f"them ({e})") from None


def named(row, where, fields):
    """A row in Dolly's names, where Dolly's fields are asked for."""
    need(isinstance(row, dict), f"{where}: expected a JSON object")
    if fields == PARTS and "messages" in row:
        row = row | last_turns(row["messages"], where)
    elif fields == PARTS:
        row = {ALPACA.get(name, name) if ALPACA.get(name) not in row else name: value
               for name, value in row.items()}
    for field in fields:
        value = row.get(field)
        need(isinstance(value, str) or field == "context" and value is None,
             f"{where}: {field!r} is missing or not text")
    return row


def last_turns(turns, where):
    """Turns of role and content -> the last question and its answer, and what stands before."""
    with blame(where, "messages are not turns of role and content, a user's and then an "
                      "assistant's last"):
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        asked, said = turns[last - 1], turns[last]
        need(last and asked["role"] == "user", "nobody asks")
        need(all(isinstance(turn["content"], str) for turn in turns), "a content is not text")
        return {"instruction": asked["content"], "response": said["content"],
                "before": turns[:last - 1]}


def asked_of(row):
    """What makes a row another one's double: its context, else all that is said before it ends."""
    return row.get("context") or json.dumps([row.get("before"), row.get("instruction")])


def rows_at_hand(ckpt):
    """The data file where none is named: the checkpoint's own rows, else Dolly where it lies.

    Raises FileNotFoundError with the command that gets it.
    """
    root, name = find(ckpt), f"{DOLLY.split('/')[1]}.jsonl"
    places = [Path(), Path("data"), ROOT, ROOT / "data", root, *snapshots("datasets", DOLLY)]
    for file in [root / "train.jsonl", *(place / name for place in places)]:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{ckpt} has no rows of its own and {name} is not here: `hf download {DOLLY} --repo-type "
        "dataset --include \"*.jsonl\" --local-dir .` gets it (pip install huggingface_hub), or "
        "name a file with --data")


# ---------------------------------------------------------------------------------------- encoding


def prompt_text(row, question="first"):
    """What the user says: the instruction, a blank line, the context; "last": the context first;
    "both": the instruction once more behind it.
    """
    asked, context = row["instruction"], row.get("context")
    if not context:
        return asked
    orders = {"first": [asked, context], "last": [context, asked], "both": [asked, context, asked]}
    return "\n\n".join(orders[question])


def encode_row(tokenizer, row, chat, max_response=96, question="first"):
    """A row {instruction, context, response} -> Example; the response is cut.

    chat: the template around the user's text, a support.chat.Chat. The plain one marks no end of
    the prompt, so here a line break does.
    """
    text = prompt_text(row, question) + "\n" * (chat.name == "plain")
    prompt = tokenizer.encode(render(chat, text, row.get("before", ())), chat.bos)
    response = tokenizer.encode(row["response"], bos=False)[:max_response]
    return Example(torch.tensor(prompt + response), len(prompt), row)


def examples(tokenizer, path, split, chat, min_prompt=1, max_prompt=4096, max_response=96,
             context=False, limit=None, question="first", max_positions=2**31):
    """Encoded rows of a file whose prompt has min_prompt to max_prompt tokens, at most `limit`.

    context: only rows that have one. max_response: responses are cut to so many tokens, None: not.
    A row longer than the model's positions, or without a response, is left out. One line says how
    many rows are left out or cut, and which texts of theirs nobody reads.
    """
    found, lost, cuts = [], Counter(), Counter()
    for row in read_rows(path, split, lost=lost):
        cuts.update(f"rows whose {name!r} is not read" for name, value in row.items()
                    if name not in ASIDE and isinstance(value, str) and value)
        if context and not row.get("context"):
            lost["without a context"] += 1
            continue
        whole = encode_row(tokenizer, row, chat, None, question)
        n = whole.prompt_len
        tokens = whole.tokens[:n + max_response] if max_response else whole.tokens
        faults = {f"shorter than --min-prompt {min_prompt}": n < min_prompt,
                  f"longer than --max-prompt {max_prompt}": n > max_prompt,
                  "without a response": n == len(tokens),
                  f"longer than the model's {max_positions:,} positions":
                      len(tokens) > max_positions}
        fault = next((what for what, there in faults.items() if there), None)
        if fault:
            lost[fault] += 1
            continue
        cuts[f"responses cut to {max_response} tokens"] += len(tokens) < len(whole.tokens)
        found.append(whole._replace(tokens=tokens))
        if len(found) == limit:
            break
    need(found, f"{path}: no {split} row with a prompt of {min_prompt} to {max_prompt} tokens"
                f"{tally('; left out: ', lost)}")
    tell_losses(path, f"{split}: {len(found)} rows", lost, cuts)
    return found


def tally(head, counts):
    """Head and the counts {what: number} that are not 0, as text; "" where all are."""
    parts = [f"{number:,} {what}" for what, number in counts.items() if number]
    return head + ", ".join(parts) if parts else ""


def tell_losses(path, rows, lost, cuts):
    """Print one line that says which rows are left out, and what is cut, if any is.

    rows: text about those that are used; lost, cuts: {what: number}.
    """
    losses = tally("; left out: ", lost) + tally("; ", cuts)
    if losses and rank() == 0:
        print(f"{Path(path).name}, {rows}{losses}", flush=True)


# ------------------------------------------------------------------------------ order and identity


def row_at(number, n_rows, seed):
    """Which row is read as the number-th of a training, counted from 0 through all epochs.

    Each epoch has its own order, known from the seed alone.
    """
    epoch, place = divmod(number, n_rows)
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(n_rows, generator=generator)[place].item()


def digest(*parts):
    """A short hash of what a result depends on.

    A part is a list of Examples, a module, a file (a Path) or anything that JSON knows.
    """
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                p = p.to_local() if hasattr(p, "to_local") else p   # this process's slice
                hashed.update(p.detach().float().cpu().numpy().tobytes())
        elif isinstance(part, Path):
            hashed.update(part.read_bytes())
        elif isinstance(part, list) and part and isinstance(part[0], Example):
            for example in part:
                hashed.update(example.tokens.numpy().tobytes() + b"%d" % example.prompt_len)
        else:
            hashed.update(json.dumps(part, default=str).encode())
    return hashed.hexdigest()[:16]
