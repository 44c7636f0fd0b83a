"""The page of survivors: what stands in it, and what a headless Chromium does with it.

The tests that need a browser are skipped where there is none.
"""
import json
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
import torch

from conftest import ROOT
from lab import figures
from lab.scorers import random_scorer
from prune import Schedule, Stage, local_tokens, prefill

SCHEDULE = Schedule(1, 1, 4, 0.8)
HOSTILE = ["</script><script>document.title='broken out'</script>", "<!--", "]]>",
           "\u2028\"'\\", "&amp;", "\n\n", " word", "<s>"]


@pytest.fixture
def page(tiny, tokens, tmp_path):
    """-> path of the page, its trace and its stage_of: 60 tokens, four stages, hostile first."""
    _, _, trace = prefill(tiny, tokens[:1], SCHEDULE, random_scorer(1))
    stage_of = figures.dropped_at(trace, 60)
    pieces = HOSTILE + [f" w{i}" for i in range(60 - len(HOSTILE))]
    path = tmp_path / "page.html"
    figures.survivors_page(path, pieces, stage_of, trace, SCHEDULE)
    return path, trace, stage_of


def data_of(path):
    return json.loads(re.search(r"^const data = (.*);$", path.read_text(encoding="utf-8"), re.M)[1])


# ------------------------------------------------------------------------------- what stands in it


def test_the_page_loads_nothing_and_no_prompt_breaks_out(page):
    path, trace, stage_of = page
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == text.count("<script>") == 1
    assert "<!--" not in text.split("<script>")[1]
    assert "default-src 'none'" in text
    loads = r"://|\b(src|href|srcset)\s*=|\burl\(|@import|\bfetch\(|innerHTML|document\.write"
    assert not re.search(loads, text)
    data = data_of(path)
    assert [t["piece"] for t in data["tokens"]][:len(HOSTILE)] == HOSTILE
    assert [t["stage"] for t in data["tokens"]] == stage_of
    counts = SCHEDULE.counts(60, 6)
    wanted = [(b + 1, counts[b], counts[b + 1]) for b in range(4)]
    assert [(s["block"], s["seen"], s["kept"]) for s in data["stages"]] == wanted


def test_ranks_say_who_is_kept(page):
    """Among the tokens that compete, exactly the first ranks survive a stage.

    The protected have scores but no ranks.
    """
    path, trace, _ = page
    tokens = data_of(path)["tokens"]
    fixed = {i for i, t in enumerate(tokens) if t["fixed"]}
    assert fixed == {*range(4), *range(60 - local_tokens(60, 0.1), 60)}
    for s, stage in enumerate(trace):
        ranks = {i: t["ranks"][s] for i, t in enumerate(tokens) if s < len(t["ranks"])}
        assert sorted(ranks.values()) == list(range(1, stage.seen.shape[1] - len(fixed) + 1))
        slots = stage.kept.shape[1] - len(fixed)
        best = {i for i, rank in ranks.items() if rank <= slots}
        assert best == set(stage.kept[0].tolist()) - fixed
    for t in tokens:
        assert len(t["scores"]) == (t["stage"] or 4)
        assert len(t["ranks"]) == (0 if t["fixed"] else len(t["scores"]))


def test_scores_without_a_number_do_not_break_the_page(tmp_path):
    seen, score = torch.arange(20)[None], torch.full((1, 20), float("nan"))
    trace = [Stage(1, seen, score, seen[:, :16])]
    path = tmp_path / "page.html"
    stage_of = figures.dropped_at(trace, 20)
    figures.survivors_page(path, ["x"] * 20, stage_of, trace, Schedule(1, 1, 1, 0.8))
    assert "NaN" not in path.read_text()
    assert data_of(path)["tokens"][10]["scores"] == [float("-inf")]


# ------------------------------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(not figures.browser(), reason="needs Chromium or Chrome")

ERRORS = "<script>const errors = []; onerror = m => errors.push(m);</script>"
# On a busy machine the window may be given no focus, and then focusin and focusout do not come by
# themselves: focus() and blur() see to it that they do.
DRIVER = """<script>(async () => {
    const key = (name, target) =>
        target.dispatchEvent(new KeyboardEvent("keydown",
            {key: name, bubbles: true, cancelable: true}));
    const count_of = selector => document.querySelectorAll(selector).length;
    const gone = () => count_of("#text .gone");
    const shown = i => cells[i].place.textContent;
    const wait = ms => new Promise(done => setTimeout(done, ms));
    for (const [name, event] of [["focus", "focusin"], ["blur", "focusout"]]) {
        const real = HTMLElement.prototype[name];
        HTMLElement.prototype[name] = function () {
            let came = false;
            this.addEventListener(event, () => came = true, {once: true});
            real.call(this);
            if (!came) this.dispatchEvent(new FocusEvent(event, {bubbles: true}));
        };
    }
    const result = {};
    try {
        SCRIPT
    } catch (e) {
        errors.push(String(e));
    }
    const textContent = encodeURIComponent(JSON.stringify({result, errors}));
    const found = Object.assign(document.createElement("pre"), {id: "found", textContent});
    document.body.replaceChildren(found);
})()</script>"""


def in_browser(path, script):
    """Run a script inside the page after it has loaded -> what it put into `result`, and errors."""
    text = path.read_text(encoding="utf-8")
    text = text.replace("<title>", ERRORS + "<title>", 1)
    text = text.replace("</html>", DRIVER.replace("SCRIPT", script) + "</html>")
    driven = path.with_name("driven.html")
    driven.write_text(text, encoding="utf-8")
    words = [f"--user-data-dir={path.parent / 'profile'}", "--window-size=1200,800",
             "--virtual-time-budget=20000", "--dump-dom", driven.as_uri()]
    done = subprocess.run(figures.browser() + words, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unquote(found[1])).values()


SCRIPT = """
    result.title = document.title;
    result.text = text.textContent;
    result.opened = [slider.value, gone(), count.textContent];

    slider.value = 1;
    slider.oninput();
    result.moved = [gone(), count_of("#text .now"), count.textContent,
                    rows.querySelector(".on").rowIndex];
    key("ArrowRight", document.body);
    result.right = [slider.value, gone()];
    for (let i = 0; i < 3; i++) key("ArrowLeft", document.body);
    result.left = [slider.value, gone()];
    rows.rows[3].click();
    result.row = [slider.value, gone()];

    spans[LOST].focus();
    result.lost = [info.textContent, shown(1), shown(2), shown(3), cells[2].score.textContent];
    spans[0].focus();
    result.fixed = shown(1);
    const keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowUp", "ArrowDown",
                  "ArrowRight", "Home", "ArrowLeft"];
    result.arrows = keys.map(name => {
        key(name, document.activeElement);
        return document.activeElement.index;
    });
    result.stops = spans.filter(e => e.tabIndex == 0).map(e => e.index);
    result.unmoved = slider.value;

    spans[KEPT].dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
    result.hover = [info.textContent, shown(4)];
    text.dispatchEvent(new MouseEvent("mouseleave"));
    result.back = info.textContent;
    document.activeElement.blur();
    result.blurred = [info.textContent, shown(1)];

    result.roles = [text.getAttribute("role"), spans[6].getAttribute("role")];
    result.labels = [spans[6].getAttribute("aria-label"), slider.getAttribute("aria-valuetext")];
    result.classes = [spans[5].className, spans[7].className].map(c => c.split(" ")[0]);

    go(4);
    play.click();
    await wait(100);
    result.playing = [slider.value, play.textContent];
    await wait(750);
    result.step = slider.value;
    await wait(4000);
    result.played = [slider.value, play.textContent];
"""


@needs_browser
def test_the_page_in_a_browser(page):
    path, trace, stage_of = page
    lost = stage_of.index(2)                    # stage 2 dropped it
    kept = stage_of.index(0, 4)                 # it competes and survives
    script = SCRIPT.replace("LOST", str(lost)).replace("KEPT", str(kept))
    result, errors = in_browser(path, script)
    dropped = [sum(0 < s <= k for s in stage_of) for k in range(5)]
    share = round(100 - dropped[4] / 0.6)
    assert errors == []
    assert result["title"] == "Which tokens survive"
    assert result["text"].startswith("".join(HOSTILE))

    opened = f"Stage 4 of 4: {60 - dropped[4]} of 60 tokens left ({share}%)"
    assert result["opened"] == ["4", dropped[4], opened]
    moved = "Stage 1 of 4: 48 of 60 tokens left (80%)"
    assert result["moved"] == [dropped[1], dropped[1], moved, 2]
    assert result["right"] == ["2", dropped[2]]
    assert result["left"] == ["0", 0]
    assert result["row"] == ["3", dropped[3]]

    token = data_of(path)["tokens"][lost]
    first, second = (f"{rank} of {n - 10}"
                     for rank, n in zip(token["ranks"], SCHEDULE.counts(60, 6)))
    told, *places, score = result["lost"]
    assert "dropped by stage 2, after block 2" in told
    assert places == [f"\u2713 {first}", f"\u2717 {second}", ""]
    assert float(score) == pytest.approx(token["scores"][1], abs=0.006)
    assert "always kept" in result["fixed"]

    arrows = result["arrows"]
    assert arrows[:4] == [1, 2, 1, 59]
    assert arrows[4] < 59 and arrows[5] > arrows[4]
    assert arrows[7:] == [0, 0]
    assert result["stops"] == [0] and result["unmoved"] == "3"

    told, place = result["hover"]
    assert "kept to the end" in told and place.startswith("\u2713")
    assert "token 1 of 60" in result["back"]
    told, place = result["blurred"]
    assert told.startswith("Point at") and place == ""

    assert result["roles"] == ["listbox", "option"]
    assert result["labels"][0].startswith("\u2423word, ")
    assert result["labels"][1] == "Stage 3 of 4: 31 of 60 tokens left (52%)"
    assert result["classes"] == ["newline", "special"]

    assert result["playing"][0] == "0" and "Pause" in result["playing"][1]
    assert result["step"] == "1"
    assert result["played"][0] == "4" and "Play" in result["played"][1]


@needs_browser
def test_a_picture_of_the_page(page, tmp_path):
    def command(*words):
        words = [sys.executable, "-m", "lab.figures", *map(str, words)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)

    png = tmp_path / "page.png"
    done = command(f"{page[0]}#2.9", png, "--size", 800, 600, "--dark")
    assert done.returncode == 0 and png.read_bytes()[:4] == b"\x89PNG", done.stderr
    done = command(tmp_path / "none.html", tmp_path / "none.png")
    assert done.returncode == 1 and "no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
