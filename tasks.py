"""The data sets that eval.py measures: rows of a JSONL file -> prompts with their answers, and how a generated answer is scored.

An Item is a prompt with one or more answers, all as token ids. The formats are lm-evaluation-harness' for multiple
choice and LAMBADA (Table 3), LongBench's and QMSum's for long prompts (Table 1), and plain text.

Shapes: none; token ids are plain lists here, one prompt at a time.
"""
import random
import re
import string
from collections import Counter
from typing import NamedTuple

from common import encode_row, prompt_text, read_rows
from model import need

CHOICE = ("copa", "piqa", "winogrande", "boolq", "choice")


class Answer(NamedTuple):
    tokens: list                    # what follows the prompt
    start: int                      # the first of them that counts
    bytes: int                      # UTF-8 length of the text that counts


class Item(NamedTuple):
    prompt: list                    # token ids
    answers: list                   # of Answer
    gold: int                       # the right one
    texts: tuple = ()               # reference answers, for F1 and ROUGE-L


def as_choice(task, row):
    """A row of a multiple-choice set -> context, [(unscored lead, scored text)], index of the right one."""
    if task == "copa":
        context = row["premise"].strip()[:-1] + {"cause": " because", "effect": " therefore"}[row["question"]]
        return context, [("", " " + c[:1].lower() + c[1:]) for c in (row["choice1"], row["choice2"])], row["label"]
    if task == "piqa":
        return f"Question: {row['goal']}\nAnswer:", [("", " " + row["sol1"]), ("", " " + row["sol2"])], row["label"]
    if task == "winogrande":        # the same ending is scored after either name
        before, after = row["sentence"].split("_")
        return before.rstrip(), [(" " + row["option1"], after), (" " + row["option2"], after)], int(row["answer"]) - 1
    if task == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", [("", " no"), ("", " yes")], {"false": 0, "true": 1, "0": 0, "1": 1}[str(row["label"]).lower()]
    if task == "lambada":
        context, word = row["text"].rstrip().rsplit(" ", 1)
        return context, [("", " " + word)], 0
    return row["context"], [("", c if c[:1].isspace() else " " + c) for c in row["choices"]], row["label"]


def choice_items(tokenizer, path, task, limit, shots, seed):
    """Multiple choice and LAMBADA. The last tenth of the file (at least 10 rows) gives the few-shot examples and is not scored."""
    rows = []
    for number, row in enumerate(read_rows(path, fields=()), start=1):
        try:
            rows.append(as_choice(task, row))
            need(all(isinstance(part, str) for part in (rows[-1][0], *sum(rows[-1][1], ()))) and rows[-1][2] in range(len(rows[-1][1])), "wrong type")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{path}, row {number}: not a row of {task} ({type(e).__name__}: {e})") from None
    pool = max(10, len(rows) // 10)
    need(len(rows) > pool, f"{path}: {len(rows)} rows are too few, {pool} are set apart for few-shot examples")
    items = []
    for number, (context, choices, label) in enumerate(rows[:-pool][:limit]):
        examples = random.Random(f"{seed} {number}").sample(rows[-pool:], shots)
        context = "".join(c + "".join(some[right]) + "\n\n" for c, some, right in examples) + context
        prompt = tokenizer.encode(context)
        answers = []
        for lead, scored in choices:  # encoded with its context, so that a word is cut as it would be in the text
            start = len(tokenizer.encode(context + lead)) - len(prompt)
            answers.append(Answer(tokenizer.encode(context + lead + scored)[len(prompt):], start, len(scored.removeprefix(" ").encode())))
            need(0 <= start < len(answers[-1].tokens), f"{path}, row {number + 1}: a choice has no text")
        items.append(Item(prompt, answers, label))
    return items


def text_items(tokenizer, path, prompt, response, limit):
    """Windows of the running text of all rows: `prompt` tokens to read, the next `response` to predict."""
    ids, begin = [], tokenizer.encode("")                            # a begin-of-text token, where the model has one
    prompt -= len(begin)
    for row in read_rows(path, fields=("text",)):
        ids += tokenizer.encode(row["text"] if row["text"].endswith("\n") else row["text"] + "\n", bos=False)
        if len(ids) >= limit * (prompt + response):
            break
    windows = [ids[i:i + prompt + response] for i in range(0, len(ids) - prompt - response + 1, prompt + response)][:limit]
    need(windows, f"{path}: its text has {len(ids)} tokens, one window needs {prompt + response}, at least")
    return [Item(begin + w[:prompt], [Answer(w[prompt:], 0, 1)], 0) for w in windows]


def long_items(tokenizer, path, args, template):
    """Question answering and summaries over long contexts; a context that is too long loses its middle, as LongBench does it."""
    found = []
    rows = read_rows(path, fields=())
    need(rows, f"{path}: no rows")
    if "response" in rows[0]:
        rows = [{"input": r["instruction"], "context": r["context"], "answers": [r["response"]]} for r in read_rows(path, "heldout") if r.get("context")]
    if "queries" in rows[0]:
        longest = max(len(r["queries"]) for r in rows)               # the first question on every meeting, then the second: a --limit meets all meetings
        rows = [{"input": r["queries"][i]["query"], "context": r["transcript"], "answers": [r["queries"][i]["answer"]]} for i in range(longest) for r in rows if i < len(r["queries"])]
    for number, row in enumerate(rows, start=1):
        need(isinstance(row.get("context"), str) and isinstance(row.get("input"), str) and isinstance(row.get("answers"), list) and row["answers"]
             and all(isinstance(a, str) and a for a in row["answers"]), f"{path}, row {number}: expected text in context and input, and a list of answers")
        text = {"instruction": row["input"] or "Summarise the following text in a few sentences.", "context": row["context"].replace("NEWLINE_CHAR", "\n"), "response": row["answers"][0]}
        ids = tokenizer.encode(text["context"], bos=False)
        room = args.max_prompt - len(tokenizer.encode(prompt_text({**text, "context": ""}, template))) - 16
        need(room > 1, f"{path}, row {number}: the question alone is longer than --max-prompt")
        if len(ids) > room:
            text["context"] = tokenizer.decode(ids[:room // 2]) + "\n...\n" + tokenizer.decode(ids[-(room // 2):])
        example = encode_row(tokenizer, text, template, args.max_response, args.question)
        prompt, response = example.tokens[:example.prompt_len].tolist(), example.tokens[example.prompt_len:].tolist()
        if args.min_prompt <= len(prompt) and response:
            found.append(Item(prompt, [Answer(response, 0, 1)], 0, tuple(row["answers"])))
            if len(found) == args.limit:
                break
    need(found, f"{path}: no row with a prompt of at least {args.min_prompt} tokens")
    return found


def words(text):
    """Lower case, without punctuation and articles, as SQuAD compares answers."""
    return [w for w in re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower()).split() if w not in ("a", "an", "the")]


def f1(said, right):
    """Overlap of two bags of words."""
    a, b = words(said), words(right)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


def rouge_l(said, right):
    """F measure of the longest common subsequence of words."""
    a, b = words(said), words(right)
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0
