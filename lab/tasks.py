"""The data sets that lab/quality.py measures: rows of a JSONL file -> prompts with their answers.

An Item is a prompt with one or more answers, all as token ids. The formats are those of
lm-evaluation-harness for LAMBADA, of LongBench and QMSum for long prompts (Table 1), and plain
text. At the end: how an answer in the model's own words is scored. (Multiple choice, Table 3:
lab/harness.py.)

Shapes: none; token ids are plain lists here, one prompt at a time.
"""
import re
import string
from collections import Counter
from os.path import commonprefix
from typing import NamedTuple

from support.data import encode_row, read_rows, tell_losses
from support.files import blame, need
from support.templates import prompt_text

SUMMARISE = "Summarise the following text in a few sentences."


class Answer(NamedTuple):
    tokens: list                    # token ids that follow the prompt
    start: int                      # the first of them that counts


class Item(NamedTuple):
    prompt: list                    # token ids
    answers: list                   # of Answer
    texts: tuple = ()               # reference answers, for F1 and ROUGE-L


# ----------------------------------------------------------------------------------------- LAMBADA


def lambada_items(tokenizer, path, limit):
    """Rows {text} -> at most `limit` Items: the last word is to be said, white space before it too.

    It is encoded with its context: words are cut as in the whole text.
    """
    items = []
    for number, row in enumerate(read_rows(path, fields=("text",))[:limit], start=1):
        text = row["text"]
        context = text.rsplit(maxsplit=1)[0] if len(text.split()) > 1 else ""
        need(context, f"{path}, row {number}: not two words")
        whole = tokenizer.encode(text)
        prompt = commonprefix([tokenizer.encode(context), whole])       # of any lists
        items.append(Item(prompt, [Answer(whole[len(prompt):], 0)]))
    need(items, f"{path}: no rows")
    return items


# -------------------------------------------------------------------------------------- plain text


def text_items(tokenizer, path, prompt_len, response_len, limit):
    """Windows of the running text of all rows {text}, at most `limit` Items.

    Each has prompt_len tokens to read and the next response_len to predict.
    """
    begin = tokenizer.encode("")    # a begin-of-text token, where the model has one
    prompt_len -= len(begin)
    size = prompt_len + response_len
    ids = []
    for row in read_rows(path, fields=("text",)):
        text = row["text"]
        ids += tokenizer.encode(text if text.endswith("\n") else text + "\n", bos=False)
        if len(ids) >= limit * size:
            break
    starts = range(0, len(ids) - size + 1, size)[:limit]
    need(starts, f"{path}: its text has {len(ids)} tokens, one window needs {size}, at least")
    items = []
    for start in starts:
        middle = start + prompt_len
        answer = Answer(ids[middle:start + size], 0)
        items.append(Item(begin + ids[start:middle], [answer]))
    return items


# ------------------------------------------------------------------------------------ long prompts


def read_long(path):
    """Rows {context, input, answers} of a file in LongBench's, QMSum's or Dolly's format."""
    rows = read_rows(path, fields=())
    need(rows, f"{path}: no rows")
    if "response" in rows[0]:       # Dolly
        return [{"input": row["instruction"], "context": row["context"],
                 "answers": [row["response"]]}
                for row in read_rows(path, "heldout") if row.get("context")]
    if "queries" in rows[0]:
        with blame(path, "not every row has a transcript and queries"):
            return ask_in_turn(rows)
    return rows


def ask_in_turn(meetings):
    """Rows of QMSum: the first question on every meeting, then the second, and so on.

    So a small limit meets many meetings.
    """
    found = []
    for i in range(max(len(meeting["queries"]) for meeting in meetings)):
        for meeting in meetings:
            if i < len(meeting["queries"]):
                query = meeting["queries"][i]
                found.append({"input": query["query"], "context": meeting["transcript"],
                              "answers": [query["answer"]]})
    return found


def is_long(row):
    """Whether a row has text in context and input, and a list of answers."""
    context, question, answers = row.get("context"), row.get("input"), row.get("answers")
    if not isinstance(context, str) or not isinstance(question, str):
        return False
    if not isinstance(answers, list) or not answers:
        return False
    return all(isinstance(answer, str) and answer for answer in answers)


def shorten(tokenizer, text, room):
    """A text of more than `room` tokens loses its middle, as LongBench does it."""
    ids = tokenizer.encode(text, bos=False)
    if len(ids) <= room:
        return text
    half = room // 2
    return tokenizer.decode(ids[:half]) + "\n...\n" + tokenizer.decode(ids[-half:])


def long_items(tokenizer, path, template="plain", min_prompt=1, max_prompt=2048, max_response=96,
               question="first", limit=None, system=None):
    """Question answering and summaries over long contexts -> at most `limit` Items.

    Contexts are shortened to prompts of max_prompt tokens; shorter prompts than min_prompt are
    left out. The answer whose likelihood counts is the first, cut to max_response tokens. One line
    says how many rows are left out, shortened or cut.
    """
    found, lost, cuts = [], Counter(), Counter()
    for number, row in enumerate(read_long(path), start=1):
        where = f"{path}, row {number}"
        need(is_long(row), f"{where}: expected text in context and input, and a list of answers")
        text = {"instruction": row["input"] or SUMMARISE, "response": row["answers"][0]}
        bare = tokenizer.encode(prompt_text(text, template, system=system))
        room = max_prompt - len(bare) - 16      # where parts meet, some tokens may come in
        need(room > 1, f"{where}: the question alone is longer than --max-prompt")
        context = row["context"].replace("NEWLINE_CHAR", "\n")
        text["context"] = shorten(tokenizer, context, room)
        example = encode_row(tokenizer, text, template, None, question, system)
        prompt = example.tokens[:example.prompt_len].tolist()
        response = example.tokens[example.prompt_len:].tolist()
        if len(prompt) < min_prompt or not response:
            short = f"shorter than --min-prompt {min_prompt}"
            lost[short if response else "without an answer"] += 1
            continue
        cuts["contexts shortened"] += text["context"] != context
        cuts[f"answers read to {max_response} tokens"] += len(response) > max_response
        answer = Answer(response[:max_response], 0)
        found.append(Item(prompt, [answer], tuple(row["answers"])))
        if len(found) == limit:
            break
    need(found, f"{path}: no row with a prompt of at least {min_prompt} tokens")
    tell_losses(path, f"{len(found)} rows", lost, cuts)
    return found


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

    Its default tokenizer (lower case, what is no ASCII letter or digit parts words), and no
    stemmer: "sells" and "sell" are two words.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        wanted = "ROUGE-L needs the optional package rouge-score: pip install rouge-score"
        raise ImportError(wanted) from None
    measure = RougeScorer(["rougeL"], use_stemmer=False)

    def score(said, right):
        return measure.score(target=right, prediction=said)["rougeL"].fmeasure
    return score
