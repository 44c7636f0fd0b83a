"""lab/needle.py: where the needle stands, what its answer counts, and the cells of the table."""
import json
import random

import pytest

from conftest import command
from lab.needle import cell_rows, hidden, needle_items, summary
from model import Tokenizer

TEXT = "One ends here. Two ends here. Three ends here. Four ends here."


@pytest.fixture(scope="module")
def plain_text(tmp_path_factory):
    """2,000 sentences without a number."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.jsonl"
    words = "harbour lantern copper meadow violin granite saddle orchard thunder".split()
    lines = []
    for _ in range(100):
        text = " ".join(f"The {draw.choice(words)} saw a {draw.choice(words)}." for _ in range(20))
        lines.append(json.dumps({"text": text}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("depth, before", [
    (0, ""), (10, ""), (30, "One ends here."), (60, "One ends here. Two ends here."),
    (100, TEXT)])
def test_a_needle_stands_between_sentences(depth, before):
    text = hidden(TEXT, depth, "NEEDLE.")
    assert text.split("NEEDLE.")[0].strip() == before
    assert text.replace("NEEDLE.", "").split() == TEXT.split()


@pytest.mark.parametrize("place", ["first", "last"])
def test_prompts_hold_the_number_once_at_their_depth(plain_text, place):
    tokenizer = Tokenizer("toy")
    cells = [(place, n, depth) for n in (400, 800) for depth in (0, 50, 100)]
    items = needle_items(tokenizer, plain_text, cells, 2, ("plain", None), 0)
    assert len(items) == 2 * len(cells)
    for item, (_, n, depth) in zip(items, [cell for cell in cells for _ in range(2)]):
        text = tokenizer.decode(item.prompt)
        answer, = item.answers
        number = tokenizer.decode(answer.tokens[answer.start:])
        assert number.strip().isdigit() and len(number.strip()) == 5
        assert text.count(number.strip()) == 1
        assert abs(len(item.prompt) - n) <= 0.05 * n
        assert (text.index("What is") < text.index(number.strip())) == (place == "first")
        stands = text.index("The secret number") / len(text)
        assert abs(stands - depth / 100) < 0.2


def test_a_cell_does_not_change_with_its_company(plain_text):
    tokenizer, form = Tokenizer("toy"), ("plain", None)
    alone = needle_items(tokenizer, plain_text, [("last", 400, 50)], 1, form, 3)
    among = needle_items(tokenizer, plain_text, [("first", 300, 0), ("last", 400, 50)], 2, form, 3)
    assert alone[0] == among[2] != among[3]


def test_cells_and_their_means():
    cells = [("last", 100, 0), ("last", 100, 100)]

    def row(log_p, chosen):
        return {"full": {"answers": [[log_p, 5, chosen]], "keep": 1.0}}

    rows = cell_rows([row(-1.0, True), row(-9.0, False), row(0.0, True), row(0.0, True)], cells, 2,
                     ["full"])
    assert [round(cell["probability"], 6) for cell in rows] == [0.367879, 1.0]
    assert [cell["found"] for cell in rows] == [0.5, 1.0]
    mean, = summary(rows, ["full"])
    assert mean["found"] == 0.75 and round(mean["probability"], 6) == 0.683940


def test_the_command_goes_on_and_draws(plain_text, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["-m", "lab.needle", "--data", plain_text, "--lengths", 300, "--depths", 0, 100,
             "--rows-file", tmp_path / "rows.jsonl", "--png", tmp_path / "n.png", "--json"]
    code, out, err = command(*words)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["question"] for row in rows[::4]] == ["first", "first", "last", "last"]
    assert {row["scorer"] for row in rows} == {"full", "predictor", "predictor@cut", "recent"}
    assert (tmp_path / "n.png").stat().st_size > 5000
    code, again, said = command(*words)
    assert "4 rows are in" in again + said
    assert json.loads(again.splitlines()[-1])["rows"] == rows


@pytest.mark.parametrize("words, line", [
    (["--depths", 101], "--depths are percentages"),
    (["--scorers", "oracle:norm_gx"], "marks whole answers"),
    (["--lengths", 100000], "the text has"),
])
def test_what_cannot_be_hidden_is_refused(plain_text, words, line):
    code, _, err = command("-m", "lab.needle", "--data", plain_text, *words)
    assert code == 1 and line in err and "Traceback" not in err
