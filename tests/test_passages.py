"""lab/passages.py: a question among passages, and rows whose splits are those of the reader."""
import json
import random

import pytest

from conftest import command
from lab.passages import asks, divided, gather, left_plain, named, numbered
from support.data import read_rows

WORDS = "harbour lantern copper meadow violin granite saddle orchard thunder parcel".split()


@pytest.fixture(scope="module")
def dolly(tmp_path_factory):
    """300 rows; each asks for a place that its own context alone names."""
    path = tmp_path_factory.mktemp("dolly") / "dolly.jsonl"
    rows = []
    for i in range(300):
        text = f"Town{i:04} has a {WORDS[i % 10]}. " + f"It is known for number {i}. " * 30
        rows.append({"instruction": f"What does Town{i:04} have?", "context": text,
                     "response": f"A {WORDS[i % 10]}.", "category": "closed_qa"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(dolly, tmp_path, *words):
    out = tmp_path / "rows.jsonl"
    code, _, err = command("-m", "lab.passages", "--data", dolly, "--out", out, *words)
    assert code == 0, err
    return out


def test_every_row_has_its_own_passage_at_its_place(dolly, tmp_path):
    rows = read_rows(made(dolly, tmp_path))
    for row in rows:
        parts = row["context"].split("\n\n")
        assert len(parts) == 4
        assert parts[row["place"] - 1] == f"Passage {row['place']}: {row['passage']}"
        town = row["instruction"].split()[2]
        assert [town in part for part in parts].count(True) == 1
    assert {row["place"] for row in rows} == {1, 2, 3, 4}


def test_no_passage_stands_in_two_splits(dolly, tmp_path):
    path, seen, sizes = made(dolly, tmp_path), [], []
    for split in ("train", "heldout", "validation"):
        rows = read_rows(path, split)
        sizes.append(len(rows))
        seen.append({part.split(": ", 1)[1] for row in rows
                     for part in row["context"].split("\n\n")})
    m = sizes[1]
    assert sizes == [18 * m, m, m] and m > 5
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_the_same_rows_with_a_part_alone(dolly, tmp_path):
    whole = read_rows(made(dolly, tmp_path))
    assert whole == read_rows(made(dolly, tmp_path)), "a seed draws the same rows"
    assert whole != read_rows(made(dolly, tmp_path, "--seed", 1))
    for part in ("passage", "question"):
        rows = read_rows(made(dolly, tmp_path, "--alone", part))
        assert [row["instruction"] for row in rows] == [row["instruction"] for row in whole]
        assert [row["context"] for row in rows] \
            == [row["passage"] if part == "passage" else "" for row in whole]


def test_a_share_of_the_training_rows_stays_plain():
    rows = [{"context": "several", "passage": "own"}] * 8
    found = [row["context"] for row in left_plain(rows, 0.25)]
    assert found == ["several", "several", "several", "own"] * 2
    assert left_plain(rows, 0) == rows


def test_questions_that_only_point_are_left_out():
    row = {"instruction": "Who built Rome?", "context": "x" * 400, "category": "closed_qa"}
    assert asks(row)
    assert not asks(row | {"instruction": "Who is named in the passage?"})
    assert not asks(row | {"category": "summarization"})
    assert not asks(row | {"context": "x" * 299}) and not asks(row | {"context": ""})


def test_another_passage_that_names_as_much_is_not_drawn():
    own = "Rome was built by Romulus. " * 30
    row = {"instruction": "Who built Rome?", "context": own}
    assert named(row["instruction"], own) == 2
    same, other = "Someone built Rome again. " * 30, "The harbour is cold today. " * 30
    assert gather(row, [same, own.strip()], 2, random.Random(0)) is None
    texts = gather(row, [same] + [other + str(i) for i in range(9)], 3, random.Random(0))
    assert same not in texts and own.strip() in texts and len(texts) == 3
    assert numbered(["a", "b"]) == "Passage 1: a\n\nPassage 2: b"


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="too few rows"):
        divided({"train": [1] * 17, "heldout": [1], "validation": [1]}, None)
