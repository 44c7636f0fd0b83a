"""Rows of a data file -> prompts and responses as token ids.

Data files hold one JSON object a line with instruction, context and response, as in
databricks-dolly-15k. The last tenth of a file is never trained on: its first half is held out to
measure on, its second half to choose by.
"""
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from model import per_row, positions
from support.files import blame, need
from support.parallel import rank
from support.templates import prompt_text

# Characters in a part of a prompt: more than any context holds, and tokenizing them may take
# gigabytes.
MAX_TEXT = 10**6
IGNORE = -100       # a label that is not to be predicted


class Example(NamedTuple):
    tokens: torch.Tensor            # (N,) prompt, then response
    prompt_len: int


class Batch(NamedTuple):
    """Rows side by side, padded on the right."""
    tokens: torch.Tensor            # (B, N) prompt, then response, then padding
    prompt_len: list                # B prompt lengths
    lengths: list                   # B lengths of prompt and response


def response_labels(tokens, prompt_len, lengths=None):
    """What is to be predicted: tokens (B, N) -> (B, R), R = N - the shortest prompt.

    IGNORE stands where a row still has prompt, or already padding. prompt_len: an int, or a list
    of B; lengths: B row lengths, where rows are padded on the right.
    """
    B, N = tokens.shape
    prompt_len = per_row(prompt_len, B)
    lengths = per_row(lengths or N, B)
    for p, n in zip(prompt_len, lengths):
        need(1 <= p < n <= N, f"marking needs a prompt and a response: {p} prompt tokens of {n}")
    start = torch.tensor(prompt_len, device=tokens.device)
    end = torch.tensor(lengths, device=tokens.device)
    pos = positions(tokens)
    outside = (pos < start[:, None]) | (pos >= end[:, None])
    labels = tokens.masked_fill(outside, IGNORE)
    return labels[:, min(prompt_len):]


def pad(examples, device):
    """Examples -> Batch."""
    rows = [e.tokens for e in examples]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return Batch(tokens, [e.prompt_len for e in examples], [len(row) for row in rows])


# ------------------------------------------------------------------------------------------- files


def read_rows(path, split="all", fields=("instruction", "context", "response")):
    """Rows of a JSONL file, a list of dicts; `fields` have to be text (a context may be absent).

    split: "train" is the first 90%, "heldout" the next 5% (to measure on), "validation" the last
    5% (to choose by), both without rows whose context stands in an earlier split; "all".
    Raises ValueError with file and line number for what is not such a row.
    """
    path = Path(path)
    need(path.is_file(), f"{path}: no such data file")
    rows = []
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                rows.append(parse_row(line, f"{path}, line {number}", fields))
    if split == "all":
        return rows
    train_end = len(rows) - max(1, len(rows) // 10)
    heldout_end = len(rows) - len(rows) // 20
    if split == "train":
        return rows[:train_end]
    start, end = (train_end, heldout_end) if split == "heldout" else (heldout_end, len(rows))
    known = {row["context"] for row in rows[:start] if row.get("context")}
    return [row for row in rows[start:end] if row.get("context") not in known]


def parse_row(line, where, fields):
    """One line, bytes -> dict."""
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()    # a lone surrogate is no text
    except (ValueError, RecursionError) as e:           # also bytes that are not UTF-8
        raise ValueError(f"{where}: not valid JSON ({e})") from None
    need(isinstance(row, dict), f"{where}: expected a JSON object")
    for field in fields:
        value = row.get(field)
        if field == "context" and value is None:
            continue
        need(isinstance(value, str), f"{where}: {field!r} is missing or not text")
        need(field == "text" or len(value) <= MAX_TEXT,
             f"{where}: {field!r} has more than {MAX_TEXT:,} characters")
    return row


# ---------------------------------------------------------------------------------------- encoding


def encode_row(tokenizer, row, template="plain", max_response=96, question="first", system=None):
    """A row {instruction, context, response} -> Example; the response is cut."""
    prompt = tokenizer.encode(prompt_text(row, template, question, system))
    response = tokenizer.encode(row["response"], bos=False)[:max_response]
    return Example(torch.tensor(prompt + response), len(prompt))


def examples(tokenizer, path, split, template="plain", min_prompt=1, max_prompt=4096,
             max_response=96, context=False, limit=None, question="first", system=None,
             max_positions=2**31):
    """Encoded rows of a file whose prompt has min_prompt to max_prompt tokens, at most `limit`.

    context: only rows that have one. max_response: responses are cut to so many tokens, None: not.
    max_positions: the model's; a row of more tokens is left out, and one without a response.
    One line says how many rows are left out or cut.
    """
    found, lost, cut = [], Counter(), 0

    def fault(n, N):
        """Why a row of N tokens, n of them the prompt, is left out; "" for one that is not."""
        if n < min_prompt:
            return f"shorter than --min-prompt {min_prompt}"
        if n > max_prompt:
            return f"longer than --max-prompt {max_prompt}"
        if n == N:
            return "without a response"
        beyond = f"longer than the model's {max_positions:,} positions"
        return beyond if N > max_positions else ""

    for row in read_rows(path, split):
        if context and not row.get("context"):
            lost["without a context"] += 1
            continue
        whole = encode_row(tokenizer, row, template, None, question, system)
        n = whole.prompt_len
        tokens = whole.tokens[:n + max_response] if max_response else whole.tokens
        why = fault(n, len(tokens))
        if why:
            lost[why] += 1
            continue
        cut += len(tokens) < len(whole.tokens)
        found.append(Example(tokens, n))
        if len(found) == limit:
            break
    cuts = {f"responses cut to {max_response} tokens": cut}
    need(found, f"{path}: no {split} row with a prompt of {min_prompt} to {max_prompt} tokens"
                f"{listed('; left out: ', lost)}")
    tell_losses(path, f"{split}: {len(found)} rows", lost, cuts)
    return found


def listed(head, counts):
    """Head and the counts {what: number} that are not 0, as text; "" where all are."""
    parts = [f"{number:,} {what}" for what, number in counts.items() if number]
    return head + ", ".join(parts) if parts else ""


def tell_losses(path, rows, lost, cuts):
    """Print one line that says which rows are left out, and what is cut, if any is.

    rows: text about those that are used; lost, cuts: {what: number}.
    """
    losses = listed("; left out: ", lost) + listed("; ", cuts)
    if losses and rank() == 0:
        print(f"{Path(path).name}, {rows}{losses}", flush=True)


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
            for e in part:
                hashed.update(e.tokens.numpy().tobytes() + str(e.prompt_len).encode())
        else:
            hashed.update(json.dumps(part, default=str).encode())
    return hashed.hexdigest()[:16]
