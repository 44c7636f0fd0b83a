"""Text <-> token ids, as a checkpoint's tokenizer.json or tokenizer.model says.

tokenizer.json is read by the optional package tokenizers. Without one of the two, sentencepiece
reads tokenizer.model, and the text is first split at special and added tokens here. The ids are
those of transformers 5, but for two things: a text never gets a second begin-of-text token, and a
tokenizer.json that puts no space in front of a text is believed. tokenizer.model is read as
tokenizer_config.json says; a tokenizer.json that says otherwise gives other ids.
"""
import importlib.util
import json
import re
from itertools import groupby
from typing import NamedTuple, Optional

from support.checkpoint import find, read_config
from support.files import need, read_json

SPACE = "\u2581"                    # what stands for a space in the vocabulary of sentencepiece
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
WHITE = re.compile(r"\s*")
MAX_TOKEN = 1000                    # characters; what looks for longer ones may take gigabytes


class Tokenizer:
    """Text <-> token ids of a checkpoint.

    prefix: the token that stands for an empty context: begin-of-text, else the model's (first)
    end-of-text; None where there is neither.
    """

    def __init__(self, path):
        root = find(path)
        config = read_config(root / "config.json")
        self.path, self.vocab = root, config["vocab"]
        self.inner = open_files(root, read_settings(root))
        ends = [self.inner.begin, *config["eos"]]
        if not (root / "tokenizer_config.json").is_file():  # which may say: no begin-of-text
            ends.insert(1, config["bos"])
        ends = [token for token in ends if token is not None and 0 <= token < self.vocab]
        self.prefix = ends[0] if ends else None

    def encode(self, text, bos=True):
        """Token ids of a text, a list.

        bos: put the begin-of-text token first where the tokenizer does so and the text does not
        begin with it already; False to go on with a text.
        """
        need(text == "" or is_text(text), "the text holds half a character (a lone surrogate)")
        ids = self.inner.encode(text, bos)
        largest = max(ids, default=0)
        need(largest < self.vocab, f"{self.path}: the tokenizer gives id {largest}, by config.json "
                                   f"the model knows {self.vocab} tokens")
        return ids

    def decode(self, ids):
        """The text of token ids; special tokens are left out."""
        return self.inner.decode(ids)

    def piece(self, token):
        """One token as readable text, for pictures; "" for one beyond the vocabulary."""
        return self.inner.piece(token)


def open_files(root, settings):
    """The reader of the file that is there and can be read."""
    fast, slow = root / "tokenizer.json", root / "tokenizer.model"
    if fast.is_file() and importlib.util.find_spec("tokenizers"):
        return FromJson(fast, settings)
    if not slow.is_file():
        if not fast.is_file():
            raise FileNotFoundError(f"{root}: no tokenizer.model and no tokenizer.json")
        raise ImportError(f"{root} has only a tokenizer.json: `pip install tokenizers` to read it")
    try:
        processors = open_sentencepiece(slow)
    except ValueError as e:
        if not fast.is_file():
            raise
        # Llama 3's tokenizer.model is a list for the package tiktoken
        raise ImportError(f"{e}; `pip install tokenizers` to read tokenizer.json") from None
    return FromModel(*processors, settings)


# ---------------------------------------------------------------------------------- tokenizer.json


class FromJson:
    """tokenizer.json, read by the package tokenizers.

    begin: the id of begin-of-text or None; first: the id that every text gets in front, or None.
    Its post-processor says so alone: add_bos_token beside a tokenizer.json counts nothing.
    """

    def __init__(self, file, settings):
        self.file = file
        self.hf = open_tokenizers(file, settings)
        self.hf.no_truncation()         # a file may come with the lengths of some training
        self.hf.no_padding()
        self.add(settings)
        probe = self.read("a", True)
        self.first = probe.ids[0] if probe.special_tokens_mask[:1] == [1] else None
        self.begin = self.first
        if self.begin is None and settings.begin:
            self.begin = self.hf.token_to_id(settings.begin)
        self.bytewise = "ByteLevel" in str(self.hf.decoder)

    def add(self, settings):
        """Tokens that only the other files know as added or special."""
        from tokenizers import AddedToken
        known = {token.content for token in self.hf.get_added_tokens_decoder().values()}
        new = [token for token in settings.added if token.content not in known]
        for token in new:
            flags = token._asdict()
            del flags["id"]             # the next free one
            self.hf.add_tokens([AddedToken(**flags)])
            got = self.hf.token_to_id(token.content)
            need(got == token.id, f"{self.file}: {token.content!r:.60} would be token {got}, "
                                  f"the list of added tokens says {token.id}")
        roles = sorted(settings.special - known)
        there = [text for text in roles if self.hf.token_to_id(text) is not None]
        self.hf.add_special_tokens(there)

    def read(self, text, bos):
        """The package's Encoding of a text."""
        try:
            return self.hf.encode(text, add_special_tokens=bos)
        except Exception as e:          # the package raises bare Exception
            raise ValueError(f"{self.file}: this tokenizer cannot read a text ({e})") from None

    def encode(self, text, bos):
        ids = self.read(text, bos).ids
        if bos and self.first is not None and ids[:2] == [self.first] * 2:
            del ids[0]                  # the text, a template, began with it itself
        return ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True)

    def piece(self, token):
        if self.bytewise:
            return self.hf.decode([token], skip_special_tokens=False)
        return (self.hf.id_to_token(token) or "").replace(SPACE, " ")   # decode loses a first space


def open_tokenizers(file, settings):
    from tokenizers import Tokenizer as Fast
    raw = read_json(file) if settings.llama else None
    text = json.dumps(raw)
    puts_spaces = '"Prepend"' in text or '"Metaspace"' in text      # Yi's does not
    try:
        if puts_spaces and '"ByteLevel"' not in text:
            # What old files say of spaces no longer counts: tokenizer_config.json does.
            scheme = {"type": "Metaspace", "replacement": SPACE, "split": False,
                      "prepend_scheme": settings.spaces}
            return Fast.from_str(json.dumps({**raw, "normalizer": None, "pre_tokenizer": scheme}))
        return Fast.from_file(str(file))
    except Exception as e:              # the package raises bare Exception
        raise ValueError(f"{file}: not a tokenizer file ({e})") from None


# --------------------------------------------------------------------------------- tokenizer.model


class FromModel:
    """tokenizer.model: the text is split at `marks`, sentencepiece reads what is between them.

    begin: the id of begin-of-text or None; sp puts a space in front of every text, bare does not.
    """

    def __init__(self, sp, bare, settings):
        self.sp, self.bare = sp, bare
        self.spaces = settings.spaces if sp.encode("a") != bare.encode("a") else "model"
        self.marks = {token.content: token for token in own_tokens(sp, settings.special)}
        self.marks |= {token.content: token for token in settings.added}
        self.by_id = {token.id: token for token in self.marks.values()}
        self.split = re.compile("|".join(map(pattern, longest_first(self.marks.values()))))
        begin = sp.bos_id() if sp.bos_id() >= 0 else None
        self.begin = self.marks[settings.begin].id if settings.begin in self.marks else begin
        self.first = self.begin if settings.add_bos else None

    def encode(self, text, bos):
        ids, end = [], 0
        for found in self.split.finditer(text):
            mark, before = self.marks[found[0]], text[end:found.start()]
            ids += self.between(before.rstrip() if mark.lstrip else before, end == 0)
            ids.append(mark.id)
            end = found.end()
            if mark.rstrip:
                end += len(WHITE.match(text, end)[0])
        ids += self.between(text[end:], end == 0)
        if bos and self.first is not None and ids[:1] != [self.first]:
            ids.insert(0, self.first)
        return ids

    def between(self, text, start):
        """The ids of a text without marks; start: nothing stands before it."""
        if self.spaces == "model":
            return self.sp.encode(text)
        if text in (" ", SPACE):
            return self.bare.encode(text)
        spaced = text.startswith((" ", SPACE))
        wanted = self.spaces == "always" or self.spaces == "first" and start
        # the space that stands there is the one that sp puts in front
        return (self.sp if spaced or wanted else self.bare).encode(text[spaced:])

    def decode(self, ids):
        kept = [i for i in ids if i in self.by_id or i < self.sp.vocab_size()]
        kept = [i for i in kept if i not in self.by_id or not self.by_id[i].special]
        text = ""
        for marked, run in groupby(kept, self.by_id.__contains__):
            if marked:
                text += "".join(self.by_id[i].content for i in run)
            else:                       # only the first space of all is not the text's own
                text += (self.bare if text else self.sp).decode(list(run))
        return text

    def piece(self, token):
        if token in self.by_id:
            return self.by_id[token].content
        if token >= self.sp.vocab_size():   # a model's vocabulary may be padded
            return ""
        return self.sp.id_to_piece(token).replace(SPACE, " ")


def open_sentencepiece(file):
    """tokenizer.model -> its processor, and one that puts no space in front of a text."""
    from sentencepiece import SentencePieceProcessor
    try:
        data = file.read_bytes()
        sp = SentencePieceProcessor(model_proto=data)
        sp.id_to_piece(list(range(sp.vocab_size())))    # pieces that are no UTF-8 are known now
        # Fields of a protobuf message may come twice, the later one counts:
        # normalizer_spec (3, 2 bytes) with add_dummy_prefix (3) = 0.
        return sp, SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00")
    except (RuntimeError, OSError, ValueError) as e:
        raise ValueError(f"{file}: not a sentencepiece model ({e})") from None


def own_tokens(sp, special):
    """The pieces of a model that are special: control pieces, the unknown one, those with a role.

    Pieces that its maker defined for use in texts are found by sentencepiece itself.
    """
    everything = list(range(sp.vocab_size()))
    pieces = sp.id_to_piece(everything)
    control, unknown = sp.is_control(everything), sp.is_unknown(everything)
    return [Added(i, piece) for i, piece in enumerate(pieces)
            if control[i] or unknown[i] or piece in special]


def longest_first(tokens):
    return sorted(tokens, key=lambda token: -len(token.content))


def pattern(token):
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text


# ------------------------------------------------------------------------------------ the settings


class Added(NamedTuple):
    """A token that is looked for in a text before the vocabulary is asked."""
    id: int
    content: str
    special: bool = True            # decode leaves it out
    lstrip: bool = False            # takes the white space before it
    rstrip: bool = False            # takes the white space after it
    single_word: bool = False       # is nothing inside a word
    normalized: bool = False


class Settings(NamedTuple):
    """What the files beside the vocabulary say."""
    begin: Optional[str]            # the begin-of-text token
    add_bos: bool                   # every text gets it, where tokenizer.model is read
    special: set                    # the texts of all tokens that have a role
    added: list                     # of Added
    spaces: str                     # see where_spaces
    llama: bool                     # `spaces` holds for a tokenizer.json too


def read_settings(root):
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json -> Settings."""
    file = root / "tokenizer_config.json"
    raw = read_object(file)
    roles = read_object(root / "special_tokens_map.json") | raw
    special = with_role(file, roles)
    begin = content(roles.get("bos_token"))
    family = read_json(root / "config.json")["model_type"]
    return Settings(begin=begin if is_text(begin) else None,
                    add_bos=raw.get("add_bos_token", True) is not False,
                    special=special,
                    added=read_added(root, raw.get("added_tokens_decoder"), special),
                    spaces=where_spaces(raw, family),
                    llama=family == "llama" and raw.get("tokenizer_class") in LLAMA)


def where_spaces(raw, family):
    """Where a text gets a space in front, like a word inside a sentence.

    "first": where the whole text begins, "always": after special tokens too; both unless a space
    stands there already. "model": always and whatever stands there, as sentencepiece does it.
    """
    if raw.get("add_prefix_space") is False:
        return "never"
    if not raw.get("legacy"):
        return "first"
    return "always" if family == "llama" else "model"


def with_role(file, raw):
    """The texts of bos_token, pad_token, ... and of additional_special_tokens."""
    listed = raw.get("additional_special_tokens") or []
    need(isinstance(listed, list), f"{file}: additional_special_tokens is not a list")
    values = [value for name, value in raw.items() if name.endswith("_token")]
    return set(filter(is_text, map(content, values + listed)))


def read_added(root, listed, special):
    """The added tokens, by id: `listed` in tokenizer_config.json, else those of added_tokens.json.

    Raises ValueError for what is no token, has no id, or stands there twice.
    """
    file = root / "tokenizer_config.json"
    if listed is None:
        file = root / "added_tokens.json"
        pairs = [(key, {"content": text}) for text, key in read_object(file).items()]
    else:
        need(isinstance(listed, dict), f"{file}: added_tokens_decoder is not an object")
        pairs = [(number(key), token) for key, token in listed.items()]
    tokens, seen = [], set()
    for key, entry in pairs:
        token = read_token(file, key, entry, special)
        need(not {token.id, token.content} & seen,
             f"{file}: added token {token.id} ({token.content!r:.60}) stands there twice")
        seen |= {token.id, token.content}
        tokens.append(token)
    return sorted(tokens)


def read_token(file, key, raw, special):
    """An entry of a list of added tokens -> Added."""
    where = f"{file}: added token {key!r:.60}"
    need(isinstance(raw, dict), f"{where} is not an object")
    text = raw.get("content")
    need(is_text(text) and len(text) <= MAX_TOKEN,
         f"{where} is {text!r:.60}, expected a text of 1 to {MAX_TOKEN} characters")
    need(type(key) is int and 0 <= key < 2**31,
         f"{where} ({text!r:.60}): its id is not a whole number from 0 on")
    flags = {name: raw.get(name, False) for name in Added._fields[2:]}
    for name, value in flags.items():
        need(type(value) is bool, f"{where}: {name} is {value!r:.60}, expected true or false")
    flags["special"] |= text in special
    return Added(key, text, **flags)


def number(key):
    """A key of a JSON object as the id it spells; as it is, where it spells none."""
    return int(key) if key.isdecimal() and len(key) < 12 else key


def content(value):
    """A token is written as its text or as an object that holds it."""
    return value.get("content") if isinstance(value, dict) else value


def is_text(value):
    """Whether this is a str, not empty, of whole characters."""
    try:
        return isinstance(value, str) and len(value.encode()) > 0
    except UnicodeEncodeError:
        return False


def read_object(file):
    """A JSON object from a file; {} where there is no file."""
    raw = read_json(file) if file.is_file() else {}
    need(isinstance(raw, dict), f"{file}: expected a JSON object")
    return raw
