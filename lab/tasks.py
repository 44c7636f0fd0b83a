"""The data sets that lab/quality.py measures: rows of a JSONL file -> prompts with their answers.

An Item is a prompt with one or more answers, all as token ids. The formats are those of
lm-evaluation-harness for multiple choice and LAMBADA (Table 3), of LongBench and QMSum for long
prompts (Table 1), and plain text. At the end: how an answer in the model's own words is scored.

Shapes: none; token ids are plain lists here, one prompt at a time.
"""
import random
import re
import string
from collections import Counter
from os.path import commonprefix
from typing import NamedTuple

from support.data import encode_row, read_rows, tell_losses
from support.files import blame, need
from support.templates import prompt_text

CHOICE = ("copa", "piqa", "winogrande", "boolq", "choice")
SUMMARISE = "Summarise the following text in a few sentences."


class Answer(NamedTuple):
    tokens: list                    # token ids that follow the prompt
    start: int                      # the first of them that counts
    n_chars: int                    # length of the text that counts, without a space before it


class Item(NamedTuple):
    prompt: list                    # token ids
    answers: list                   # of Answer
    gold: int                       # which of them is right
    texts: tuple = ()               # reference answers, for F1 and ROUGE-L


class Choice(NamedTuple):
    """A row of a multiple-choice set, as text."""
    context: str
    choices: list                   # of (lead, scored): the lead stands before, but does not count
    gold: int                       # which of them is right


# --------------------------------------------------------------------------------- multiple choice


def copa(row):
    link = {"cause": " because", "effect": " therefore"}[row["question"]]
    context = row["premise"].strip()[:-1] + link        # without the full stop
    choices = row["choice1"], row["choice2"]
    # two spaces, as in lm-evaluation-harness
    return Choice(context, [("", "  " + c[:1].lower() + c[1:]) for c in choices], row["label"])


def piqa(row):
    choices = row["sol1"], row["sol2"]
    context = f"Question: {row['goal']}\nAnswer:"
    return Choice(context, [("", " " + c) for c in choices], row["label"])


def winogrande(row):
    """The same ending is scored after either name; the first blank is the one to fill."""
    before, ending = row["sentence"].split("_", 1)
    context = before.rstrip()
    space, ending = before[len(context):], " " + ending.strip()
    names = row["option1"], row["option2"]
    gold = int(row["answer"]) - 1
    return Choice(context, [(space + name, ending) for name in names], gold)


def boolq(row):
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    gold = {"false": 0, "true": 1, "0": 0, "1": 1}[str(row["label"]).lower()]
    return Choice(context, [("", " no"), ("", " yes")], gold)


def lambada(row):
    """The last word is the only choice."""
    context, word = row["text"].rsplit(" ", 1)
    return Choice(context, [("", " " + word)], 0)


def any_choice(row):
    """Rows {context, choices, label}; a choice begins with a space."""
    spaced = [c if c[:1].isspace() else " " + c for c in row["choices"]]
    return Choice(row["context"], [("", c) for c in spaced], row["label"])


FORMATS = {"copa": copa, "piqa": piqa, "winogrande": winogrande, "boolq": boolq,
           "lambada": lambada, "choice": any_choice}


def checked(choice):
    """The same Choice; raises ValueError where its parts are not text, or none is right."""
    texts = [choice.context]
    for pair in choice.choices:
        texts += pair
    need(all(isinstance(text, str) for text in texts), "wrong type")
    need(choice.gold in range(len(choice.choices)), "wrong type")
    return choice


def read_choices(path, task):
    """All rows of a file -> Choices; a row that does not fit is named in a ValueError."""
    found = []
    for number, row in enumerate(read_rows(path, fields=()), start=1):
        try:
            found.append(checked(FORMATS[task](row)))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            fault = f"{type(e).__name__}: {e}"
            raise ValueError(f"{path}, row {number}: not a row of {task} ({fault})") from None
    return found


def choice_items(tokenizer, path, task, limit, shots, seed):
    """Multiple choice and LAMBADA -> at most `limit` Items, each after `shots` solved examples.

    The last tenth of the file, at least 10 rows, gives the examples and is never scored.
    """
    rows = read_choices(path, task)
    pool = max(10, len(rows) // 10)
    need(len(rows) > pool, f"{path}: {len(rows)} rows are too few, {pool} are set apart for "
                           "few-shot examples")
    tell_losses(path, f"{len(rows)} rows", {"set apart for few-shot examples": pool}, {})
    asked, shown = rows[:-pool], rows[-pool:]
    items = []
    for number, row in enumerate(asked[:limit]):
        # of seed and number alone: a larger limit changes no earlier row
        examples = random.Random(f"{seed} {number}").sample(shown, shots)
        context = "".join(map(solved, examples)) + row.context
        items.append(choice_item(tokenizer, row._replace(context=context)))
        where = f"{path}, row {number + 1}"
        need(items[-1].prompt, f"{where}: its prompt is empty, and this tokenizer has no token to "
                               "begin with")
        need(all(0 <= a.start < len(a.tokens) for a in items[-1].answers),
             f"{where}: a choice has no text")
    return items


def solved(choice):
    """An example with its right answer, and a blank line."""
    return choice.context + "".join(choice.choices[choice.gold]) + "\n\n"


def choice_item(tokenizer, choice):
    """Choice -> Item. A choice is encoded with its context: words are cut as in the whole text.

    The prompt is what both begin with. Without such a token it is tokenizer.prefix, or empty.
    """
    context, wholes, starts = choice.context, [], []
    for lead, scored in choice.choices:
        read = (context + lead).rstrip()        # white space counts with what follows
        starts.append(len(tokenizer.encode(read)))
        wholes.append(tokenizer.encode(context + lead + scored))
    prompt = commonprefix([tokenizer.encode(context.rstrip()), *wholes])    # of any lists
    shared, answers = len(prompt), []
    for whole, start, (_, scored) in zip(wholes, starts, choice.choices):
        n_chars = len(scored.removeprefix(" "))
        answers.append(Answer(whole[shared:], start - shared, n_chars))
    if not prompt and tokenizer.prefix is not None:
        prompt = [tokenizer.prefix]
    return Item(prompt, answers, choice.gold)


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
        answer = Answer(ids[middle:start + size], 0, 1)
        items.append(Item(begin + ids[start:middle], [answer], 0))
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
        answer = Answer(response[:max_response], 0, 1)
        found.append(Item(prompt, [answer], 0, tuple(row["answers"])))
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
