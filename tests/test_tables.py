"""The generated tables: cells, rows, pages, and that both pages say what results/ says."""
import json
import re
import sys

import pytest

from conftest import ROOT
from lab import tables


def measured(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def row(scorer, value=1.0, **more):
    """A row of a result, as lab/quality.py and lab/ablations.py write it."""
    return {"scorer": scorer, "metric": "nll", "group": "", "value": value, "stderr": 0.5, "n": 7,
            "mean_keep": 0.65, **more}


# ----------------------------------------------------------------------------------- the two pages


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_pages_say_what_results_says(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.render(text, page) == text, "run python -m lab.tables"


def test_every_table_stands_on_one_page():
    """The README carries three, docs/results.md all others."""
    markers = {page: re.findall(r"<!-- table (\w+) -->", (ROOT / page).read_text(encoding="utf-8"))
               for page in tables.PAGES}
    short = ["equations", "quality", "speed"]
    assert sorted(markers["docs/results.md"]) == sorted(set(tables.TABLES) - set(short))
    assert sorted(markers["README.md"]) == short


def test_the_results_page_links_what_is_there():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)#]+)\)", text))
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
    pictures = {f"../results/{path.name}" for path in ROOT.glob("results/smollm2_*.png")}
    assert pictures <= links
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_every_measured_file_is_behind_a_table_or_a_picture():
    behind = {file for table in tables.TABLES.values() for file in table.files}
    drawn = {"smollm2_training", "smollm2_figure2", "smollm2_cost_cpu", "qwen05_needle",
             "smollm2_passage_alone", "smollm2_question_alone"}       # two are quoted
    assert behind | drawn == {path.stem for path in ROOT.glob("results/*.json")}


# ------------------------------------------------------------------------------------- small pieces


def test_cells():
    assert tables.plus(1.23456, 0.0004) == "1.235 ± 0.000"
    assert tables.percent(-0.084, 0.061) == "-8% ± 6%"
    assert tables.points(0.5256, 0.029) == "52.6 ± 2.9"
    assert tables.share(row("prior", share_of_gap=0.56, share_stderr=0.03)) == "56% ± 3%"
    assert tables.share(row("full")) == "100%" and tables.share(row("random")) == "0%"


def test_markdown_escapes_what_would_end_a_cell():
    assert tables.markdown(["a", "b"], [["|g . x|", 2]]) == (
        "| a | b |\n| --- | --- |\n| \\|g . x\\| | 2 |")


def test_commands_are_named_as_today_and_nothing_else_changes():
    renamed = tables.renamed
    assert renamed("python eval.py --limit 2") == "python -m lab.quality --limit 2"
    assert renamed("python study.py --table open") == "python -m lab.ablations --table open"
    assert renamed("python infer.py --ckpt smollm2 --bench 512 --vs transformers") == (
        "python -m lab.speed --ckpt smollm2 --lengths 512 --vs transformers")
    for same in ("python infer.py --bench 512", "python checkpoints/toy.py --eval 5"):
        assert renamed(same) == same
    for name in ("eval", "study"):
        assert f"python {name}.py" not in (ROOT / "docs" / "results.md").read_text()


def test_a_source_line_names_command_files_time_hardware_and_commit():
    one = {"command": "python eval.py --json", "commit": "abc", "hardware": "a CPU",
           "dtype": "float32", "seconds": 30}
    assert tables.source(["x"], [one]) == (
        "`python -m lab.quality --json` ([x.json](results/x.json); "
        "30 s on a CPU, float32; commit abc)")
    other = {**one, "command": "python eval.py --more", "dtype": "bfloat16", "seconds": 90}
    assert tables.source(["x", "y"], [one, other], "../") == (
        "`python -m lab.quality --json` and the like ([x.json](../results/x.json), "
        "[y.json](../results/y.json); 2 min on a CPU, float32, bfloat16; commit abc)")
    del one["seconds"]
    assert "; a CPU, float32;" in tables.source(["x"], [one])


def test_a_missing_result_is_named():
    with pytest.raises(ValueError, match="nothing_here.json: not measured yet"):
        tables.result("nothing_here")


# ------------------------------------------------------------------------------------------- rows


def test_the_equations_point_at_their_lines():
    head, rows = tables.equations()
    assert [cells[0].split(",")[0] for cells in rows] == [f"Eq. {n}" for n in range(1, 9)]
    for number, (_, where) in enumerate(rows, start=1):
        file, line, link, name = re.fullmatch(
            r"\[(\w+\.py), line (\d+)\]\((.+)\), `([\w.]+)`", where).groups()
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert link == f"{file}#L{line}"
        assert lines[int(line) - 1].endswith(f"  # Eq. {number}")
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", "\n".join(lines[:int(line)]))


def test_around_names_classes_and_functions_from_the_outside():
    text = "class A:\n    def f(self):\n        def g():\n            pass\n\n    x = 1\n\ny = 2\n"
    assert [tables.around(text, line) for line in (4, 6, 8)] == ["A.f.g", "A", ""]


def test_every_scorer_best_first():
    found = measured("smollm2_nll")
    head, rows = tables.every_scorer(found)
    assert len(rows) == len(found["rows"]) == 12 and rows[0][0] == "full model"
    values = [float(cells[1].split()[0]) for cells in rows]
    assert values == sorted(values)
    assert [cells[3] for cells in rows if cells[0] in ("full model", "random")] == ["100%", "0%"]


def test_answers_have_a_column_for_each_length():
    found = measured("smollm2_passages"), measured("qwen05_passages")
    head, rows = tables.answers(*found, titles=("A", "B"), only=("predictor", "recent@cut"))
    assert head[:2] == ["kept by", "A, 1 to 24 tokens (23 rows)"]
    assert head[-1] == "B, 65 tokens or more (18 rows)" and len(head) == 7
    assert [cells[0] for cells in rows] == [
        "**trained predictors**", "latest tokens, one early cut", "*NLL per token: random*",
        "*NLL per token: full model*"]
    assert rows[1][-1] == "" and "%±" in rows[1][1]     # the second has not measured it
    for one in found:
        assert sum(group["n"] for group in one["by_answer"]) == 65


def test_peers_are_named_and_cost_what_they_hold():
    found = {"rows": [row("Knorm", 2.0, share_of_gap=0.5, share_stderr=0.1, predictor_ahead=0.25,
                          predictor_ahead_stderr=0.01),
                      row("predictor", 1.5, share_of_gap=0.75, share_stderr=0.2)],
             "costs": [{"scorer": name, "kv_bytes": 2.5e6, "prefill_s": seconds}
                       for name, seconds in (("Knorm", 2.0), ("predictor", 1.254))]}
    assert tables.peers(found)[1] == [
        ["**trained predictors**", "1.500 ± 0.500", "75% ± 20%", "", "2.5", "1.25"],
        ["kvpress, Knorm", "2.000 ± 0.500", "50% ± 10%", "+25% ± 1%", "2.5", "2.00"]]


def test_seeds_have_a_mean_and_a_deviation():
    found = [{"rows": [row(name, share_of_gap=share, share_stderr=0.05)
                       for name in ("predictor", "neighbours")]} for share in (0.5, 0.6)]
    head, rows = tables.seeds(*found)
    assert head == ["seed", "**trained predictors**", "trained predictors + neighbours"]
    assert rows[0] == [0, "50% ± 5%", "50% ± 5%"]
    assert rows[2] == ["mean", *["55%, standard deviation 7%"] * 2]


def test_shares_on_several_sets_of_rows():
    files = "smollm2_rules", "smollm2_passages"
    found = [measured(file) for file in files]
    head, rows = tables.shares(*found, titles=("A", "B"))
    assert head == ["kept by", "A (60 rows)", "B (65 rows)"]
    assert rows[-1][0] == "*NLL per token: full model*" and rows[-2][0].endswith("random*")
    first = [int(cells[1].split("%")[0]) for cells in rows[:-2] if cells[1]]
    assert first == sorted(first, reverse=True)
    by = {cells[0]: cells for cells in rows}
    assert by["trained predictors + position prior"][2] == "", "not measured there"
    _, short = tables.shares(*found, titles=("A", "B"), only=tables.SHORT)
    assert short == [cells for cells in rows if cells in short] and len(short) == 9


def test_the_toys_answers_best_first():
    found = {"rows": [{"scorer": "random", "value": 0.3, "stderr": 0.02, "n": 9,
                       "fact_tokens_kept": 0.34},
                      {"scorer": "full", "value": 1.0, "stderr": 0.0, "n": 9,
                       "fact_tokens_kept": 1.0}]}
    assert tables.toy(found)[1] == [["full model", "100.0% ± 0.0%", "100%"],
                                    ["random", "30.0% ± 2.0%", "34%"]]


def test_means_over_tasks():
    tasks = [{("full", "acc"): {"value": 0.5, "stderr": 0.03}},
             {("full", "acc"): {"value": 0.7, "stderr": 0.04}}]
    assert tables.mean(tasks, "full", "value", "stderr") == "60.0 ± 2.5"


def test_accuracies_have_a_row_for_each_task():
    table = tables.TABLES["choice"]
    head, rows = table.make(*map(tables.result, table.files))
    assert len(rows) == 5 + 4 + 4 and all(len(cells) == len(head) == 7 for cells in rows)
    found = {(r["task"], r["scorer"], r["metric"]): r["value"]
             for r in measured("smollm2_harness_5")["rows"]}
    wanted = [f"{100 * found['piqa', 'full', metric]:.0f}" for metric in ("acc", "acc_norm")]
    assert rows[8][:2] == ["PIQA, 5-shot (40 rows)", " / ".join(wanted)]
    assert rows[4][0].startswith("LAMBADA") and " / " not in "".join(rows[4][1:])
    assert rows[6][:2] == rows[12][:2] == ["against full (paired)", ""]


def test_long_prompts_name_a_set_once():
    table = tables.TABLES["long"]
    head, rows = table.make(*map(tables.result, table.files))
    assert all(len(cells) == len(head) for cells in rows)
    named = [cells for cells in rows if cells[0]]
    assert [cells[0].split(",")[0] for cells in named] == ["multi_news", "QMSum", "Dolly",
                                                          "4 passages"]
    assert all(cells[1] == "full model" and cells[2] == "1.00x" for cells in named)
    assert [cells[3].split()[0] for cells in named] == ["ROUGE-L", "ROUGE-L", "F1", "F1"]


def test_h2o_is_paired_with_the_full_model():
    table = tables.TABLES["h2o"]
    rows = table.make(*map(tables.result, table.files))[1]
    assert [bool(cells[-1]) for cells in rows] == [False, True, True, True, True]


def test_variants_stand_against_the_first():
    first = row("first", share_of_gap=0.3, share_stderr=0.04, vs_first=0.0, vs_first_stderr=0.0)
    second = {**first, "scorer": "second", "vs_first": -0.38, "vs_first_stderr": 0.07}
    head, rows = tables.variants({"rows": [row("full"), row("random"), first, second]})
    assert [cells[0] for cells in rows] == ["random", "first", "second"]
    assert [cells[-1] for cells in rows] == ["", "", "-38 ± 7 points"]
    assert all(len(cells) == len(head) == 5 for cells in rows)


def test_a_variant_alone_is_compared_with_none():
    alone = row("a", vs_first=0.0, vs_first_stderr=0.0, trials=[0.1, -0.02], share_of_gap=0.04,
                share_stderr=0.05)
    head, rows = tables.variants({"rows": [row("full"), row("random"), alone]})
    assert head[-1] == "share of the gap"
    assert [cells[-1] for cells in rows] == ["0%", "4% ± 5% (10%, -2%)"]


def test_a_group_leaves_out_the_ends_of_the_share():
    ours = {"share_of_gap": 0.3, "share_stderr": 0.04}
    found = {"rows": [row("full", group="one"), row("random", group="one"),
                      row("a", group="one", **ours), row("b", group="other", **ours)]}
    head, rows = tables.variants(found, "one")
    assert rows == [["a", "1.000 ± 0.500", "65%", "30% ± 4%"]] and len(head) == 4


def test_keep_ratios_likeliest_scorer_first():
    head, rows = tables.keep_ratios(measured("smollm2_tradeoff"))
    assert head == ["kept by", "r = 0.95, 81% kept", "r = 0.92, 72% kept", "r = 0.89, 65% kept",
                    "r = 0.85, 56% kept", "r = 0.8, 48% kept"]
    assert [cells[0] for cells in rows[:2]] == [tables.NAMES["prior"], tables.NAMES["predictor"]]
    assert [cells[0].split(": ")[1] for cells in rows[-3:]] == [
        "trained predictors*", "random*", "full model*"]
    assert len(rows) == 7 + 3 and all(len(cells) == len(head) for cells in rows)


def test_speed():
    found = measured("qwen05_speed_cpu")
    n = len(found["bench"])
    for make, count in ((tables.speed_short, n),
                        (tables.speed_arms, 2 * n),
                        (tables.speed_ratios, n), (tables.speed_memory, 2 * n)):
        head, rows = make(found)
        assert len(rows) == count and all(len(cells) == len(head) for cells in rows)


def test_memory_is_the_sum_of_its_parts():
    for cells in tables.speed_memory(measured("qwen05_speed_cpu"))[1]:
        peak, whole, *parts = map(float, cells[2:])
        assert whole == pytest.approx(sum(parts), abs=0.03)
        assert peak > parts[0], "the weights at least"


def test_speed_beside_another():
    both = measured("qwen05_transformers_cpu"), measured("smollm2_speed_cpu")
    head, rows = tables.speed_vs(*both)
    assert len(rows) == sum(len(each["bench"]) for each in both)
    assert all(len(cells) == len(head) for cells in rows)
    assert tables.faster(3.0, 2.0, "ms", 1e3) == "3000.00 -> 2000.00 ms = 1.50x"
    _, files = tables.TABLES["speed_compiled"]
    head, rows = tables.speed_compiled(*map(measured, files))
    assert all(len(cells) == len(head) and "x" in cells[3] for cells in rows)


# ------------------------------------------------------------------------------------------ render

TABLE = "<!-- table toy -->\n{}\n<!-- end -->"


def test_render_replaces_tables_and_nothing_else():
    new = tables.render(TABLE.format("stale"), "docs/results.md")
    assert "stale" not in new and "| full model |" in new
    assert "](../results/toy_exact.json)" in new
    text = f"before\n\n{TABLE.format('stale')}\n\nbetween\n\n{TABLE.format('')}\nafter\n"
    wanted = f"before\n\n{new}\n\nbetween\n\n{new}\nafter\n"
    assert tables.render(text, "docs/results.md") == wanted
    assert tables.render(wanted, "docs/results.md") == wanted


def test_a_marker_without_a_table_gets_one():
    new = tables.render(TABLE.format("stale"))
    bare = "<!-- table toy -->"
    assert tables.render(f"{bare}\n\ntext\n\n{TABLE.format('stale')}\n") == (
        f"{new}\n\ntext\n\n{new}\n")
    assert tables.render(f"{bare}\n") == f"{new}\n"


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="^README.md: unknown table 'other'; there are equations"):
        tables.render("<!-- table other -->\n<!-- end -->\n")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of what lab.tables reads, with pages of one table each."""
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "docs").mkdir()
    for name in tables.MODULES:
        (tmp_path / f"{name}.py").symlink_to(ROOT / f"{name}.py")
    for page, name in zip(tables.PAGES, ("equations", "losses")):
        (tmp_path / page).write_text(f"text\n\n<!-- table {name} -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        tables.main()

    return tmp_path, command


def test_check_fails_for_each_page_until_it_is_written(tree, capsys):
    root, command = tree
    with pytest.raises(ValueError, match="^README.md: a table is not what results/ says"):
        command("--check")
    command()
    assert capsys.readouterr().out.splitlines() == [
        f"{page}: tables written anew" for page in tables.PAGES]
    command("--check")
    command()
    assert capsys.readouterr().out == ""
    page = root / "docs" / "results.md"
    page.write_text(page.read_text().replace("| random | ", "| randomly | "))
    with pytest.raises(ValueError, match="^docs/results.md: a table is not what results/ says"):
        command("--check")
    assert "| randomly | " in page.read_text()


def test_figures_are_drawn_from_results_alone(monkeypatch):
    drawn = {}
    monkeypatch.setattr(tables, "curve", lambda log, path: drawn.update({path.name: log}))
    monkeypatch.setattr(tables, "tradeoff",
                        lambda lines, full, path, title: drawn.update({path.name: (lines, full)}))
    monkeypatch.setattr(tables, "cost_against_length",
                        lambda rows, path, title: drawn.update({path.name: (rows, title)}))
    tables.figures()
    rows, title = drawn["qwen05_speed_cpu.png"]
    assert rows == measured("qwen05_speed_cpu")["bench"]
    assert title.startswith("qwen2.5-coder-0.5b, ") and title.endswith(", float32")
    assert "smollm2_cost_cpu.png" in drawn
    assert drawn["smollm2_training.png"] == measured("smollm2_training")["log"]
    lines, full = drawn["smollm2_keep.png"]
    assert full["scorer"] == "full"
    assert list(lines)[:2] == ["trained predictors + position prior", "trained predictors"]
    assert "random" in lines and "full model" not in lines
    assert all(len(rows) == 5 for rows in lines.values())
