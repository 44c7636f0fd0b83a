"""lab/tasks.py: how rows become prompts and answers, how words are scored, and the passages."""
import math
import random
import sys

import pytest

from conftest import TOY, jsonl
from lab import tasks
from model import Tokenizer
from support.chat import choose_chat
from support.rows import read_rows

TOKENIZER, PLAIN = Tokenizer(TOY), choose_chat(TOY, "plain")
FOG = "The fog moved behind the green mirrors."


def text_of(item):
    return TOKENIZER.decode(item.prompt)


# --------------------------------------------------------------------------------------- plain text


def test_windows_of_plain_text(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"text": FOG}] * 20)
    begin, ids = TOKENIZER.encode(""), TOKENIZER.encode(FOG + "\n", bos=False) * 20
    items = tasks.text_items(TOKENIZER, path, 30, 10, 3)
    assert [item.prompt + item.answers[0].tokens for item in items] \
        == [begin + ids[i:i + 39] for i in (0, 39, 78)]
    assert [len(item.prompt) for item in items] == [30] * 3
    with pytest.raises(ValueError, match="one window needs 3999"):
        tasks.text_items(TOKENIZER, path, 3000, 1000, 3)


# ------------------------------------------------------------------------------------ long prompts


def test_long_contexts_lose_their_middle(tmp_path):
    context = " ".join(f"Clara sells cups. {FOG}" for _ in range(30))
    row = {"input": "What does Clara sell?", "context": context, "answers": ["cups", "hats"]}
    path = jsonl(tmp_path / "l.jsonl", [row])
    item, = tasks.long_items(TOKENIZER, path, PLAIN, max_prompt=100, question="last")
    text = text_of(item)
    assert 80 < len(item.prompt) <= 100 and text.count(" ...") == 1
    assert text.startswith("Clara sells") and text.endswith("What does Clara sell?")
    assert item.texts == ("cups", "hats")
    assert TOKENIZER.decode(item.answers[0].tokens).strip() == "cups"
    with pytest.raises(ValueError, match="row 1: .*the question alone is longer"):
        tasks.long_items(TOKENIZER, path, PLAIN, max_prompt=10)


def test_long_rows_left_out_or_shortened_are_said(tmp_path, capsys):
    rows = [{"input": "Who?", "context": context, "answers": ["Clara and Peter"]}
            for context in ("cups", "Clara sells cups. Peter sells hats.", "the fog moved " * 40)]
    path = jsonl(tmp_path / "l.jsonl", rows)
    items = tasks.long_items(TOKENIZER, path, PLAIN, "all", 10, 60, max_response=2)
    assert [len(item.answers[0].tokens) for item in items] == [2, 2]
    assert capsys.readouterr().out == (
        "l.jsonl, 2 rows; left out: 1 shorter than --min-prompt 10; 1 contexts shortened\n")


@pytest.mark.parametrize("more", [{"answers": []}, {"answers": [3]}, {}])
def test_long_rows_without_an_answer_are_named(tmp_path, more):
    path = jsonl(tmp_path / "m.jsonl", [{"input": "q", "context": "c", **more}])
    with pytest.raises(ValueError, match="m.jsonl.*(expected rows as|a list of answers)"):
        tasks.long_items(TOKENIZER, path, PLAIN)


def test_a_limit_meets_every_meeting(tmp_path):
    def meeting(name, count):
        queries = [{"query": f"{name}{i}?", "answer": f"{name}{i}."} for i in range(count)]
        return {"transcript": name, "queries": queries}

    path = jsonl(tmp_path / "q.jsonl", [meeting("a", 2), meeting("b", 1), meeting("c", 3)])
    rows = tasks.read_long(path, "heldout")
    assert [row[0] for row in rows] == ["a0?", "b0?", "c0?", "a1?", "c1?", "c2?"]
    assert rows[3] == ("a1?", "a", ["a1."])


def test_dollys_rows_are_those_of_a_split(tmp_path):
    rows = [{"instruction": f"q{i}", "context": f"c{i}" * (i != 39), "response": f"r{i}"}
            for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    assert tasks.read_long(path, "heldout") == [(f"q{i}", f"c{i}", [f"r{i}"]) for i in (36, 37)]
    assert tasks.read_long(path, "validation") == [("q38", "c38", ["r38"])]


# ----------------------------------------------------------------------------------------- needles


@pytest.mark.parametrize("depth, before", [
    (20, ""), (60, "One ends here."), (100, "One ends here. Two ends here.")])
def test_a_needle_stands_between_sentences(depth, before):
    text = tasks.hidden("One ends here. Two ends here.", depth, "NEEDLE.")
    assert text.split("NEEDLE.")[0].strip() == before
    assert text.replace("NEEDLE.", "").split() == "One ends here. Two ends here.".split()
    assert " NEEDLE." in " " + text and "NEEDLE. " in text + " "


@pytest.mark.parametrize("question", ["first", "last"])
@pytest.mark.parametrize("n, depth", [(400, 0), (800, 50), (400, 100)])
def test_a_prompt_holds_the_number_once_at_its_depth(question, n, depth):
    ids = TOKENIZER.encode(FOG, bos=False) * 200
    item = tasks.needle_item(TOKENIZER, ids, PLAIN, n, depth, question)
    (tokens, start), = item.answers
    text, number = text_of(item), TOKENIZER.decode(tokens[start:]).strip()
    assert number.isdigit() and len(number) == 5 and text.count(number) == 1
    assert TOKENIZER.decode(tokens[:start]).startswith("The secret number of")
    assert abs(len(item.prompt) - n) <= 0.05 * n
    assert (text.index("What is") < text.index(number)) == (question == "first")
    assert abs(text.index("The secret number") / len(text) - depth / 100) < 0.2


def test_a_text_too_short_for_its_needle_is_refused():
    with pytest.raises(ValueError, match="prompt of 400 tokens: the text has 3, question and"):
        tasks.needle_item(TOKENIZER, [1, 2, 3], PLAIN, 400, 50)


# ------------------------------------------------------------------------- the model's own words


def test_f1_compares_bags_of_words():
    assert tasks.f1("The Globe, in London!", "globe in london") == 1.0
    assert tasks.f1("paris", "london") == 0.0 and tasks.f1("", "x") == 0.0
    assert tasks.f1("red red car", "red bus") == pytest.approx(2 / 5)


@pytest.mark.parametrize("said, right, value", [
    ("one two three four", "one three five four", 6 / 8), ("three two one", "one two three", 1 / 3),
    ("she sells", "she sell", 1 / 2)])
def test_rouge_l_compares_the_longest_common_subsequence(said, right, value):
    pytest.importorskip("rouge_score")
    assert tasks.rouge_l()(said, right) == pytest.approx(value)


def test_rouge_l_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="^ROUGE-L needs .* pip install rouge-score"):
        tasks.rouge_l()


# ---------------------------------------------------------------------------------------- passages


@pytest.fixture(scope="module")
def dolly(tmp_path_factory):
    """300 rows; each asks for a place that its own context alone names."""
    rows = [{"instruction": f"What does Town{i:04} have?", "response": "A harbour.",
             "context": f"Town{i:04} has a harbour. " + f"It is known for number {i}. " * 30}
            for i in range(300)]
    return jsonl(tmp_path_factory.mktemp("dolly") / "dolly.jsonl", rows)


@pytest.fixture
def written(dolly, tmp_path, monkeypatch):
    def run(*words, data=dolly):
        out = tmp_path / "rows.jsonl"
        words = "tasks.py", "--data", data, "--out", out, *words
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        tasks.main()
        return out
    return run


def test_every_row_has_its_own_passage_and_no_passage_stands_in_two_splits(written):
    path, seen = written(), []
    sizes = [len(read_rows(path, split)) for split in ("train", "heldout", "validation")]
    assert sizes == [18 * sizes[1], sizes[1], sizes[1]] and sizes[1] > 5
    for split in ("train", "heldout", "validation"):
        seen.append(set())
        for row in read_rows(path, split):
            parts = row["context"].split("\n\n")
            town = row["instruction"].split()[2]
            assert len(parts) == 4 and 2000 <= len("".join(parts)) <= 7600
            assert parts[row["place"] - 1] == f"Passage {row['place']}: {row['passage']}"
            assert [town in part for part in parts].count(True) == 1
            seen[-1] |= {part.split(": ", 1)[1] for part in parts}
    assert {row["place"] for row in read_rows(path)} == {1, 2, 3, 4}
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_the_same_rows_some_of_them_plain(written):
    whole = read_rows(written())
    rows = read_rows(written("--plain", 0.25))
    m = len(whole) // 20
    for i, row in enumerate(rows):
        assert (row["context"] == row["passage"]) == (i < 18 * m and i % 4 == 3)
    assert [row["place"] for row in rows] == [row["place"] for row in whole]


def test_questions_that_only_point_are_left_out():
    row = {"instruction": "Who built Rome?", "context": "x" * 400, "category": "closed_qa"}
    assert tasks.asks(row)
    for more in ({"instruction": "Who is named in the passage?"}, {"category": "summarization"},
                 {"context": "x" * 299}, {"context": "x" * 2001}, {"context": None}):
        assert not tasks.asks(row | more)


def test_another_passage_that_names_as_much_is_not_drawn():
    own = "Rome was built by Romulus. " * 30
    row = {"instruction": "Who built Rome?", "context": own}
    same, other = "Someone built Rome again. " * 50, "The harbour is cold today. " * 30
    assert tasks.shared(row["instruction"], own) == 2
    assert tasks.gather(row, [same, own.strip()], 2, random.Random(0)) is None
    pool = [same] + [other + str(i) for i in range(9)]
    texts = tasks.gather(row, pool, 3, random.Random(0))
    assert same not in texts and own.strip() in texts and len(texts) == 3
    # the other protocol wants just that one, and takes no row where there is none
    pool.append(own.strip())
    texts = tasks.likest(row, pool, 3, random.Random(0))
    assert {same, own.strip()} < {*texts} and len(texts) == 3
    assert tasks.likest(row, pool[1:], 3, random.Random(0)) is None
    assert tasks.likest(row, pool, 9, random.Random(0)) is None         # too long together


def test_rows_with_passages_alike_come_from_what_is_held_out(dolly, written, tmp_path):
    rows = read_rows(dolly)
    asked = [row | {"instruction": "Which number is this harbour known for?"} for row in rows]
    found = read_rows(written("--alike", data=jsonl(tmp_path / "d.jsonl", asked)))
    texts = [text for row in found for text in row["context"].split("\n\n")]
    held_out = {row["context"].strip() for row in rows[270:]}
    assert len(found) == 30 and {text.partition(": ")[2] for text in texts} == held_out
    with pytest.raises(ValueError, match="no rows with passages alike"):
        written("--alike")                                          # each names its own town alone


def test_too_few_rows_are_refused(dolly, written, tmp_path):
    few = jsonl(tmp_path / "few.jsonl", read_rows(dolly)[:60])
    with pytest.raises(ValueError, match="few.jsonl: too few passages in its heldout rows"):
        written(data=few)


# ----------------------------------------------------------------------------------- filtered text


def test_bm25_by_hand():
    """Three texts of 2, 2 and 4 words; a rare word counts more, in a short text more."""
    found = tasks.bm25("Who sells maps?", ["Anna sells", "maps maps", "the fog sells nothing"])
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    short, long = 1.5 * (0.25 + 0.75 * 2 / (8 / 3)), 1.5 * (0.25 + 0.75 * 4 / (8 / 3))
    assert found == pytest.approx([common * 2.5 / (1 + short), rare * 5 / (2 + short),
                                   common * 2.5 / (1 + long)])


@pytest.mark.parametrize("unit, room, left", [
    ("sentence", 6, "Anna sells maps. Snow fell.\n\n"), ("sentence", 3, "Anna sells maps. "),
    ("passage", 8, "Fog came. Anna sells maps. Snow fell.\n\n"),
    ("passage", 6, "Nobody sells the green hats")])
def test_a_filtered_context_holds_what_suits_the_question_in_order(unit, room, left):
    context = "Fog came. Anna sells maps. Snow fell.\n\nNobody sells the green hats"
    row = {"instruction": "What maps does Anna sell? Snow", "context": context}
    found = tasks.filtered(row, unit, room, lambda text: len(text.split()))
    assert found == row | {"context": left}
