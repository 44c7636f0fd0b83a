"""support/data.py: rows of a data file, their splits, their encoding, what is no row."""
import json
from collections import defaultdict

import pytest
import torch

from model import Tokenizer
from support.data import Example, encode_row, examples, pad, read_rows
from support.options import add_data_arguments, chosen_example, command_parser, rows_from
from support.parsers import saliency_parser, train_parser


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
    found = examples(Letters(), sixty, "train", **asked)
    assert capsys.readouterr().out == (f"d.jsonl, train: {said}\n" if said else "")
    if said:
        assert said.startswith(f"{len(found)} rows")
    assert max(len(e.tokens) for e in found) <= asked.get("max_positions", 14)


def test_rows_without_a_response_are_counted(tmp_path, capsys):
    rows = [{"instruction": "q", "response": "a" * (i % 2)} for i in range(20)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(examples(Letters(), path, "train")) == 9
    assert capsys.readouterr().out == "d.jsonl, train: 9 rows; left out: 9 without a response\n"


def test_no_row_at_all_says_why(sixty):
    with pytest.raises(ValueError, match="no train row .*; left out: 54 shorter than --min-prompt"):
        examples(Letters(), sixty, "train", min_prompt=100)


def test_a_row_longer_than_the_models_positions_never_reaches_it(tmp_path, capsys):
    """The toy reads 2,048: the second row's prompt has as many, and then comes its response."""
    words = "The fog moved behind the green mirrors. " * 255 + "The fog moved behind"
    rows = [{"instruction": text, "response": "Clara sells cups."} for text in ("q", words, "r")]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    args = train_parser("", defaultdict(int)).parse_args(["--data", str(path)])
    found = rows_from(args, Tokenizer("toy"), "train")
    assert len(found) == 18 and max(len(e.tokens) for e in found) < 20
    told = "d.jsonl, train: 18 rows; left out: 9 longer than the model's 2,048 positions\n"
    assert capsys.readouterr().out == told


def test_a_response_given_by_hand_is_never_cut_in_silence():
    words = ["--prompt", "q", "--response", "Clara sells cups.", "--max-response"]
    parser, tokenizer = saliency_parser("", ("norm_gx",)), Tokenizer("toy")
    with pytest.raises(ValueError, match="--response has 4 tokens: --max-response 4 takes it"):
        chosen_example(parser.parse_args([*words, "3"]), tokenizer)
    example = chosen_example(parser.parse_args([*words, "4"]), tokenizer)
    assert len(example.tokens) == example.prompt_len + 4


def test_a_training_reads_whole_responses_and_what_measures_96_tokens():
    assert train_parser("", defaultdict(int)).parse_args([]).max_response is None
    parser = command_parser("")
    add_data_arguments(parser, limit=5)
    assert parser.parse_args([]).max_response == 96


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
