"""Files are read with one clear line for every fault, and written so that nothing is lost.

Nothing here knows the paper or the model.
"""
import contextlib
import json
import os
import tempfile
from pathlib import Path


def need(condition, message):
    """Bad input ends in one line that names the file and the fault: a ValueError."""
    if not condition:
        raise ValueError(message)


@contextlib.contextmanager
def blame(path, fault=None):
    """Whatever goes wrong inside is the fault of the file `path`, not of torch or Python.

    fault: what it means; None where the reason says it.
    """
    try:
        yield
    # a RecursionError is a RuntimeError
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f"{path}: {fault} ({e})" if fault else f"{path}: {e}") from None


def read_json(path):
    """The value that a JSON file holds."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:           # also bytes that are not UTF-8
        begin = Path(path).read_bytes()[:24]            # of a web page or a Git LFS pointer, say
        raise ValueError(f"{path}: not valid JSON ({e}); it begins with {begin!r}") from None


def read_object(path):
    """The JSON object that a file holds; {} where there is no file."""
    raw = read_json(path) if Path(path).is_file() else {}
    need(isinstance(raw, dict), f"{path}: expected a JSON object")
    return raw


@contextlib.contextmanager
def open_tensors(path, device="cpu"):
    """An open safetensors file; damage that shows while it is read is the file's.

    A safetensors file begins with eight bytes, the length of its header, and the header's brace.
    What stands under the name instead is told by its first bytes.
    """
    from safetensors import SafetensorError, safe_open
    need(Path(path).is_file(), f"{path}: no such file")
    others = {b"vers": "a Git-LFS pointer: `git lfs pull` gets the file that it stands for",
              b"GGUF": "a GGUF file: python checkpoints/convert.py makes a checkpoint of it",
              b"PK\3\4": "pickled weights (torch.save), which may run any code: get safetensors"}
    try:
        with Path(path).open("rb") as file:
            start = file.read(32)
        need(start[8:9] == b"{", f"{path}: not a safetensors file but " + others.get(
            start[:4], f"a web page, half a download or the like, which begins with {start!r}: "
                       "get it again"))
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({e}): get it "
                         "again") from None


def load_metadata(path):
    """The metadata of a safetensors file, a dict of texts; its tensors are not read."""
    with open_tensors(path) as file:
        return file.metadata() or {}


def load_tensors(path):
    """Read a safetensors file -> (tensors, metadata)."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def save_tensors(path, tensors, metadata):
    """Write a safetensors file under a temporary name, then rename it.

    A crash at any moment leaves the previous file whole. The temporary name is always the same,
    so what a kill leaves behind is written over next time.
    """
    from safetensors.torch import save
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:            # a full disk, say: the reason alone would not name the file
        raise OSError(f"{path}: not written ({e})") from None
    finally:
        temporary.unlink(missing_ok=True)


def writable(path):
    """Check before the work starts that a file can be written; its contents are not touched."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or path.is_dir():
            path.open("ab").close()
        elif not path.exists():     # else /dev/null or the like
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise OSError(f"{path}: cannot be written ({e.strerror})") from None
    return path
