"""The page of survivors: what stands in it, and what a headless Chromium does with it (skipped where there is none)."""
import json
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
import torch

import pictures
from conftest import ROOT
from prune import Schedule, Stage, local_tokens, prefill, random_scorer

SCHEDULE = Schedule(1, 1, 4, 0.8)
HOSTILE = ["</script><script>document.title='broken out'</script>", "<!--", "]]>", "\u2028\"'\\", "&amp;", "\n\n", " word", "<s>"]


@pytest.fixture
def page(tiny, tokens, tmp_path):
    """-> path of the page, its trace and its stage_of: 60 tokens, four stages, hostile pieces first."""
    _, _, trace = prefill(tiny, tokens[:1], SCHEDULE, random_scorer(1))
    stage_of = pictures.dropped_at(trace, 60)
    pictures.survivors_page(tmp_path / "page.html", HOSTILE + [f" w{i}" for i in range(60 - len(HOSTILE))], stage_of, trace, SCHEDULE)
    return tmp_path / "page.html", trace, stage_of


def data_of(path):
    return json.loads(re.search(r"^const data = (.*);$", path.read_text(encoding="utf-8"), re.M)[1])


def test_the_page_loads_nothing_and_no_prompt_breaks_out(page):
    path, trace, stage_of = page
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == text.count("<script>") == 1 and "<!--" not in text.split("<script>")[1]
    assert not re.search(r"://|\b(src|href|srcset)\s*=|\burl\(|@import|\bfetch\(|innerHTML|document\.write", text) and "default-src 'none'" in text
    data = data_of(path)
    assert [t["piece"] for t in data["tokens"]][:len(HOSTILE)] == HOSTILE and [t["stage"] for t in data["tokens"]] == stage_of
    assert [(s["block"], s["seen"], s["kept"]) for s in data["stages"]] == [(b + 1, *SCHEDULE.counts(60, 6)[b:b + 2]) for b in range(4)]


def test_ranks_say_who_is_kept(page):
    """Among the tokens that compete, exactly the first ranks survive a stage; the protected have scores but no ranks."""
    path, trace, _ = page
    data = data_of(path)
    fixed = [t["fixed"] for t in data["tokens"]]
    assert [i for i, f in enumerate(fixed) if f] == [*range(4), *range(60 - local_tokens(60, 0.1), 60)]
    for s, stage in enumerate(trace):
        ranks = {i: t["ranks"][s] for i, t in enumerate(data["tokens"]) if s < len(t["ranks"])}
        slots = stage.kept.shape[1] - sum(fixed)
        assert sorted(ranks.values()) == list(range(1, stage.seen.shape[1] - sum(fixed) + 1))
        assert {i for i, rank in ranks.items() if rank <= slots} == set(stage.kept[0].tolist()) - {i for i, f in enumerate(fixed) if f}
    for t in data["tokens"]:
        assert len(t["scores"]) == (t["stage"] or 4) and len(t["ranks"]) == (0 if t["fixed"] else len(t["scores"]))


def test_scores_without_a_number_do_not_break_the_page(tmp_path):
    seen, score = torch.arange(20)[None], torch.full((1, 20), float("nan"))
    stage = Stage(1, seen, score, seen[:, :16])
    pictures.survivors_page(tmp_path / "page.html", ["x"] * 20, pictures.dropped_at([stage], 20), [stage], Schedule(1, 1, 1, 0.8))
    assert "NaN" not in (tmp_path / "page.html").read_text() and data_of(tmp_path / "page.html")["tokens"][10]["scores"] == [float("-inf")]


def in_browser(path, script):
    """Run a script, which returns something, inside the page after it has loaded: -> that, and whatever errors there were."""
    text = path.read_text(encoding="utf-8")
    text = text.replace("<title>", "<script>const errors = []; onerror = m => errors.push(m);</script><title>", 1)
    text = text.replace("</html>", f"""<script>(async () => {{
        const key = (name, target) => target.dispatchEvent(new KeyboardEvent("keydown", {{key: name, bubbles: true, cancelable: true}}));
        const gone = () => document.querySelectorAll("#text .gone").length, shown = i => cells[i].place.textContent, wait = ms => new Promise(done => setTimeout(done, ms));
        for (const [name, event] of [["focus", "focusin"], ["blur", "focusout"]]) {{              // on a busy machine the window may be given no focus,
            const real = HTMLElement.prototype[name];                                             // and then these events do not come by themselves
            HTMLElement.prototype[name] = function () {{
                let came = false;
                this.addEventListener(event, () => came = true, {{once: true}});
                real.call(this);
                if (!came) this.dispatchEvent(new FocusEvent(event, {{bubbles: true}}));
            }};
        }}
        let result;
        try {{ {script} }} catch (e) {{ errors.push(String(e)); }}
        document.body.replaceChildren(Object.assign(document.createElement("pre"), {{id: "found", textContent: encodeURIComponent(JSON.stringify({{result, errors}}))}}));
    }})()</script></html>""")
    copy = path.with_name("driven.html")
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run([*pictures.browser(), f"--user-data-dir={path.parent / 'profile'}", "--window-size=1200,800", "--virtual-time-budget=20000", "--dump-dom", copy.as_uri()],
                          capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unquote(found[1])).values()


needs_browser = pytest.mark.skipif(not pictures.browser(), reason="needs Chromium or Chrome")


@needs_browser
def test_the_page_in_a_browser(page):
    path, trace, stage_of = page
    lost, one = stage_of.index(2), stage_of.index(0, 4)              # a token that stage 2 dropped, one that competes and survives
    result, errors = in_browser(path, f"""
        result = {{}};
        result.title = document.title;
        result.text = text.textContent;
        result.opened = [slider.value, gone(), count.textContent];
        slider.value = 1; slider.oninput();
        result.moved = [gone(), document.querySelectorAll("#text .now").length, count.textContent, rows.querySelector(".on").rowIndex];
        key("ArrowRight", document.body); result.right = [slider.value, gone()];
        key("ArrowLeft", document.body); key("ArrowLeft", document.body); key("ArrowLeft", document.body); result.left = [slider.value, gone()];
        rows.rows[3].click(); result.row = [slider.value, gone()];
        spans[{lost}].focus(); result.lost = [info.textContent, shown(1), shown(2), shown(3), cells[2].score.textContent];
        spans[0].focus(); result.fixed = shown(1);
        result.arrows = ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowUp", "ArrowDown", "ArrowRight", "Home", "ArrowLeft"].map(k => {{ key(k, document.activeElement); return document.activeElement.index; }});
        result.stops = spans.filter(e => e.tabIndex == 0).map(e => e.index);
        result.unmoved = slider.value;
        spans[{one}].dispatchEvent(new MouseEvent("mouseover", {{bubbles: true}})); result.hover = [info.textContent, shown(4)];
        text.dispatchEvent(new MouseEvent("mouseleave")); result.back = info.textContent;
        document.activeElement.blur(); result.blurred = [info.textContent, shown(1)];
        result.labels = [text.getAttribute("role"), spans[6].getAttribute("role"), spans[6].getAttribute("aria-label"), slider.getAttribute("aria-valuetext")];
        result.classes = [spans[5].className, spans[7].className].map(c => c.split(" ")[0]);
        go(4); play.click(); await wait(100); result.playing = [slider.value, play.textContent]; await wait(750); result.step = slider.value;
        await wait(4000); result.played = [slider.value, play.textContent];
    """)
    dropped = [sum(0 < s <= k for s in stage_of) for k in range(5)]
    place = [f"{data_of(path)['tokens'][lost]['ranks'][s]} of {n - 10}" for s, n in enumerate(SCHEDULE.counts(60, 6)[:2])]
    assert errors == [] and result["title"] == "Which tokens survive" and result["text"].startswith("".join(HOSTILE))
    assert result["opened"] == ["4", dropped[4], f"Stage 4 of 4: {60 - dropped[4]} of 60 tokens left ({round(100 - dropped[4] / 0.6)}%)"]
    assert result["moved"] == [dropped[1], dropped[1], "Stage 1 of 4: 48 of 60 tokens left (80%)", 2]
    assert result["right"] == ["2", dropped[2]] and result["left"] == ["0", 0] and result["row"] == ["3", dropped[3]]
    assert "dropped by stage 2, after block 2" in result["lost"][0] and result["lost"][1:4] == ["\u2713 " + place[0], "\u2717 " + place[1], ""]
    assert float(result["lost"][4]) == pytest.approx(data_of(path)["tokens"][lost]["scores"][1], abs=0.006) and "always kept" in result["fixed"]
    arrows = result["arrows"]
    assert arrows[:4] == [1, 2, 1, 59] and arrows[4] < 59 and arrows[5] > arrows[4] and arrows[7:] == [0, 0] and result["stops"] == [0] and result["unmoved"] == "3"
    assert "kept to the end" in result["hover"][0] and result["hover"][1].startswith("\u2713") and "token 1 of 60" in result["back"]
    assert result["blurred"][0].startswith("Point at") and result["blurred"][1] == ""
    assert result["labels"][:2] == ["listbox", "option"] and result["labels"][2].startswith("\u2423word, ") and result["labels"][3] == "Stage 3 of 4: 31 of 60 tokens left (52%)"
    assert result["classes"] == ["newline", "special"]
    assert result["playing"][0] == "0" and "Pause" in result["playing"][1] and result["step"] == "1" and result["played"][0] == "4" and "Play" in result["played"][1]


@needs_browser
def test_a_picture_of_the_page(page, tmp_path):
    def command(*words):
        return subprocess.run([sys.executable, "pictures.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    done = command(f"{page[0]}#2.9", tmp_path / "page.png", "--size", 800, 600, "--dark")
    assert done.returncode == 0 and (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    done = command(tmp_path / "none.html", tmp_path / "none.png")
    assert done.returncode == 1 and "no such file" in done.stderr and len(done.stderr.splitlines()) == 1
