"""Text <-> token ids, as a checkpoint's tokenizer.json or tokenizer.model says.

tokenizer.json is read by the optional package tokenizers. Without one of the two, sentencepiece
reads tokenizer.model, and the text is first split here at special and added tokens. The ids are
then those of the tokenizer.json that such models are published with.

The tests compare ids and decoded texts with transformers 5.23, for tokenizers made like those of
Llama 2 and 3, Mistral 0.2 and 0.3, Qwen2 and SmolLM2. They are equal. Different on purpose:
- A text never gets a second begin-of-text token.
- The length limit and the padding that a tokenizer.json may hold are not applied.
- A tokenizer.json that puts no space in front of a text is believed, whatever its class.
- A token is special only if a file lists it as an added token. transformers also takes each
  bos_token, pad_token, ... for one, and makes up an id where there is none.
- What tokenizer.json has as special stays so, whatever tokenizer_config.json says. Its other flags
  count for all tokens; transformers' Qwen2Tokenizer forgets them where a token has a role.
- added_tokens.json is not read beside a tokenizer.json.
- A tokenizer.model alone begins every text unless add_bos_token is false, a Mistral's puts a space
  in front, and one that normalises texts does so. transformers does none of the three, but obeys
  add_eos_token.
What is not known here: lstrip, rstrip and single_word of a token beside a tokenizer.model; and
where tokenizer_config.json has add_prefix_space false but the tokenizer.json puts spaces, the ids
are right and decode loses a first space.
"""
import re
from importlib.util import find_spec

from support.config import read_config
from support.files import blame, need, read_json, read_object
from support.weights import find

SPACE = "\u2581"                    # what stands for a space in the vocabulary of sentencepiece
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


class Tokenizer:
    """Text <-> token ids of a checkpoint.

    path: the checkpoint's directory; vocab: how many tokens its model knows.
    prefix: the token that stands for an empty context: begin-of-text, else the model's (first)
    end-of-text; None where there is neither.
    """

    def __init__(self, path):
        self.path = find(path)
        config = read_config(self.path / "config.json")
        self.vocab = config["vocab"]
        self.inner = open_files(self.path)
        self.prefix = next(iter([*self.inner.begin, *config["eos"]]), None)

    def encode(self, text, bos=True):
        """Token ids of a text, a list.

        bos: put the begin-of-text token first where the tokenizer does so and the text does not
        begin with it already; False to go on with a text.
        """
        need(not re.search("[\ud800-\udfff]", text),
             "the text holds half a character (a lone surrogate)")
        ids = self.inner.encode(text, bos)
        if bos and ids[:2] == self.inner.front * 2:     # a chat template writes one itself
            ids = ids[1:]
        for token in (min(ids, default=0), max(ids, default=0)):
            need(0 <= token < self.vocab, f"{self.path}: the tokenizer gives id {token}, by "
                                          f"config.json the model knows {self.vocab} tokens")
        return ids

    def decode(self, ids):
        """The text of token ids; special tokens and ids beyond the vocabulary are left out."""
        return self.inner.decode(ids)

    def piece(self, token):
        """One token as readable text, for pictures; "" for one beyond the vocabulary."""
        return self.inner.piece(token)


def open_files(root):
    """The reader of the file that is there and can be read."""
    fast, slow = root / "tokenizer.json", root / "tokenizer.model"
    if fast.is_file() and find_spec("tokenizers"):
        return FromJson(fast)
    if slow.is_file():
        return FromModel(slow)
    if fast.is_file():
        raise ImportError(f"{root} has only a tokenizer.json: `pip install tokenizers` to read it")
    raise FileNotFoundError(f"{root}: no tokenizer.model and no tokenizer.json")


# ---------------------------------------------------------------------------------- tokenizer.json


class FromJson:
    """tokenizer.json, read by the package tokenizers (hf).

    begin: the id of begin-of-text in a list, [] where there is none. front: what every text gets
    in front, begin or []; the file alone says so, add_bos_token beside it counts nothing.
    """

    def __init__(self, file):
        import tokenizers
        settings = read_settings(file.parent)
        try:
            self.hf = tokenizers.Tokenizer.from_file(str(file))
            self.hf.no_truncation()
            self.hf.no_padding()
            # what tokenizer_config.json says of a token counts before what the file says
            self.hf.add_tokens([tokenizers.AddedToken(**token)
                                for token in added_tokens(settings, {}).values()])
            probe = self.hf.encode("a")
            self.front = probe.ids[:probe.special_tokens_mask[0]]
            spaced = probe.tokens[len(self.front)].startswith(SPACE)
        except Exception as e:              # the package raises bare Exception
            raise ValueError(f"{file}: not a tokenizer file, or the list of added tokens in "
                             f"tokenizer_config.json is damaged ({e})") from None
        bos = self.hf.token_to_id(special_tokens(settings).get("bos_token", ""))
        self.begin = self.front or [bos] * (bos is not None)
        # Of a LlamaTokenizer the settings say, and no longer the file, where a text gets a space
        # in front. A file that puts none is believed.
        llama = settings["model_type"] == "llama" and settings.get("tokenizer_class") in LLAMA
        if llama and spaced:
            scheme = where_spaces(settings)
            self.hf.normalizer = None
            self.hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(SPACE, scheme, split=False)

    def encode(self, text, bos):
        return self.hf.encode(text, add_special_tokens=bos).ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True)

    def piece(self, token):
        if "ByteLevel" in str(self.hf.decoder):
            return self.hf.decode([token], skip_special_tokens=False)
        return (self.hf.id_to_token(token) or "").replace(SPACE, " ")   # decode loses a first space


# --------------------------------------------------------------------------------- tokenizer.model


class FromModel:
    """tokenizer.model: a text is split at special and added tokens, the longest first, and
    sentencepiece reads what is between them.

    begin, front: as of FromJson. sp puts a space in front of every text, bare does not.
    marks: {text of a special or added token: its id}; pieces: {id: text} of all tokens.
    """

    def __init__(self, file):
        settings = read_settings(file.parent)
        with blame(file, "not a sentencepiece model, or the list of added tokens is damaged"):
            self.sp, self.bare = open_sentencepiece(file)
            # pieces that the model's maker defined for use in texts are found by sentencepiece
            pieces = {i: self.sp.id_to_piece(i) for i in range(self.sp.vocab_size())}
            marks = {i: {"content": text, "special": True} for i, text in pieces.items()
                     if self.sp.is_control(i) or self.sp.is_unknown(i)}
            marks |= added_tokens(settings, read_object(file.with_name("added_tokens.json")))
            self.special = {i for i, token in marks.items() if token["special"]}
            self.marks = {token["content"]: i for i, token in marks.items()}
            self.pieces = pieces | {i: text for text, i in self.marks.items()}
            longest_first = sorted(filter(None, self.marks), key=len, reverse=True)
            self.split = re.compile("|".join(map(re.escape, longest_first)))
        bos = special_tokens(settings).get("bos_token", "<s>")
        self.begin = [self.marks[bos]] if bos in self.marks else []
        self.front = self.begin if settings.get("add_bos_token", True) else []
        self.spaces = where_spaces(settings)
        if self.spaces == "never":
            self.sp = self.bare
        if self.sp.encode("a") == self.bare.encode("a"):
            self.spaces = "model"           # sp puts no space in front: take it as it is

    def encode(self, text, bos):
        ids, end = self.front * bos, 0
        for found in self.split.finditer(text):
            ids += self.between(text[end:found.start()], end == 0)
            ids.append(self.marks[found[0]])
            end = found.end()
        return ids + self.between(text[end:], end == 0)

    def between(self, text, start):
        """The ids of a text without marks; start: nothing stands before it."""
        if self.spaces != "model" and text.startswith((" ", SPACE)):
            # sp would put a second one in front; alone it would be nothing to sp
            return self.sp.encode(text[1:]) or self.bare.encode(text)
        spaced = start or self.spaces != "first"
        return (self.sp if spaced else self.bare).encode(text)

    def decode(self, ids):
        return self.sp.decode([self.pieces[i] for i in ids
                               if i in self.pieces and i not in self.special])

    def piece(self, token):
        return self.pieces.get(token, "").replace(SPACE, " ")


def open_sentencepiece(file):
    """tokenizer.model -> its processor, and one that puts no space in front of a text."""
    from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor
    data = file.read_bytes()
    # A part that stands twice in such a file is merged, and the later setting counts.
    bare = SentencePieceNormalizer(model_proto=data, add_dummy_prefix=False)
    both = data + bare.serialized_model_proto()
    return SentencePieceProcessor(model_proto=data), SentencePieceProcessor(model_proto=both)


# ------------------------------------------------------------------------------ the files beside it


def read_settings(root):
    """What config.json, tokenizer_config.json and special_tokens_map.json say, one dict."""
    settings = read_json(root / "config.json") | read_object(root / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return settings | read_object(root / "special_tokens_map.json")     # of older checkpoints


def special_tokens(settings):
    """The texts of the tokens that have a role, {"bos_token": "<s>", ...}."""
    texts = {}
    for name, token in settings.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts


def added_tokens(settings, older):
    """The entries of tokenizer_config.json's added_tokens_decoder by id; else of added_tokens.json,
    {text: id}. What has a role is special.
    """
    listed = {i: {"content": text} for text, i in older.items()}
    listed = settings.get("added_tokens_decoder", listed)
    roles, tokens = special_tokens(settings).values(), {}
    for i in sorted(listed, key=int):
        special = listed[i]["content"] in roles or listed[i].get("special", False)
        tokens[int(i)] = {**listed[i], "special": special}
    return tokens


def where_spaces(settings):
    """Where a text gets a space in front, like a word inside a sentence.

    "first": where the whole text begins, "always": after special tokens too; both unless a space
    stands there already. "model": always and whatever stands there, as sentencepiece does it.
    """
    if settings.get("add_prefix_space") is False:
        return "never"
    if not settings.get("legacy"):
        return "first"
    return "always" if settings["model_type"] == "llama" else "model"
