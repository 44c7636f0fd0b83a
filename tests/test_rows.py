"""support/rows.py: rows of a data file, their splits, their encoding, what is no row."""
import json

import pytest
import torch

from conftest import TOY, jsonl
from support.chat import choose_chat, render
from support.rows import PARTS, digest, encode_row, examples, read_rows, row_at

PLAIN, CHATML = choose_chat(TOY, "plain"), choose_chat(TOY, "chatml")


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text, bos=True):
        return [1] * bos + [ord(c) for c in text]


@pytest.fixture
def sixty(tmp_path):
    """Rows q00, q01, ... with contexts of 0, 1 and 2 letters in turn."""
    return jsonl(tmp_path / "d.jsonl", [
        {"instruction": f"q{i:02d}", "context": "c" * (i % 3), "response": "answer"}
        for i in range(60)])


def test_splits(sixty):
    everything = read_rows(sixty)
    assert len(everything) == 60
    assert read_rows(sixty, "train") == everything[:54]
    # the others have the context of a training row
    assert read_rows(sixty, "heldout") == everything[54:55]
    assert read_rows(sixty, "validation") == everything[57:58]


def test_encoding_of_a_row(sixty):
    row = read_rows(sixty, "train")[2]
    example = encode_row(Letters(), row, PLAIN, max_response=3)
    assert example.tokens.tolist() == [1, *map(ord, "q02\n\ncc\nans")], "the answer has a line"
    assert example.prompt_len == 1 + len("q02\n\ncc\n")
    last = encode_row(Letters(), row, PLAIN, question="last")
    assert last.tokens.tolist() == [1, *map(ord, "cc\n\nq02\nanswer")]


LOST = [        # what is asked for, what is said of it; prompts have 5, 8 or 9 tokens
    ({}, ""),
    ({"min_prompt": 8}, "36 rows; left out: 18 shorter than --min-prompt 8"),
    ({"context": True, "max_prompt": 8},
     "18 rows; left out: 18 without a context, 18 longer than --max-prompt 8"),
    ({"max_positions": 14}, "36 rows; left out: 18 longer than the model's 14 positions"),
    ({"max_positions": 14, "max_response": 5}, "54 rows; 54 responses cut to 5 tokens"),
    ({"max_response": 2, "limit": 3}, "3 rows; 3 responses cut to 2 tokens"),
]


@pytest.mark.parametrize("asked, said", LOST)
def test_what_is_left_out_or_cut_is_said_in_one_line(sixty, capsys, asked, said):
    given = {"max_response": None, **asked}
    found = examples(Letters(), sixty, "train", PLAIN, **given)
    assert capsys.readouterr().out == (f"d.jsonl, train: {said}\n" if said else "")
    assert not said or said.startswith(f"{len(found)} rows")
    assert max(len(example.tokens) for example in found) <= asked.get("max_positions", 15)


def test_no_row_at_all_says_why(sixty):
    with pytest.raises(ValueError, match="no train row .*; left out: 54 shorter than --min-prompt"):
        examples(Letters(), sixty, "train", PLAIN, min_prompt=100)


HOW = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
       {"role": "assistant", "content": "Hello"}]
WHO = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna"}]
FORMS = {       # a row in its file, what is read of it
    "Alpaca": ({"instruction": "a", "input": "b", "output": "c", "text": "abc"}, ("a", "b", "c")),
    "Alpaca, mixed": ({"instruction": "a", "input": "b", "response": "c"}, ("a", "b", "c")),
    "Alpaca, no input": ({"instruction": "a", "output": "c"}, ("a", None, "c")),
    "chat": ({"messages": [*HOW, *WHO, HOW[1]]}, ("Who?", None, "Anna")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", [
    lambda rows: "\n".join(map(json.dumps, rows)), lambda rows: json.dumps(rows, indent=1),
    lambda rows: "\ufeff" + "\r\n".join(map(json.dumps, rows))], ids=["lines", "array", "mark"])
def test_forms_of_rows_and_files(form, write, tmp_path):
    told, want = FORMS[form]
    (tmp_path / "d.json").write_bytes(write([told, told]).encode())
    rows = read_rows(tmp_path / "d.json")
    assert [[row.get(name) for name in PARTS] for row in rows] == [list(want)] * 2
    assert rows[0].get("before", []) == (HOW if form == "chat" else [])


def test_earlier_turns_stand_in_the_prompt(tmp_path):
    row, = read_rows(jsonl(tmp_path / "d.jsonl", [{"messages": HOW + WHO}]))
    example = encode_row(Letters(), row, CHATML)
    prompt = Letters().encode(render(CHATML, "Who?", HOW))
    assert example.tokens.tolist() == [*prompt, *map(ord, "Anna")]
    assert example.prompt_len == len(prompt)


def test_rows_without_a_response_and_texts_that_nobody_reads_are_named(tmp_path, capsys):
    rows = [{"instruction": f"q{i}", "passage": "p", "hint": "h" * (i % 2), "input": "",
             "number": 5, "response": "a" * (i % 3)} for i in range(20)]
    examples(Letters(), jsonl(tmp_path / "d.jsonl", rows), "train", PLAIN)
    assert capsys.readouterr().out == ("d.jsonl, train: 12 rows; left out: 6 without a response; "
                                       "9 rows whose 'hint' is not read\n")


def test_rows_of_an_earlier_split_are_left_out_and_that_is_said(tmp_path, capsys):
    """Without a context those whose question and earlier turns are both the same."""
    same, *others = ({"messages": turns} for turns in (HOW + WHO, WHO, [*HOW, HOW[1], WHO[1]]))
    path = jsonl(tmp_path / "d.jsonl", [same] * 54 + others + [same] * 4)
    assert len(examples(Letters(), path, "heldout", CHATML)) == 2
    assert capsys.readouterr().out == ("d.jsonl, heldout: 2 rows; left out: 1 with the text of a "
                                       "row of an earlier split\n")
    with pytest.raises(ValueError, match="no validation row .*; left out: 3 with the text of a"):
        examples(Letters(), path, "validation", CHATML)


@pytest.mark.parametrize("n, split", [(1, "train"), (9, "validation")])
def test_a_file_that_is_too_small_says_so(n, split, tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"instruction": "q", "response": "a"}] * n)
    with pytest.raises(ValueError, match=f"d.jsonl: too few rows, {n}, for any {split} ones"):
        read_rows(path, split)


NO_ROW = {      # a line that is no row, what the message says
    "cut": (b'{"instruction": ', "not valid JSON"),
    "list": (b"[1]", "expected a JSON object"),
    "no response": (b'{"instruction": "a"}', "'response' is missing or not text"),
    "number": (b'{"instruction": "a", "response": "b", "context": 5}',
               "'context' is missing or not text"),
    "surrogate": (b'{"instruction": "\\ud800", "response": "b"}', "not valid JSON"),
    "no UTF-8": (b'{"instruction": "\xff", "response": "b"}', "not valid JSON"),
    "deep": (b"[" * 100000, "not valid JSON, expected one object a line or an array"),
    **{f"turns {turns}": (json.dumps({"messages": turns}).encode(), "messages are not turns")
       for turns in (WHO[:1], WHO[1:], HOW[:1] + WHO[1:], [5],
                     [WHO[0], {"role": "assistant", "content": ["x"]}])},
}


@pytest.mark.parametrize("fault", NO_ROW)
def test_a_malformed_line_is_named(sixty, fault):
    line, message = NO_ROW[fault]
    sixty.write_bytes(sixty.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=f"line 61: {message}") as e:
        read_rows(sixty)
    assert str(e.value).startswith(f"{sixty}, ")


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own():
    epochs = [[row_at(20 * epoch + i, 20, seed=3) for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert epochs[0] != [row_at(i, 20, seed=4) for i in range(20)]


def test_a_digest_tells_tokens_and_weights_apart(sixty):
    rows = examples(Letters(), sixty, "train", PLAIN, limit=3)
    other = [rows[0]._replace(prompt_len=2), *rows[1:]]
    layer = torch.nn.Linear(2, 2)
    before = digest(layer)
    with torch.no_grad():
        layer.bias[1] += 1
    assert len({digest(rows), digest(other), digest(rows[:2]), before, digest(layer)}) == 5
    assert digest(rows) == digest(list(rows))
