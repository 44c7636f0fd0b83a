"""support/data.py: rows of a data file, their splits, their encoding, what is no row."""
import json

import pytest
import torch

from support.data import Example, encode_row, examples, pad, read_rows


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text, bos=True):
        return [1] * bos + [ord(c) for c in text]


def write_rows(path, n):
    """Rows q00, q01, ... with contexts of 0, 1 and 2 letters in turn."""
    rows = [{"instruction": f"q{i:02d}", "context": "c" * (i % 3), "response": "answer"}
            for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sixty(tmp_path):
    return write_rows(tmp_path / "d.jsonl", 60)


def test_splits(sixty):
    everything = read_rows(sixty)
    assert len(everything) == 60
    assert read_rows(sixty, "train") == everything[:54]
    # the others have the context of a training row
    assert read_rows(sixty, "heldout") == everything[54:55]
    assert read_rows(sixty, "validation") == everything[57:58]


def test_encoding_of_a_row(sixty):
    row = read_rows(sixty, "train")[2]
    example = encode_row(Letters(), row, max_response=3)
    assert example.prompt_len == 1 + len("q02\n\ncc")
    assert len(example.tokens) == example.prompt_len + 3


def test_examples_of_a_length(sixty):
    found = examples(Letters(), sixty, "train", min_prompt=7, max_prompt=7, context=True)
    assert [e.prompt_len for e in found] == [7] * 18
    with pytest.raises(ValueError, match="no train row"):
        examples(Letters(), sixty, "train", min_prompt=100)


def test_a_batch_is_padded_on_the_right():
    rows = [Example(torch.tensor([5, 6, 7]), 2), Example(torch.tensor([8]), 1)]
    tokens, prompt_len, lengths = pad(rows, "cpu")
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert prompt_len == [2, 1]
    assert lengths == [3, 1]


LONG = '{"instruction": "a", "response": "' + "b" * 1000001 + '"}'
NO_ROW = {      # a line that is no row, what the message says
    "cut": (b'{"instruction": ', "not valid JSON"),
    "list": (b"[1]", "expected a JSON object"),
    "no response": (b'{"instruction": "a"}', "'response' is missing or not text"),
    "number": (b'{"instruction": "a", "response": "b", "context": 5}',
               "'context' is missing or not text"),
    "surrogate": (b'{"instruction": "\\ud800", "response": "b"}', "not valid JSON"),
    "no UTF-8": (b'{"instruction": "\xff", "response": "b"}',
                 "not valid JSON .*can't decode byte 0xff"),
    "deep": (b"[" * 100000, "not valid JSON"),
    "long": (LONG.encode(), "'response' has more than 1,000,000 characters"),
}


@pytest.mark.parametrize("fault", NO_ROW)
def test_malformed_line_is_named(tmp_path, fault):
    line, message = NO_ROW[fault]
    path = write_rows(tmp_path / "d.jsonl", 2)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=f"line 3: {message}") as e:
        read_rows(path)
    assert str(e.value).startswith(f"{path}, ")
