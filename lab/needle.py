"""A needle in a haystack: does one sentence survive in a long text, wherever it stands?

A sentence that gives a town a number is hidden in plain text, and the prompt asks for the number,
before the text or after it. What is measured is the likelihood of its digits, after the words of
the sentence: a model that finds the needle is nearly sure of each, one that lost it guesses.

    python -m lab.needle --ckpt qwen2.5-coder-0.5b --data wikitext2_valid.jsonl --png needle.png
    python -m lab.needle --lengths 1024 2048 --depths 0 50 100 --scorers full predictor recent

The scorers are those of lab.quality, --data is rows {text}. One cell of the picture is one length
and one depth: the probability of a digit, the geometric mean over --needles prompts. Prompts
already measured are kept in --rows-file: the same command goes on where it was stopped.

Shapes: N prompt tokens.
"""
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

from lab.figures import needle_maps
from lab.quality import Setup, check_lengths, identity, measure_rows, parse_arm
from lab.tables import called
from lab.tasks import Answer, Item
from model import Tokenizer
from support.data import digest, read_rows
from support.files import need
from support.options import (add_json_argument, add_pruning_arguments, add_quiet_argument,
                             add_template_arguments, at_least, cli, command_parser, output_file,
                             print_json, rows_file)
from support.saved import load_pruning, read_pruning
from support.templates import chosen_template, prompt_text

PLACES = ("first", "last")
TOWNS = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Vienna", "Dakar", "Lima")
FACT = "The secret number of {} is"
QUESTION = "What is the secret number of {}? Answer in one sentence."


# ----------------------------------------------------------------------------------------- prompts


def hidden(text, depth, sentence):
    """A text with a sentence put in, at the end of the sentence nearest before `depth` percent."""
    cut = len(text)
    if depth < 100:
        end = text.rfind(". ", 0, round(cut * depth / 100))
        cut = end + 2 if end >= 0 else 0
    before = text[:cut]
    space = "" if not before or before[-1].isspace() else " "
    return f"{before}{space}{sentence} {text[cut:]}".rstrip()


def needle_item(tokenizer, words, n, depth, place, draw, form):
    """One prompt of about n tokens -> Item; its answer counts from the number on.

    words: token ids of plain text; draw: a random.Random; form: template and system text.
    """
    town, number = draw.choice(TOWNS), draw.randrange(10000, 100000)
    fact = FACT.format(town)
    row = {"instruction": QUESTION.format(town), "context": f"{fact} {number}."}
    template, system = form
    bare = len(tokenizer.encode(prompt_text(row, template, place, system)))
    room = n - bare
    need(0 < room < len(words), f"a prompt of {n:,} tokens: the text has {len(words):,}, question "
                                f"and needle take {bare}")
    start = draw.randrange(len(words) - room)
    text = tokenizer.decode(words[start:start + room])
    row["context"] = hidden(text, depth, row["context"])
    prompt = tokenizer.encode(prompt_text(row, template, place, system))
    lead = tokenizer.encode(fact, bos=False)
    whole = tokenizer.encode(f"{fact} {number}", bos=False)
    need(whole[:len(lead)] == lead, "this tokenizer joins the number to the word before it")
    return Item(prompt, [Answer(whole, len(lead))])


def needle_items(tokenizer, path, cells, needles, form, seed):
    """An Item for every cell (question's place, length, depth) and needle, in this order."""
    words = []
    for row in read_rows(path, fields=("text",)):
        words += tokenizer.encode(row["text"].strip() + "\n", bos=False)
    items = []
    for place, n, depth in cells:
        for number in range(needles):
            # of the cell alone: other lengths and depths change nothing here
            draw = random.Random(f"{seed} {n} {depth} {number}")
            items.append(needle_item(tokenizer, words, n, depth, place, draw, form))
    return items


# ----------------------------------------------------------------------------------------- results


def cell_rows(done, cells, needles, arms):
    """What was measured -> a dict for every cell and arm.

    probability: of a digit, geometric mean; found: the share of numbers that are the model's own
    choice from the first digit to the last.
    """
    rows = []
    for i, (place, n, depth) in enumerate(cells):
        group = done[i * needles:(i + 1) * needles]
        for arm in arms:
            read = [row[arm]["answers"][0] for row in group]
            log_p = sum(value for value, _, _ in read) / sum(count for _, count, _ in read)
            rows.append({"scorer": arm, "question": place, "n": n, "depth": depth,
                         "probability": math.exp(log_p),
                         "found": sum(chosen for _, _, chosen in read) / needles,
                         "mean_keep": sum(row[arm]["keep"] for row in group) / needles})
    return rows


def summary(rows, arms):
    """For each place of the question, arm and length the mean over depths, a dict each."""
    found = []
    for place in dict.fromkeys(row["question"] for row in rows):
        for arm in arms:
            for n in dict.fromkeys(row["n"] for row in rows):
                these = [row for row in rows
                         if (row["question"], row["scorer"], row["n"]) == (place, arm, n)]
                found.append({"question": place, "scorer": arm, "n": n} | {
                    key: sum(row[key] for row in these) / len(these)
                    for key in ("probability", "found", "mean_keep")})
    return found


def show(rows, lengths):
    """A line for each place of the question and arm, a column for each length."""
    for place in dict.fromkeys(row["question"] for row in rows):
        heads = "".join(f"{n:>9,}" for n in lengths)
        print(f"\nprobability of a digit, question {place}\n{'':20}{heads}     kept")
        for arm in dict.fromkeys(row["scorer"] for row in rows):
            these = [row for row in rows if (row["question"], row["scorer"]) == (place, arm)]
            values = "".join(f"{row['probability']:9.2f}" for row in these)
            print(f"{arm:20}{values}  {these[0]['mean_keep']:7.1%}")


def draw(rows, path):
    """The cells as a picture, under the names that the tables have."""
    needle_maps([row | {"scorer": called(row["scorer"])} for row in rows], path)


# ------------------------------------------------------------------------------------ command line


def options():
    parser = command_parser(__doc__)
    add_pruning_arguments(parser)
    add_template_arguments(parser)
    parser.add_argument("--data", required=True, help="JSONL of plain text, rows {text}")
    parser.add_argument("--lengths", type=at_least(64), nargs="+", metavar="N",
                        default=(1024, 2048, 4096, 8192), help="tokens of the prompts")
    parser.add_argument("--depths", type=at_least(0), nargs="+", metavar="PERCENT",
                        default=(0, 25, 50, 75, 100), help="where the needle stands in the text")
    parser.add_argument("--question", choices=PLACES, nargs="+", default=PLACES,
                        help="before the text or after it")
    parser.add_argument("--needles", type=at_least(1), default=1, help="prompts in each cell")
    parser.add_argument("--scorers", nargs="+", help="see above (default: full, and what is "
                        "trained: in stages, in one cut; latest tokens)")
    parser.add_argument("--h2o", type=float, default=0.4, metavar="SHARE",
                        help="what +h2o and +local keep of every KV cache")
    parser.add_argument("--seed", type=int, default=0, help="draws texts, towns and numbers")
    parser.add_argument("--png", metavar="FILE", type=output_file, help="draw the cells")
    parser.add_argument("--rows-file", metavar="FILE", type=rows_file,
                        help="JSONL of the prompts measured so far (default: a file under "
                        "out/needle/ named after the command)")
    add_quiet_argument(parser)
    add_json_argument(parser)
    return parser


def main():
    args = options().parse_args()
    need(max(args.depths) <= 100, "--depths are percentages, 0 to 100")
    tokenizer = Tokenizer(args.ckpt)
    pruning = read_pruning(args)
    trained = pruning.predictors is not None
    arms = args.scorers or [*(["full", "predictor", "predictor@cut"] if trained else ["full"]),
                            "recent"]
    for name in arms:
        need(not name.startswith("oracle"), "the gradient oracle marks whole answers: not here")
        parse_arm(name, 1, args.h2o)
    template, system, _ = chosen_template(args, pruning.metadata)
    cells = [(place, n, depth) for n in args.lengths for place in args.question
             for depth in args.depths]
    items = needle_items(tokenizer, args.data, cells, args.needles, (template, system), args.seed)
    check_lengths(items, pruning.config.max_positions, 0)
    print(pruning.said(args))
    model, schedule, predictors, _ = load_pruning(args, pruning)
    prior = pruning.metadata.get("prior", 0.0)
    setup = Setup(model, schedule, predictors, prior, args.h2o)
    start, run = time.time(), identity(args, arms, setup, items[0])
    log = Path(args.rows_file or Path("out", "needle", f"{digest(run)}.jsonl"))
    done = measure_rows(setup, items, arms, log, run, args.quiet)
    rows = cell_rows(done, cells, args.needles, arms)
    show(summary(rows, arms), args.lengths)
    if args.png:
        draw(rows, args.png)
        print(f"wrote {args.png}")
    print_json(args, model, {"data": Path(args.data).name, "needles": args.needles,
                             "seconds": time.time() - start, "schedule": asdict(schedule),
                             "rows": rows})


if __name__ == "__main__":
    cli(main)
