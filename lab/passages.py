"""The protocol "passages": a question, and k passages of which one, anywhere, answers it.

Where most of a prompt is beside the point, wherever that stands, no rule about places helps. The
passages are contexts of databricks-dolly-15k. A question goes with its own and k - 1 others, in
random order:

    python -m lab.passages --data dolly.jsonl --out out/passages.jsonl
    python train.py --ckpt smollm2 --data out/passages.jsonl --context --max-prompt 2000
    python -m lab.quality --ckpt smollm2 --data out/passages.jsonl --context --max-prompt 2000

The file has rows {instruction, context, response} whose splits are read_rows' own (90%, 5%, 5%):
a split's passages all come from the same split of --data, so none stands in two of them.

    --plain 0.5         half of the training rows have their own passage alone, as in --data: one
                        file of predictors that serves both
    --alone passage     the same rows in the same order, the right passage alone: what reading no
                        distractors is worth
    --alone question    the question alone: what the model knows without reading
"""
import json
import random
import re
from pathlib import Path

from support.data import digest, read_rows
from support.files import need
from support.options import at_least, cli, command_parser, output_file

SPLITS = ("train", "heldout", "validation")
ANSWERED = ("closed_qa", "information_extraction")      # not summaries: they ask for no passage
# A question that only points at its text says nothing once there are several.
POINTING = re.compile(r"\b(passage|paragraph|text|article|reference|above|below|following|given|"
                      r"provided|context|summar\w+|sentences?)\b", re.IGNORECASE)
PASSAGE = (300, 2000)           # characters of one passage
WHOLE = (2000, 7500)            # of all together: some 500 to 1,900 tokens
TRIES = 100


def asks(row):
    """Whether a row's question can find its passage among others."""
    low, high = PASSAGE
    fits = low <= len(row.get("context") or "") <= high
    return (fits and row.get("category", ANSWERED[0]) in ANSWERED
            and not POINTING.search(row["instruction"]))


def named(question, passage):
    """How many words of a question, of four letters or more, stand in a passage."""
    words = set(re.findall(r"\w{4,}", question.lower()))
    return len(words & set(re.findall(r"\w{4,}", passage.lower())))


def gather(row, pool, k, draw):
    """A row -> its passages, k in random order, or None where none are found that suit it.

    pool: texts to draw from. The right one shares more words with the question than any other.
    """
    own = row["context"].strip()
    shared = named(row["instruction"], own)
    if not shared:
        return None
    for _ in range(TRIES):
        others = draw.sample(pool, k - 1)
        texts = [own, *others]
        length = sum(map(len, texts))
        if own in others or not WHOLE[0] <= length <= WHOLE[1]:
            continue
        if all(named(row["instruction"], other) < shared for other in others):
            draw.shuffle(texts)
            return texts
    return None


def numbered(texts):
    """Passages -> one context."""
    return "\n\n".join(f"Passage {i}: {text}" for i, text in enumerate(texts, start=1))


def passages(path, split, k, seed):
    """The rows of one split of a Dolly file -> rows with k passages.

    Each also has its own passage, and its place among the k, from 1.
    """
    rows = [row for row in read_rows(path, split) if asks(row)]
    pool = sorted({row["context"].strip() for row in rows})
    need(len(pool) >= 2 * k, f"{path}: {len(pool)} passages in its {split} rows, {2 * k} are "
                             "needed, at least")
    found = []
    for number, row in enumerate(rows):
        texts = gather(row, pool, k, random.Random(f"{seed} {split} {number}"))
        if texts:
            own = row["context"].strip()
            found.append({"instruction": row["instruction"], "context": numbered(texts),
                          "response": row["response"], "passage": own,
                          "place": 1 + texts.index(own)})
    return found


def divided(splits, limit):
    """Rows by split -> as many of each as read_rows will find there again: 18 : 1 : 1.

    limit: how many held-out rows, at most; None: as many as there are.
    """
    train, heldout, validation = (splits[name] for name in SPLITS)
    m = min(len(train) // 18, len(heldout), len(validation), limit or len(heldout))
    need(m, "too few rows for three splits")
    return train[:18 * m], heldout[:m], validation[:m]


def left_plain(rows, plain):
    """Of the rows the share `plain`, evenly spread, with their own passage alone."""
    found = []
    for i, row in enumerate(rows):
        alone = int((i + 1) * plain) > int(i * plain)
        found.append(row | {"context": row["passage"]} if alone else row)
    return found


def options():
    parser = command_parser(__doc__)
    parser.add_argument("--data", required=True, help="databricks-dolly-15k as JSONL")
    parser.add_argument("--out", required=True, type=output_file, help="JSONL to write")
    parser.add_argument("--passages", type=at_least(2), default=4, metavar="K",
                        help="passages in a prompt")
    parser.add_argument("--plain", type=float, default=0.0, metavar="SHARE",
                        help="of the training rows, with their own passage alone")
    parser.add_argument("--alone", choices=("passage", "question"),
                        help="all rows with nothing but this")
    parser.add_argument("--limit", type=at_least(1), help="held-out rows, at most (18 times as "
                        "many to train on)")
    parser.add_argument("--seed", type=int, default=0, help="draws passages and their order")
    return parser


def main():
    args = options().parse_args()
    need(0 <= args.plain <= 1, "--plain is a share, 0 to 1")
    splits = {name: passages(args.data, name, args.passages, args.seed) for name in SPLITS}
    train, heldout, validation = divided(splits, args.limit)
    rows = [*left_plain(train, args.plain), *heldout, *validation]
    if args.alone:
        texts = [row["passage"] if args.alone == "passage" else "" for row in rows]
        rows = [row | {"context": text} for row, text in zip(rows, texts)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(args.out).write_text("".join(lines), encoding="utf-8")
    print(f"{args.out}: {len(train)} rows to train on, {len(heldout)} held out, "
          f"{len(validation)} to choose by; {args.passages} passages each, rows {digest(rows)}")


if __name__ == "__main__":
    cli(main)
