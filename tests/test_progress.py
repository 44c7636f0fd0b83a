"""How commands speak and end: progress, --json, Ctrl-C, no memory, no reader, no colours."""
import contextlib
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, tiny_model
from lab import figures
from prune import Schedule, flops
from support import progress
from support.options import cli
from support.progress import Progress, counted
from support.timing import bench_row, take_turns

# ------------------------------------------------------------------------------------ the progress


@pytest.fixture
def clock(monkeypatch):
    """-> [the time that Progress reads, in seconds]."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_pipe_gets_a_plain_line_every_five_seconds(clock, capsys):
    shown = Progress(100, "rows")
    for _ in range(20):
        clock[0] += 1
        shown.step("loss 0.5")
    shown.done()
    assert capsys.readouterr().err.splitlines() == [
        f"{n}/100 rows, {100 - n} s left, loss 0.5" for n in (5, 10, 15, 20)]


def test_what_was_done_before_does_not_make_the_rest_look_short(clock, capsys):
    shown = Progress(100, "steps", first=90)
    clock[0] += 10
    shown.step()
    assert capsys.readouterr().err == "91/100 steps, 90 s left\n"


def test_the_first_note_comes_at_once_and_others_wait(clock, capsys):
    shown = Progress()
    for text in ("reading", "warming up", "timing"):
        shown.note(text)
        clock[0] += 3
    assert capsys.readouterr().err.splitlines() == ["reading", "timing"]


def test_quiet_and_all_processes_but_the_first_say_nothing(clock, capsys, monkeypatch):
    def speak(**options):
        shown = Progress(2, "rows", **options)
        shown.note("reading")
        clock[0] += 10
        shown.step()
        return capsys.readouterr().err

    assert speak() and not speak(quiet=True)
    monkeypatch.setenv("RANK", "0")
    assert speak()
    monkeypatch.setenv("RANK", "1")
    assert not speak()


@pytest.fixture
def terminal(monkeypatch):
    """terminal(action) -> what the action shows on a terminal of 30 columns."""
    def shown(action):
        ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
        monkeypatch.setenv("TERM", "xterm")
        with os.fdopen(theirs, "w") as stream, contextlib.redirect_stderr(stream):
            action()
            print("#", file=stream, flush=True)         # so that there is something to read
            text = ""
            while not text.endswith("#\r\n"):           # it may come in pieces
                text += os.read(ours, 10000).decode()
        os.close(ours)
        return text.removesuffix("#\r\n")
    return shown


def test_a_terminal_gets_one_line_that_is_cut_to_its_width(terminal):
    shown = Progress(3, "rows")
    assert terminal(lambda: shown.step("a text\nof more than thirty columns")) \
        == "\r1/3 rows, 0 s left, a text of\x1b[K"
    assert terminal(lambda: shown.note("short")) == "\rshort\x1b[K"
    assert terminal(shown.done) == "\r\x1b[K"


def test_counted_gives_what_it_counts(terminal):
    found = []
    assert terminal(lambda: found.extend(counted("ab", "rows"))).split("\r")[1:] == [
        "1/2 rows, 0 s left\x1b[K", "2/2 rows, 0 s left\x1b[K", "\x1b[K"]
    assert found == ["a", "b"]


LONG = {        # commands that take their time, small
    "saliency": ("saliency.py", "--figure", 2, "--limit", 2),
    "train": ("train.py", "--steps", 2, "--accum", 1, "--states", "marked", "--cls", 0,
              "--report-rows", 0, "--report-every", 1, "--limit", 2, "--out"),
}


@pytest.mark.beside
def test_a_pipe_gets_no_carriage_returns(tmp_path):
    for name, words in LONG.items():
        words = (*words, tmp_path) if words[-1] == "--out" else words
        words = [sys.executable, *map(str, words)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True)     # bytes: text hides a \\r
        assert done.returncode == 0, done.stderr
        assert b"\r" not in done.stdout + done.stderr
        if name == "train":
            lines = done.stdout.decode().splitlines()
            assert [line.split("  ")[0] for line in lines if line.startswith("step")] \
                == ["step 1/2", "step 2/2"], "every due step is a line of its own"


@pytest.mark.beside
def test_quiet_leaves_the_terminal_alone():
    ours, theirs = pty.openpty()
    words = [sys.executable, "saliency.py", "--figure", "2", "--limit", "2", "--quiet"]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.write(theirs, b"nothing")
    assert done.returncode == 0 and os.read(ours, 10000) == b"nothing"
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("module", ["infer", "train", "saliency", "lab.quality", "lab.ablations",
                                    "lab.speed", "lab.gradient", "lab.batch", "toy"])
def test_every_long_command_can_be_quiet(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module}.py", "--help"])
    main = __import__(module, fromlist=["main"]).main
    with pytest.raises(SystemExit):
        main()
    assert "--quiet" in capsys.readouterr().out


# -------------------------------------------------------------------------- fewer, where it is slow


@pytest.mark.parametrize("seconds, times, left", [(1.0, 5, "11 s"), (6.0, 3, "37 s"),
                                                   (61.0, 2, "4 min")])
def test_a_slow_prefill_is_timed_less_often(seconds, times, left, capsys):
    model, told = tiny_model(), []
    arms = dict.fromkeys(("full", "sdtp"), lambda new, first=None: (seconds, 0.1))
    shown = Progress(quiet=True)
    shown.note = told.append
    found = take_turns(model, 20, arms, 2, 5, progress=shown)
    assert [len(found[name]["prefill"]) for name in arms] == [times, times]
    assert [len(found[name]["decode"]) for name in arms] == 2 * [min(3, times)]
    said = (f"     20  about {left}: a prefill takes {seconds:.0f} s, so each arm is timed "
            f"{times}, not 5 times\n")
    assert capsys.readouterr().out == (said if times < 5 else "")
    assert bench_row(model, 20, Schedule(1, 1, 4, 0.8), found, 2)["repeats"] == times
    assert told[0] == "20 tokens, full: warming up, 1 of 2"
    assert told[4] == f"20 tokens, full: 1 of {times} times, {left} left"
    assert f"{times} of {times} times" in told[-1]


def test_a_long_prompt_is_warmed_up_by_its_beginning(capsys):
    """Its time is estimated by FLOPs; compiled code reads the whole."""
    model, seen = tiny_model(), []

    def run(new, first=None):
        seen.append((new, first))
        return 10.0, 0.5

    found = take_turns(model, 8192, {"full": run, "sdtp": run}, 9, 5, 1)
    counts = [[n] * len(model.blocks) for n in (8192, 4096)]
    growth = flops(model.config, counts[0]) / flops(model.config, counts[1])
    total = 3 * 2 * 10 * growth + 3 * 2 * 8 * 0.5
    assert 2.5 < growth < 4, "attention grows with the square"
    assert seen == 2 * [(4, 4096)] + 6 * [(9, None)] and len(found["full"]["decode"]) == 3
    assert f"   8192  about {total / 60:.0f} min: a prefill takes " in capsys.readouterr().out
    seen.clear()
    take_turns(model, 8192, {"full": run}, 9, 5, 1, whole=True)
    assert seen[0] == (4, 8192)


# ------------------------------------------------------------------------------------------ --json


JSON = [("prune", ("--lengths", "512")), ("lab.plan", ("--lengths", "512")),
        ("toy", ("--eval", "1", "--least", "60")),
        ("saliency", ("--prompt", "Anna sells maps.", "--response", "maps"))]


@pytest.mark.parametrize("module, words", JSON, ids=[module for module, _ in JSON])
def test_json_stands_alone_on_stdout(module, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *words, "--json"])
    stdout = sys.stdout
    cli(__import__(module, fromlist=["main"]).main)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and json.loads(out)["command"]
    assert err, "the text is not lost"
    assert sys.stdout is stdout


# ------------------------------------------------------------------------------------ how it ends


START = """
import atexit, signal, sys, time
sys.path[:0] = ["."]
signal.signal(signal.SIGINT, signal.default_int_handler)
from support.options import cli
from support.running import stop_on_signals

def say(text):
    print(text, flush=True)

def work():
    say("ready")
    time.sleep(30)

def train():
    stop_on_signals()
    work()

def slow_end():
    atexit.register(work)
"""


def interrupted(call, times):
    """Start `call` and send SIGINT after each of its next `times` lines -> exit code, stderr."""
    running = subprocess.Popen([sys.executable, "-c", START + call], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout.readline() == "ready\n", running.stderr.read()
    seen = ""
    for number in range(times):
        if number:
            seen += running.stderr.readline()
        running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    return running.returncode, seen + err


@pytest.mark.beside
def test_ctrl_c_is_one_line():
    assert interrupted("cli(work)", 1) == (130, "stopped\n")


@pytest.mark.beside
def test_a_second_ctrl_c_stops_a_training_at_once():
    code, err = interrupted("cli(train)", 2)
    assert (code, err) == (-signal.SIGINT, "stopping after this step; Ctrl-C again: at once\n")


@pytest.mark.beside
def test_ctrl_c_while_the_program_ends_is_no_traceback():
    assert interrupted("cli(slow_end)", 1) == (-signal.SIGINT, "")


@pytest.mark.beside
def test_nobody_reads_on():
    """As with `| head`: while it prints, and when the interpreter flushes what is left."""
    for words in (("prune.py",), ("-c", START + "cli(lambda: [say('line') for _ in range(9)])")):
        running = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait() == 141


@pytest.fixture
def ends(capsys):
    """ends(main) -> the line with which cli leaves."""
    def run(main):
        with pytest.raises(SystemExit) as ended:
            cli(main)
        return ended.value.code

    yield run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_no_memory_on_the_cpu_is_one_line(ends):
    for main in (lambda: torch.empty(2**50), lambda: bytearray(2**60)):
        text = ends(main)
        assert "not enough memory: take shorter prompts or rows, a smaller --batch" in text
        assert len(text.splitlines()) == 1


def test_another_fault_of_torch_stays_a_traceback(ends):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ends(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


# --------------------------------------------------------------------- known before the work begins


PNG = [("saliency.py", ()), ("train.py", ()), ("lab/speed.py", ()),
       ("lab/ablations.py", ("--table", "figures"))]


@pytest.mark.parametrize("script, words", PNG, ids=[script for script, _ in PNG])
def test_no_matplotlib_is_known_before_the_weights_are_read(script, words, leaves, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = leaves(script, "--ckpt", "none", *words, "--png", "x.png")
    assert ended.endswith(": pictures need the optional package matplotlib: pip install matplotlib")


@pytest.mark.parametrize("script, option", [
    ("saliency.py", "--png"), ("train.py", "--png"), ("lab/speed.py", "--png"),
    ("infer.py", "--html"), ("lab/quality.py", "--rows-file")])
@pytest.mark.parametrize("path", ["folder", "file/below.png"])
def test_what_cannot_be_written_is_known_before_the_weights_are_read(script, option, path, leaves,
                                                                     tmp_path):
    if option == "--png":
        pytest.importorskip("matplotlib")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    ended = leaves(script, "--ckpt", "none", option, tmp_path / path)
    assert f"{tmp_path / path}: cannot be written (" in ended and len(ended.splitlines()) == 1


def test_a_file_that_is_there_is_left_alone_until_then(leaves, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    ended = leaves("infer.py", "--ckpt", "none", "--html", page)
    assert "none" in ended and "cannot be written" not in ended
    assert page.read_text() == "old" and list(tmp_path.iterdir()) == [page]


def test_a_picture_of_another_kind_is_refused(leaves, capsys):
    pytest.importorskip("matplotlib")
    assert leaves("saliency.py", "--ckpt", "none", "--png", "x.doc") == 2
    assert "x.doc: expected a name that ends in .png" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- what is printed


def test_no_color_is_respected(monkeypatch):
    def painted():
        return (figures.heat_text(torch.rand(2, 2), ["a", "b"], True)
                + figures.survivors_text(["a", "b"], [0, 1], 1, True)).count("\x1b")

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert painted()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not painted()


@pytest.mark.parametrize("n", [5, 200])
def test_figure_1_is_legible(n, tmp_path):
    pytest.importorskip("matplotlib")
    labels = [("$\\frac$", "word", " ", "a-very-long-word")[i % 4] for i in range(n)]
    figures.figure1(torch.rand(12, n), labels, tmp_path / "x.png")
    header = (tmp_path / "x.png").read_bytes()[16:24]
    width, height = struct.unpack(">II", header)
    assert 500 < width < 1400
    assert 150 < height < 900
