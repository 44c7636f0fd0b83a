"""How far a command is: on stderr, so that stdout holds results alone.

On a terminal one line is written again and again, cut to the width; a file or a pipe gets a plain
line every few seconds. Of several processes that torchrun started only the first speaks.
"""
import math
import os
import sys
import time

EVERY = 5                           # seconds between two lines in a file or a pipe
ERASE = "\r\x1b[K"                  # to the line's begin, then what stands there is wiped out


def speaks():
    """Whether this process may speak: of those that torchrun started the first."""
    return os.environ.get("RANK", "0") == "0"


def on_terminal():
    """Whether stderr is a terminal that can write a line again."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def clear_line():
    """Wipe out the line of a Progress, so that the terminal can take another text."""
    if on_terminal():
        print(ERASE, end="", file=sys.stderr, flush=True)


def columns():
    """The width of the terminal behind stderr; 80 where it does not say."""
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        width = 0
    return width or 80


class Progress:
    """A loop over `total` things, named by `what` ("rows"); first: so many were done before.

        with Progress(len(rows), "rows", args.quiet) as progress:
            for row in rows:
                ...
                progress.step("loss 0.12")      # 3/80 rows, 41 s left, loss 0.12

    note(text) shows what comes next: the first one at once. Call clear() before a result is
    printed while the line stands; done() at the end, if not by `with`.
    """

    def __init__(self, total=0, what="", quiet=False, first=0):
        self.total, self.what = total, what
        self.count = self.first = first
        self.silent = quiet or not speaks()
        self.begin = time.monotonic()
        self.spoke = None           # when the last plain line was written

    def step(self, text=""):
        """One more is done; text: what there is to say about it."""
        self.count += 1
        spent = time.monotonic() - self.begin
        left = spent / (self.count - self.first) * (self.total - self.count)
        parts = f"{self.count}/{self.total} {self.what}", f"{left:.0f} s left", text
        self.write(", ".join(filter(None, parts)), self.begin)

    def note(self, text):
        """Show a text; nothing is counted."""
        self.write(text, -math.inf)

    def write(self, text, begin):
        """Show a line; a plain one only EVERY seconds after the last, or after `begin`."""
        if self.silent:
            return
        if on_terminal():
            line = " ".join(text.split())[:columns() - 1]
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        since = begin if self.spoke is None else self.spoke
        if now - since >= EVERY:
            print(text, file=sys.stderr, flush=True)
            self.spoke = now

    def clear(self):
        """Wipe out the line, so that a result can be printed."""
        if not self.silent:
            clear_line()

    done = clear

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.done()


def counted(things, what, quiet=False):
    """Go through a list and show how far: yields what it holds."""
    with Progress(len(things), what, quiet) as progress:
        for thing in things:
            yield thing
            progress.step()
