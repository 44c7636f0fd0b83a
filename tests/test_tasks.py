"""How rows of a data set become prompts and answers, and how an answer in own words is scored."""
import json
import sys

import pytest

from lab import tasks
from model import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("toy")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------- LAMBADA


class Letters:
    """A tokenizer of one token a character; `begin` stands before a text, where there is one."""

    def __init__(self, begin=None):
        self.begin = begin

    def encode(self, text, bos=True):
        begin = [self.begin] if bos and self.begin is not None else []
        return begin + [ord(c) for c in text]


@pytest.mark.parametrize("text, context, word", [
    ("the end of it", "the end of", " it"), ("the end  it", "the end", "  it")])
def test_lambada_asks_for_the_last_word_and_the_space_before_it(tmp_path, text, context, word):
    path = jsonl(tmp_path / "l.jsonl", [{"text": text}] * 3)
    items = tasks.lambada_items(Letters(begin=1), path, 2)
    right = tasks.Item(Letters(begin=1).encode(context), [(Letters().encode(word), 0)])
    assert items == [right] * 2


def test_a_last_word_is_cut_as_in_the_whole_text(tokenizer, tmp_path):
    text = "The fog moved behind the green mirrors."
    item, = tasks.lambada_items(tokenizer, jsonl(tmp_path / "l.jsonl", [{"text": text}]), 5)
    assert item.prompt + item.answers[0].tokens == tokenizer.encode(text)
    assert tokenizer.decode(item.answers[0].tokens).strip() == "mirrors."


@pytest.mark.parametrize("row, message", [
    ({"text": " word "}, "row 1: not two words"), ({"texts": "a b"}, "line 1: 'text' is missing"),
    ({"text": ""}, "row 1: not two words")])
def test_rows_that_do_not_fit_are_named(tokenizer, tmp_path, row, message):
    path = jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        tasks.lambada_items(tokenizer, path, 5)


# -------------------------------------------------------------------------------------- plain text


def test_text_windows(tokenizer, tmp_path):
    text = "The fog moved behind the green mirrors."
    path = jsonl(tmp_path / "t.jsonl", [{"text": text}] * 20)
    items = tasks.text_items(tokenizer, path, 30, 10, 3)
    begin, ids = tokenizer.encode(""), tokenizer.encode(text + "\n", bos=False) * 20
    assert len(begin) == 1
    found = [item.prompt + item.answers[0].tokens for item in items]
    assert found == [begin + ids[i:i + 39] for i in (0, 39, 78)]
    assert all(len(item.prompt) == 30 for item in items)
    with pytest.raises(ValueError, match="one window needs 3999"):
        tasks.text_items(tokenizer, path, 3000, 1000, 3)


# ------------------------------------------------------------------------------------ long prompts


def test_long_contexts_lose_their_middle(tokenizer, tmp_path):
    sentences = "Clara sells cups. Peter sells hats. The fog moved "
    context = " ".join(f"{sentences}{word}." for word in ("behind", "near") * 20)
    row = {"input": "What does Clara sell?", "context": context, "answers": ["cups", "hats"]}
    path = jsonl(tmp_path / "l.jsonl", [row])
    item, = tasks.long_items(tokenizer, path, max_prompt=100, max_response=8, question="last",
                             limit=5)
    text = tokenizer.decode(item.prompt)
    assert len(item.prompt) <= 100 and text.count(" ...") == 1
    assert text.startswith("Clara sells") and text.endswith("What does Clara sell?")
    assert item.texts == ("cups", "hats")
    assert tokenizer.decode(item.answers[0].tokens).strip() == "cups"
    with pytest.raises(ValueError, match="no row with a prompt of at least 101 tokens"):
        tasks.long_items(tokenizer, path, min_prompt=101, max_prompt=100)
    with pytest.raises(ValueError, match="row 1: the question alone is longer"):
        tasks.long_items(tokenizer, path, max_prompt=10)


def test_long_rows_left_out_shortened_or_cut_are_said(tokenizer, tmp_path, capsys):
    rows = [{"input": "Who?", "context": context, "answers": ["Clara and Peter"]}
            for context in ("cups", "Clara sells cups. Peter sells hats.", "the fog moved " * 40)]
    path = jsonl(tmp_path / "l.jsonl", rows)
    tasks.long_items(tokenizer, path, min_prompt=10, max_prompt=60, max_response=2)
    told = ("l.jsonl, 2 rows; left out: 1 shorter than --min-prompt 10; 1 contexts shortened, "
            "2 answers read to 2 tokens\n")
    assert capsys.readouterr().out == told


def test_a_text_that_is_short_enough_stays_whole(tokenizer):
    text = "Clara sells cups. Peter sells hats."
    n = len(tokenizer.encode(text, bos=False))
    assert tasks.shorten(tokenizer, text, n) == text
    assert tasks.shorten(tokenizer, text, n - 1) == "Clara sells cups\n...\nsells hats."


@pytest.mark.parametrize("answers", [[], "cups", [""], [3], None])
def test_long_rows_without_an_answer_are_named(tokenizer, tmp_path, answers):
    row = {"input": "q", "context": "c", "answers": answers}
    path = jsonl(tmp_path / "m.jsonl", [row])
    with pytest.raises(ValueError, match="row 1: expected text"):
        tasks.long_items(tokenizer, path)


def test_a_limit_meets_every_meeting(tmp_path):
    def meeting(name, count):
        queries = [{"query": f"{name}{i}?", "answer": f"{name}{i}."} for i in range(count)]
        return {"transcript": name, "queries": queries}

    path = jsonl(tmp_path / "q.jsonl", [meeting("a", 2), meeting("b", 1), meeting("c", 3)])
    rows = tasks.read_long(path)
    assert [row["input"] for row in rows] == ["a0?", "b0?", "c0?", "a1?", "c1?", "c2?"]
    assert rows[3] == {"input": "a1?", "context": "a", "answers": ["a1."]}
    path = jsonl(tmp_path / "r.jsonl", [meeting("a", 1), {"transcript": "b"}])
    with pytest.raises(ValueError, match="r.jsonl: not every row has a transcript and queries"):
        tasks.read_long(path)


# ------------------------------------------------------------------------- the model's own words


def test_f1_compares_bags_of_words():
    assert tasks.f1("The Globe, in London!", "globe in london") == 1.0
    assert tasks.f1("paris", "london") == 0.0 and tasks.f1("", "x") == 0.0
    assert tasks.f1("red red car", "red bus") == pytest.approx(2 / 5)


def test_rouge_l_compares_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    score = tasks.rouge_l()
    # one three four
    assert score("one two three four", "one three five four") == pytest.approx(6 / 8)
    assert score("One, two!", "one two") == 1.0 and score("", "x") == 0.0
    assert score("three two one", "one two three") == pytest.approx(1 / 3)
    assert score("she sells", "she sell") == pytest.approx(1 / 2)       # no stemmer
    # one of one word said, one of four right: 2 * 1 * 1/4 / (1 + 1/4)
    assert score("one", "one two three four") == pytest.approx(2 / 5)


def test_rouge_l_names_its_package(monkeypatch):
    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="^ROUGE-L needs the optional package rouge-score"):
        tasks.rouge_l()
