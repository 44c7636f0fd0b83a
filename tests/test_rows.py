"""support/rows.py: rows of a data file, their splits, their encoding, what is no row."""
import json

import pytest
import torch

from conftest import TOY
from support.chat import choose_chat
from support.rows import digest, encode_row, examples, read_rows, row_at

PLAIN = choose_chat(TOY, "plain")


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text, bos=True):
        return [1] * bos + [ord(c) for c in text]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sixty(tmp_path):
    """Rows q00, q01, ... with contexts of 0, 1 and 2 letters in turn."""
    return write_rows(tmp_path / "d.jsonl", [
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
    assert example.tokens.tolist() == [1, *map(ord, "q02\n\nccans")]
    assert example.prompt_len == 1 + len("q02\n\ncc")
    last = encode_row(Letters(), row, PLAIN, question="last")
    assert last.tokens.tolist() == [1, *map(ord, "cc\n\nq02answer")]


LOST = [        # what is asked for, what is said of it; prompts have 4, 7 or 8 tokens
    ({}, ""),
    ({"min_prompt": 7}, "36 rows; left out: 18 shorter than --min-prompt 7"),
    ({"max_prompt": 7}, "36 rows; left out: 18 longer than --max-prompt 7"),
    ({"context": True, "max_prompt": 7},
     "18 rows; left out: 18 without a context, 18 longer than --max-prompt 7"),
    ({"max_positions": 13}, "36 rows; left out: 18 longer than the model's 13 positions"),
    ({"max_positions": 13, "max_response": 5}, "54 rows; 54 responses cut to 5 tokens"),
    ({"max_response": None, "limit": 3}, ""),
    ({"max_response": 2, "limit": 3}, "3 rows; 3 responses cut to 2 tokens"),
]


@pytest.mark.parametrize("asked, said", LOST)
def test_what_is_left_out_or_cut_is_said_in_one_line(sixty, capsys, asked, said):
    given = {"max_response": None, **asked}
    found = examples(Letters(), sixty, "train", PLAIN, **given)
    assert capsys.readouterr().out == (f"d.jsonl, train: {said}\n" if said else "")
    assert not said or said.startswith(f"{len(found)} rows")
    assert max(len(example.tokens) for example in found) <= asked.get("max_positions", 14)


def test_rows_without_a_response_are_counted_and_no_row_at_all_says_why(tmp_path, sixty, capsys):
    path = write_rows(tmp_path / "e.jsonl", [{"instruction": "q", "response": "a" * (i % 2)}
                                             for i in range(20)])
    assert len(examples(Letters(), path, "train", PLAIN)) == 9
    assert capsys.readouterr().out == "e.jsonl, train: 9 rows; left out: 9 without a response\n"
    with pytest.raises(ValueError, match="no train row .*; left out: 54 shorter than --min-prompt"):
        examples(Letters(), sixty, "train", PLAIN, min_prompt=100)


NO_ROW = {      # a line that is no row, what the message says
    "cut": (b'{"instruction": ', "not valid JSON"),
    "list": (b"[1]", "expected a JSON object"),
    "no response": (b'{"instruction": "a"}', "'response' is missing or not text"),
    "number": (b'{"instruction": "a", "response": "b", "context": 5}',
               "'context' is missing or not text"),
    "surrogate": (b'{"instruction": "\\ud800", "response": "b"}', "not valid JSON"),
    "no UTF-8": (b'{"instruction": "\xff", "response": "b"}', "not valid JSON"),
    "deep": (b"[" * 100000, "not valid JSON"),
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
