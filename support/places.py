"""Where things lie on this disk: checkpoints, the rows to train on, trained predictors.

What is not there is refused in one line that says how to get it. Nothing is downloaded here.
"""
import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"
PREDICTORS = "predictors.safetensors"
DOLLY = "databricks/databricks-dolly-15k"
# Short names that README.md speaks of, and what brings them here.
GET = {
    "smollm2": "python checkpoints/smollm2.py",
    "qwen2.5-coder-0.5b": "python checkpoints/qwen2_5_coder.py 0.5b",
    "qwen2.5-coder-1.5b": "python checkpoints/qwen2_5_coder.py 1.5b",
    "llama-7b": "hf download meta-llama/Llama-2-7b-hf --local-dir checkpoints/llama-7b",
    "mistral-7b": "hf download mistralai/Mistral-7B-v0.1 --local-dir checkpoints/mistral-7b",
    "llama-3-8b": "hf download meta-llama/Meta-Llama-3-8B --local-dir checkpoints/llama-3-8b",
}
UNSAFE = ("*.bin", "*.pth", "*.pt")


# ------------------------------------------------------------------------------------ checkpoints


def find(path):
    """A checkpoint's directory: a bare name under checkpoints/ first, a path, or a Hub id.

    Raises FileNotFoundError or ValueError that says what to do.
    """
    text = str(path)
    if text.startswith("random:"):
        raise ValueError(f"{text}: random weights are for timings (infer.py --bench, lab.speed) "
                         "and have no tokenizer: name a checkpoint directory here")
    for place in places(text):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(absent(text))


def places(text):
    """Where a checkpoint of this name may lie, the first that counts first."""
    here, ours = Path(text), CHECKPOINTS / text
    found = [ours, here] if is_name(text) else [here, ours]
    return found + snapshots("models", text)


def is_name(text):
    """Whether this is a name alone, no path."""
    return Path(text).name == text and text not in ("", ".", "..")


def is_hub_id(text):
    """Whether this could be OWNER/NAME, as the Hugging Face Hub names a repository."""
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~", "checkpoints/"))


def snapshots(kind, text):
    """The revision of a Hub repository that its cache holds as main, [Path] or []."""
    if not is_hub_id(text):
        return []
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = cache / f"{kind}--{text.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return []
    return [repository / "snapshots" / revision] if is_name(revision) else []


def absent(text):
    """Why there is no checkpoint here, and what to do, as one line."""
    path = Path(text)
    if text.endswith(".gguf"):
        return (f"{text} is a GGUF file: `python checkpoints/gguf.py {text} --out "
                f"checkpoints/{path.stem.lower()}` converts it, then --ckpt {path.stem.lower()}")
    if path.is_file():
        return (f"{text} is a file: a checkpoint is the directory that holds it, with config.json "
                f"(--ckpt {path.parent})")
    if path.name in GET and not path.is_absolute():
        return f"no checkpoint {text!r} here yet: get it with `{GET[path.name]}`"
    for place in places(text):
        if place.is_dir() and only_unsafe(place):
            return unsafe(place)
        if place.is_dir():
            return (f"{place} has no config.json: a checkpoint is a directory in Hugging Face "
                    "layout (config.json, safetensors, tokenizer)")
    near = nearest(path.name)
    if near:
        return f"no checkpoint {text!r}: do you mean --ckpt {near}?"
    if is_hub_id(text):
        return (f"{text} is not on this disk: `hf download {text}` gets it (pip install "
                f"huggingface_hub), or give it a short name with --local-dir checkpoints/"
                f"{path.name}")
    return (f"no checkpoint {text!r}: expected a directory with config.json, under checkpoints/ or "
            "as given, or a Hub id (README.md says how to get one; random:llama-7b, "
            "random:mistral-7b, random:llama-3-8b need none)")


def nearest(name):
    """The checkpoint under checkpoints/ that a name not found there looks like, or ""."""
    names = [place.parent.name for place in CHECKPOINTS.glob("*/config.json")]
    found = difflib.get_close_matches(name.lower(), names, 1, cutoff=0.8)
    return found[0] if found else ""


def only_unsafe(root):
    """Whether a directory's weights are in files alone that Python would have to unpickle."""
    return any(any(root.glob(kind)) for kind in UNSAFE) and not any(root.glob("*.safetensors"))


def unsafe(root):
    """What to do about them, as one line."""
    return (f"{root} holds no safetensors but {' or '.join(UNSAFE)}, which may run any code when "
            "they are read: get the weights as safetensors (hf download ... --include "
            "\"*.safetensors\")")


# ------------------------------------------------------------------------------------ other files


def own_rows(ckpt):
    """The rows that lie beside a checkpoint's weights, a Path; None where there are none."""
    file = find(ckpt) / "train.jsonl"
    return file if file.is_file() else None


def rows_at_hand(ckpt):
    """The data file where none is named: the checkpoint's own rows, else Dolly where it lies.

    Raises FileNotFoundError with the command that gets it.
    """
    own = own_rows(ckpt)
    if own:
        return own
    root, name = find(ckpt), f"{DOLLY.split('/')[1]}.jsonl"
    folders = [Path(), Path("data"), ROOT, ROOT / "data", root, root.parent]
    for folder in [*folders, *snapshots("datasets", DOLLY)]:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{ckpt} has no rows of its own and {name} is not here: `hf download {DOLLY} --repo-type "
        "dataset --include \"*.jsonl\" --local-dir .` gets it (pip install huggingface_hub), or "
        "name a file with --data")


def trained_here(ckpt):
    """The folder into which train.py writes for a checkpoint unless --out names another."""
    name = Path(ckpt).name or Path(ckpt).resolve().name
    return Path("out") / name


def predictors_file(ckpt, asked=None):
    """The predictors to use: the file or folder asked for, else those trained here, else those
    that lie in the checkpoint's directory -> Path, or None where there are none.
    """
    if asked:
        asked = Path(asked)
        return asked / PREDICTORS if asked.is_dir() else asked
    for folder in (trained_here(ckpt), find(ckpt)):
        if (folder / PREDICTORS).is_file():
            return folder / PREDICTORS
    return None
