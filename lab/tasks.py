"""The data sets that lab/quality.py measures: rows of a JSONL file -> prompts with their answers.

An Item is a prompt with an answer or several, all as token ids. The formats are those of Dolly, of
LongBench and QMSum for long prompts (Table 1), and plain text; needles are hidden in plain text.
(Multiple choice and LAMBADA, Table 3: lab/harness.py.)

As a command this file writes the protocol "passages": a question, and k passages of which one,
anywhere, answers it. No rule about places helps there.

    python -m lab.tasks --data databricks-dolly-15k.jsonl --out out/passages.jsonl
    python train.py --ckpt smollm2 --data out/passages.jsonl --context --max-prompt 2000
    python -m lab.quality --ckpt smollm2 --data out/passages.jsonl --context --max-prompt 2000

The passages are contexts of Dolly's rows: a question goes with its own and k - 1 others, in random
order. The file has rows {instruction, context, response} whose splits are read_rows' own (90%, 5%,
5%): a split's passages all come from the same split of --data, so none stands in two of them.

    --plain 0.5         half of the training rows have their own passage alone, as in --data: one
                        file of predictors that serves both
    --alike             other rows: of the held-out and validation ones those to whose question
                        another passage is as like as the right one, by the words that it shares;
                        in the rows above none is, which favours a filter by words (read them with
                        lab.quality --split all)
"""
import json
import math
import random
import re
import string
from collections import Counter
from os.path import commonprefix
from typing import NamedTuple

from support import options
from support.files import blame, need, writable
from support.rows import digest, encode_row, read_rows, tell_losses


class Answer(NamedTuple):
    tokens: list                    # token ids that follow the prompt
    start: int                      # the first of them that counts


class Item(NamedTuple):
    prompt: list                    # token ids
    answers: list                   # of Answer
    texts: tuple = ()               # reference answers, for F1 and ROUGE-L
    row: dict = {}                  # what the prompt was made of


def as_item(tokens, prompt_len, row={}, texts=(), start=0):
    """Token ids, of which the first prompt_len are the prompt, the others its only answer.

    start: the first token of the answer that counts.
    """
    ids = [int(token) for token in tokens]
    return Item(ids[:prompt_len], [Answer(ids[prompt_len:], start)], tuple(texts), row)


# --------------------------------------------------------------------------------------- plain text


def text_items(tokenizer, path, prompt_len, response_len, limit):
    """Windows of the running text of all rows {text}, at most `limit` Items.

    Each has prompt_len tokens to read and the next response_len to predict.
    """
    begin = tokenizer.encode("")    # a begin-of-text token, where the model has one
    size = prompt_len - len(begin) + response_len
    ids = running_text(tokenizer, path, "\n")
    starts = range(0, len(ids) - size + 1, size)
    need(starts, f"{path}: its text has {len(ids)} tokens, one window needs {size}, at least")
    return [as_item(begin + ids[i:i + size], prompt_len) for i in starts[:limit]]


def running_text(tokenizer, path, stripped=None):
    """Token ids of all rows {text}, a line each; stripped: see str.strip."""
    ids = []
    for row in read_rows(path, fields=("text",)):
        ids += tokenizer.encode(row["text"].strip(stripped) + "\n", bos=False)
    return ids


# ------------------------------------------------------------------------------------ long prompts


def read_long(path, split):
    """Rows in LongBench's, QMSum's or Dolly's format -> [(question, context, answers)]."""
    rows = read_rows(path, fields=())
    with blame(path, "expected rows as LongBench, QMSum or Dolly have them"):
        if "response" in rows[0]:
            return [(row["instruction"], row["context"], [row["response"]])
                    for row in read_rows(path, split) if row.get("context")]
        if "queries" not in rows[0]:
            return [(row["input"], row["context"], row["answers"]) for row in rows]
        asked = [(turn, query["query"], meeting["transcript"], [query["answer"]])
                 for meeting in rows for turn, query in enumerate(meeting["queries"])]
        # the first question on every meeting, then the second: a small limit meets many meetings
        asked.sort(key=lambda row: row[0])
        return [row[1:] for row in asked]


def shorten(tokenizer, text, room):
    """A text of more than `room` tokens loses its middle, as LongBench does it."""
    ids = tokenizer.encode(text, bos=False)
    if len(ids) <= room:
        return text
    half = room // 2
    return tokenizer.decode(ids[:half]) + "\n...\n" + tokenizer.decode(ids[-half:])


def long_items(tokenizer, path, chat, split="heldout", min_prompt=1, max_prompt=2048,
               max_response=96, question="first", limit=None):
    """Question answering and summaries over long contexts -> at most `limit` Items.

    Contexts are shortened to prompts of max_prompt tokens; shorter prompts than min_prompt are
    left out. The answer whose likelihood counts is the first, cut to max_response tokens. One line
    says how many rows are left out or shortened.
    """
    found, lost, cut = [], Counter(), 0
    for number, (asked, context, answers) in enumerate(read_long(path, split), start=1):
        with blame(f"{path}, row {number}", "not a question, a context and a list of answers"):
            row = {"instruction": asked or "Summarise the following text in a few sentences.",
                   "response": answers[0]}
            bare = encode_row(tokenizer, row, chat)
            room = max_prompt - bare.prompt_len - 16    # where parts meet, some tokens may come in
            need(room > 1, "the question alone is longer than --max-prompt")
            context = context.replace("NEWLINE_CHAR", "\n")
            row["context"] = shorten(tokenizer, context, room)
            example = encode_row(tokenizer, row, chat, max_response, question)
        if example.prompt_len < min_prompt:
            lost[f"shorter than --min-prompt {min_prompt}"] += 1
            continue
        cut += row["context"] != context
        found.append(as_item(*example, texts=answers))
        if len(found) == limit:
            break
    need(found, f"{path}: no row with a prompt of at least {min_prompt} tokens")
    tell_losses(path, f"{len(found)} rows", lost, {"contexts shortened": cut})
    return found


# ----------------------------------------------------------------------------------------- needles

TOWNS = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Vienna", "Dakar", "Lima")


def needle_item(tokenizer, ids, chat, n, depth, question="first"):
    """A sentence that gives a town a number is hidden in plain text; the number is asked for.

    ids: those of the text; n: about how many tokens the prompt has; depth: where the needle stands
    in the text, percent. The answer counts from the number on.
    """
    draw = random.Random(f"0 {n} {depth} 0")
    town, secret = draw.choice(TOWNS), draw.randrange(10000, 100000)
    fact = f"The secret number of {town} is"
    row = {"instruction": f"What is the secret number of {town}? Answer in one sentence.",
           "context": f"{fact} {secret}.", "response": f"{fact} {secret}"}
    room = n - encode_row(tokenizer, row, chat).prompt_len
    need(0 < room < len(ids), f"a needle's prompt of {n:,} tokens: the text has {len(ids):,}, "
                              f"question and needle take {n - room}")
    start = draw.randrange(len(ids) - room)
    text = tokenizer.decode(ids[start:start + room])
    row["context"] = hidden(text, depth, row["context"])
    answer, lead = (tokenizer.encode(each, bos=False) for each in (row["response"], fact))
    example = encode_row(tokenizer, row, chat, None, question)
    return as_item(*example, start=len(commonprefix([answer, lead])))


def hidden(text, depth, sentence):
    """A text with a sentence put in, at the end of the sentence nearest before `depth` percent."""
    cut = len(text)
    if depth < 100:
        end = text.rfind(". ", 0, round(cut * depth / 100))
        cut = end + 2 if end >= 0 else 0
    before, after = text[:cut], text[cut:]
    space = before[-1:].strip() and " "
    return f"{before}{space}{sentence} {after}".rstrip()


# ------------------------------------------------------------------------- a text that is filtered

UNITS = {"sentence": r"[.!?]\s+|\n\n", "passage": r"\n\n"}        # how one ends


def filtered(row, unit, room, count):
    """A row whose context has only the units that BM25 ranks first, in order, in `room` tokens.

    count(text): how many tokens it has. A unit that does not fit any more is left out.
    """
    units = re.findall(rf".+?(?:{UNITS[unit]}|$)", row["context"], re.DOTALL)
    scores, chosen = bm25(row["instruction"], units), set()
    for i in sorted(range(len(units)), key=lambda i: -scores[i]):
        n = count(units[i])
        if n <= room:
            chosen.add(i)
            room -= n
    return row | {"context": "".join(units[i] for i in sorted(chosen))}


def bm25(question, texts, k=1.5, b=0.75):
    """Okapi BM25: how well each text suits a question, by its words -> a list of scores."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = [0.0] * len(bags)
    for word in set(re.findall(r"\w+", question.lower())):
        found = sum(word in bag for bag in bags)
        rarity = math.log(1 + (len(bags) - found + 0.5) / (found + 0.5))
        for i, bag in enumerate(bags):
            length = 1 - b + b * bag.total() / mean
            scores[i] += rarity * bag[word] * (k + 1) / (bag[word] + k * length)
    return scores


# ------------------------------------------------------------------------- the model's own words


def words(text):
    """Lower case, without punctuation and articles, as SQuAD compares answers."""
    text = re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1(said, right):
    """Overlap of two texts as bags of words, 0 to 1: SQuAD's F1."""
    a, b = words(said), words(right)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


def rouge_l():
    """-> score(said, right), 0 to 1: the F measure of ROUGE-L by the package rouge-score.

    Its defaults: lower case, what is no ASCII letter or digit parts words, and no stemmer, so
    "sells" and "sell" are two words.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError("ROUGE-L needs the package: pip install rouge-score") from None
    measure = RougeScorer(["rougeL"])
    return lambda said, right: measure.score(right, said)["rougeL"].fmeasure


# ---------------------------------------------------------------------------------------- passages

ANSWERED = ("closed_qa", "information_extraction")      # not summaries: they ask for no passage
# A question that only points at its text says nothing once there are several.
POINTING = re.compile(r"\b(passage|paragraph|text|article|reference|above|below|following|given|"
                      r"provided|context|summar\w+|sentences?)\b", re.IGNORECASE)


def asks(row):
    """Whether a row's question can find its passage, of 300 to 2,000 characters, among others."""
    return (300 <= len(row.get("context") or "") <= 2000
            and row.get("category", ANSWERED[0]) in ANSWERED
            and not POINTING.search(row["instruction"]))


def shared(question, passage):
    """How many words of a question, of four letters or more, stand in a passage."""
    first, second = (set(re.findall(r"\w{4,}", text.lower())) for text in (question, passage))
    return len(first & second)


def gather(row, pool, k, draw):
    """A row -> its passages, k in random order, or None where none are found that suit it.

    pool: texts to draw from. The right one shares more words with the question than any other;
    all together have 2,000 to 7,500 characters, some 500 to 1,900 tokens.
    """
    own = row["context"].strip()
    for _ in range(100):
        texts = [own, *draw.sample(pool, k - 1)]
        right, *others = (shared(row["instruction"], text) for text in texts)
        if right > max(others) and fits(texts):
            draw.shuffle(texts)
            return texts
    return None


def likest(row, pool, k, draw):
    """The same, but the others share the most words with the question: one of them, at least, as
    many as the right one, so that words do not tell which that is.
    """
    question, own = row["instruction"], row["context"].strip()
    others = sorted({*pool} - {own}, key=lambda text: (-shared(question, text), text))[:k - 1]
    texts = [own, *others]
    if shared(question, others[0]) < shared(question, own) or not fits(texts):
        return None
    draw.shuffle(texts)
    return texts


def fits(texts):
    return 2000 <= sum(map(len, texts)) <= 7500


def passages(path, splits, k, find=gather):
    """The rows of some splits of a Dolly file -> rows with k passages.

    Each also has its own passage, and its place among the k, from 1.
    """
    rows = [row for split in splits for row in read_rows(path, split) if asks(row)]
    pool = sorted({row["context"].strip() for row in rows})
    need(len(pool) >= k, f"{path}: too few passages in its {splits[0]} rows")
    found = []
    for number, row in enumerate(rows):
        texts = find(row, pool, k, random.Random(f"0 {splits[0]} {number}"))
        if texts:
            own = row["context"].strip()
            context = "\n\n".join(f"Passage {i}: {text}" for i, text in enumerate(texts, start=1))
            found.append({"instruction": row["instruction"], "context": context,
                          "response": row["response"], "passage": own,
                          "place": 1 + texts.index(own)})
    return found


def three_splits(path, k, plain):
    """Rows with k passages, in the proportions in which read_rows finds its splits again: 18:1:1.

    plain: see --plain. -> rows, and how many there are in words
    """
    train, *others = (passages(path, [split], k) for split in ("train", "heldout", "validation"))
    m = min(len(train) // 18, *map(len, others))
    need(m, f"{path}: too few rows for three splits")
    rows = train[:18 * m]
    for i, row in enumerate(rows):
        if int((i + 1) * plain) > int(i * plain):       # evenly spread
            rows[i] = row | {"context": row["passage"]}
    rows += [row for split in others for row in split[:m]]
    return rows, f"{18 * m} rows to train on, {m} held out, {m} to choose by"


def main():
    parser = options.command_parser(__doc__)
    parser.add_argument("--data", required=True, help="databricks-dolly-15k as JSONL")
    parser.add_argument("--out", required=True, type=writable, help="JSONL to write")
    parser.add_argument("--passages", type=options.at_least(2), default=4, metavar="K",
                        help="passages in a prompt")
    parser.add_argument("--plain", type=float, default=0.0, metavar="SHARE",
                        help="of the training rows, with their own passage alone")
    parser.add_argument("--alike", action="store_true", help="rows in which another passage shares "
                        "as many words with the question as the right one")
    args = parser.parse_args()
    if args.alike:
        options.refuse_idle(parser, args, "with --alike", "plain")
        rows = passages(args.data, ("heldout", "validation"), args.passages, likest)
        need(rows, f"{args.data}: no rows with passages alike")
        parts = f"{len(rows)} rows to measure on"
    else:
        rows, parts = three_splits(args.data, args.passages, args.plain)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    args.out.write_text("".join(lines), encoding="utf-8")
    print(f"{args.out}: {parts}; {args.passages} passages each, rows {digest(rows)}")


if __name__ == "__main__":
    options.cli(main)
