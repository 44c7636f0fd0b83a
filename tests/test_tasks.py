"""How rows of a data set become prompts and answers, and how an answer in own words is scored."""
import json
import sys

import pytest

from lab import tasks
from lab.tasks import FORMATS
from model import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("toy")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------- multiple choice


def test_copa_is_one_sentence():
    row = {"premise": "The man ran.", "question": "cause", "choice1": "He was late.",
           "choice2": "It rained.", "label": 0}
    expected = [("", "  he was late."), ("", "  it rained.")]
    assert FORMATS["copa"](row) == ("The man ran because", expected, 0)
    effect = FORMATS["copa"]({**row, "question": "effect", "label": 1})
    assert effect == ("The man ran therefore", expected, 1)


def test_winogrande_scores_the_same_ending_after_either_name():
    row = {"sentence": "Ann asked Bea as _ was lost.", "option1": "Ann", "option2": "Bea",
           "answer": "2"}
    expected = [(" Ann", " was lost."), (" Bea", " was lost.")]
    assert FORMATS["winogrande"](row) == ("Ann asked Bea as", expected, 1)


@pytest.mark.parametrize("sentence, context, lead, scored", [
    ("_ asked Bea.", "", "Ann", " asked Bea."),
    ("Bea  asked  _  twice . ", "Bea  asked", "  Ann", " twice ."),
    ("So _ asked, and _ left.", "So", " Ann", " asked, and _ left."),
    ('Bea said "_\'s right".', 'Bea said "', "Ann", " 's right\"."),
])
def test_winogrande_fills_the_first_blank_and_keeps_the_space_before_it(sentence, context, lead,
                                                                        scored):
    row = {"sentence": sentence, "option1": "Ann", "option2": "Bea", "answer": "1"}
    assert FORMATS["winogrande"](row) == (context, [(lead, scored), (lead[:-3] + "Bea", scored)], 0)


def test_piqa_is_a_question():
    row = {"goal": "Do", "sol1": "a", "sol2": "b", "label": 1}
    assert FORMATS["piqa"](row) == ("Question: Do\nAnswer:", [("", " a"), ("", " b")], 1)


@pytest.mark.parametrize("label, gold", [(True, 1), ("true", 1), ("false", 0), (0, 0)])
def test_boolq_reads_labels_of_every_kind(label, gold):
    context, choices, found = FORMATS["boolq"]({"passage": "P.", "question": "q", "label": label})
    assert context == "P.\nQuestion: q?\nAnswer:"
    assert choices == [("", " no"), ("", " yes")] and found == gold


def test_lambada_asks_for_the_last_word():
    assert FORMATS["lambada"]({"text": "the end of it"}) == ("the end of", [("", " it")], 0)
    assert FORMATS["lambada"]({"text": "the end  it"}) == ("the end ", [("", " it")], 0)


def test_any_other_choice_begins_with_a_space():
    row = {"context": "c", "choices": ["a", " b", "\nc"], "label": 2}
    assert FORMATS["choice"](row) == ("c", [("", " a"), ("", " b"), ("", "\nc")], 2)


def test_few_shot_rows_are_never_scored(tokenizer, tmp_path):
    rows = [{"context": "The baker sells", "choices": [f"number {i}", "nothing"], "label": 0}
            for i in range(30)]
    path = jsonl(tmp_path / "c.jsonl", rows)
    items = tasks.choice_items(tokenizer, path, "choice", 100, 2, seed=0)
    assert len(items) == 20         # ten are set apart
    texts = [tokenizer.decode(item.prompt) for item in items]
    assert texts[3].count("sells") == 3 and items[3].gold == 0
    drawn = set()
    for text in texts:
        drawn |= {int(part.split()[0]) for part in text.split("number")[1:]}
    assert drawn <= set(range(20, 30)) and len(drawn) > 3
    fewer = tasks.choice_items(tokenizer, path, "choice", 5, 2, seed=0)
    assert fewer == items[:5]       # a larger limit changes no earlier row


def test_only_the_ending_counts(tokenizer, tmp_path):
    rows = [{"sentence": "Clara asked Peter as _ was near.", "option1": "Clara",
             "option2": "Peter", "answer": "2"}]
    path = jsonl(tmp_path / "w.jsonl", rows * 11)
    item, = tasks.choice_items(tokenizer, path, "winogrande", 5, 0, seed=0)
    for answer, name in zip(item.answers, ("Clara", "Peter"), strict=True):
        lead, counted = answer.tokens[:answer.start], answer.tokens[answer.start:]
        assert tokenizer.decode(item.prompt + lead) == f"Clara asked Peter as {name}"
        whole = tokenizer.decode(item.prompt + lead + counted)
        assert whole == f"Clara asked Peter as {name} was near."
        assert counted and answer.n_chars == len("was near.")
    assert item.gold == 1


class Letters:
    """A tokenizer of one token a character; `begin` stands before a text, where there is one."""

    def __init__(self, begin=None, prefix=None):
        self.begin, self.prefix = begin, prefix

    def encode(self, text, bos=True):
        begin = [self.begin] if bos and self.begin is not None else []
        return begin + [ord(c) for c in text]


SENTENCES = ("_ asked Bea.", "Bea asked _ twice.", "Bea  asked  _ , and _ left.", 'So "_\'s" Ann')


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("kind", ["toy", "letters"])
def test_a_choice_is_scored_as_lm_evaluation_harness_does(tokenizer, sentence, kind):
    """Of the whole text's tokens those count that come after as many as the context alone has."""
    encode = (tokenizer if kind == "toy" else Letters(begin=1)).encode
    row = {"sentence": sentence, "option1": "Ann", "option2": "Bea", "answer": "1"}
    item = tasks.choice_item(tokenizer if kind == "toy" else Letters(begin=1),
                             FORMATS["winogrande"](row))
    before, after = sentence.split("_", 1)
    for name, answer in zip(("Ann", "Bea"), item.answers, strict=True):
        whole = encode(before + name + " " + after.strip())
        assert item.prompt + answer.tokens == whole
        assert answer.tokens[answer.start:] == whole[len(encode(before + name)):]


def test_a_space_before_a_choice_counts_with_it():
    item = tasks.choice_item(Letters(begin=1), FORMATS["lambada"]({"text": "the end  it"}))
    assert item.prompt == Letters(begin=1).encode("the end")
    assert item.answers == [(Letters().encode("  it"), 0, 2)]


def test_the_length_of_a_choice_is_in_characters():
    """As lm-evaluation-harness counts them; the two spaces of COPA are one and its choice's."""
    piqa = FORMATS["piqa"]({"goal": "g", "sol1": "caf\u00e9 \u2019", "sol2": " b", "label": 0})
    copa = FORMATS["copa"]({"premise": "It was.", "question": "cause", "choice1": "\u00c9t\u00e9.",
                            "choice2": "It rained.", "label": 0})
    lengths = [[answer[2] for answer in tasks.choice_item(Letters(begin=1), choice).answers]
               for choice in (piqa, copa)]
    assert lengths == [[6, 2], [5, 11]]


def test_an_empty_context_begins_with_the_prefix_or_names_its_row(tmp_path):
    rows = [{"context": "c", "choices": ["a", "b"], "label": 0}] * 12
    rows[1] = {"context": "", "choices": ["a", "b"], "label": 1}
    path = jsonl(tmp_path / "e.jsonl", rows)
    items = tasks.choice_items(Letters(prefix=7), path, "choice", 5, 0, seed=0)
    assert items[0].prompt == [ord("c")] and items[1].prompt == [7]
    assert [answer[:2] for answer in items[1].answers] == [([32, 97], 0), ([32, 98], 0)]
    with pytest.raises(ValueError, match="e.jsonl, row 2: its prompt is empty"):
        tasks.choice_items(Letters(), path, "choice", 5, 0, seed=0)
    begun = tasks.choice_items(Letters(begin=1, prefix=1), path, "choice", 5, 0, seed=0)
    assert begun[1].prompt == [1]


def test_rows_set_apart_are_said(tokenizer, tmp_path, capsys):
    row = {"context": "a", "choices": ["b"], "label": 0}
    path = jsonl(tmp_path / "x.jsonl", [row] * 12)
    tasks.choice_items(tokenizer, path, "choice", 5, 0, 0)
    told = "x.jsonl, 12 rows; left out: 10 set apart for few-shot examples\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("task, rows, message", [
    ("piqa", [{"goal": "g"}] * 30, "row 1: not a row of piqa"),
    ("winogrande", [{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}] * 20,
     "row 1: not a row of winogrande"),
    ("choice", [{"context": "a", "choices": ["b"], "label": k} for k in (0, 1)] * 20,
     "row 2: not a row of choice"),
    ("choice", [{"context": 3, "choices": ["b"], "label": 0}] * 20, "row 1: not a row of choice"),
    ("choice", [{"context": "a", "choices": ["b"], "label": 0}] * 9, "too few"),
])
def test_rows_that_do_not_fit_are_named(tokenizer, tmp_path, task, rows, message):
    path = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        tasks.choice_items(tokenizer, path, task, 5, 0, 0)


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
