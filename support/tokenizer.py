"""Text <-> token ids, as a checkpoint's tokenizer.json or tokenizer.model says.

tokenizer.json is read by the optional package tokenizers. Without one of the two, sentencepiece
reads tokenizer.model, and the text is first split here at special and added tokens. The ids are
then those of the tokenizer.json that such models are published with.

The tests compare ids and decoded texts with transformers 5.23, for tokenizers made like those of
Llama 2 and 3, CodeLlama, Mistral 0.2 and 0.3, Qwen2 and SmolLM2, and for every flag of an added
token in both files. They are equal. Different on purpose:
- A text never gets a second begin-of-text token.
- Of what the files may hold, the length limit, the padding and split_special_tokens are not
  applied.
- A tokenizer.json is believed, whatever its class. Only a LlamaTokenizer's settings count before
  it, and only for where a text gets a space in front; where the file puts none, none is put.
  transformers builds the rules of some classes anew, as of Qwen2Tokenizer.
- A token is special only if a file lists it as an added token. transformers also takes each
  bos_token, pad_token, ..., and additional_special_tokens, and makes up an id where there is none.
- added_tokens_decoder in tokenizer_config.json counts before tokenizer.json, with every flag.
  transformers' PreTrainedTokenizerFast keeps special what tokenizer.json has as special, and its
  Qwen2Tokenizer forgets the other flags of a token that has a role.
- added_tokens.json is not read beside a tokenizer.json, nor is a tokenizer.json where the package
  is missing.
- A tokenizer.model alone begins every text unless add_bos_token is false; in transformers only
  where it is true. A Mistral's, or one without a tokenizer_class, puts a space in front; there not.
  One that normalises texts does so; there a Llama's not, and none merges spaces. add_eos_token is
  not obeyed; there it is.
Where a text gets a space in front, a text that begins with one may have the same ids as without
it. Then decode gives it back without.

What is not known here, beside a tokenizer.model: `normalized`. transformers looks for tokens that
are not normalized first, and for a Mistral 0.2 finds a normalized one only behind a space. Of
tokens that overlap the longest wins here; there one that is found but is no single word still hides
the others.
"""
import codecs
import re
from importlib.util import find_spec

from support.config import read_config
from support.files import blame, need, read_json, read_object
from support.weights import find

SPACE = "\u2581"                    # what stands for a space in the vocabulary of sentencepiece
# A byte-level vocabulary writes a byte as the character of that number; a byte whose character
# cannot be seen as the next one from 256 on.
BYTES = dict(enumerate([*range(33), *range(127, 161), 173], 256))


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
        strange = [i for i in ids if i not in range(self.vocab)]
        need(not strange, f"{self.path}: the tokenizer gives ids {strange[:1]}, by config.json the "
                          f"model knows {self.vocab} tokens")
        return ids

    def decode(self, ids):
        """The text of token ids; special tokens and ids beyond the vocabulary are left out."""
        return self.inner.decode([i for i in ids if i not in self.inner.special])

    def pieces(self, ids):
        """The readable text of each token, special ones too, for pictures: a list of str.

        A character that several tokens share stands whole at the last of them, the others are "".
        Bytes that make no character are U+FFFD; a token beyond the vocabulary is "".
        """
        joined = codecs.getincrementaldecoder("utf-8")("replace")
        return [joined.decode(self.inner.spell(i), n == len(ids)) for n, i in enumerate(ids, 1)]


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
    added: the added tokens by id; special: the ids that decode leaves out. bytewise: whether the
    letters of other tokens stand for bytes.
    """

    def __init__(self, file):
        import tokenizers
        from tokenizers import decoders
        settings = read_settings(file.parent)
        try:
            self.hf = tokenizers.Tokenizer.from_file(str(file))
            self.hf.no_truncation()
            self.hf.no_padding()
            # what tokenizer_config.json says of a token counts before what the file says
            self.hf.add_tokens([tokenizers.AddedToken(**token)
                                for token in added_tokens(settings, {}).values()])
            self.added = self.hf.get_added_tokens_decoder()
            self.special = {i for i, token in self.added.items() if token.special}
            self.bytewise = "ByteLevel" in str(self.hf.decoder)
            probe = self.hf.encode("a")
            self.front = probe.ids[:probe.special_tokens_mask[0]]
            spaced = SPACE in probe.tokens[len(self.front)]
            bos = self.hf.token_to_id(special_tokens(settings).get("bos_token", ""))
        except KeyboardInterrupt:
            raise
        except BaseException as e:          # the package raises Exception; its panics are none
            raise ValueError(f"{file}: not a tokenizer file, or the list of added tokens in "
                             f"tokenizer_config.json is damaged ({e})") from None
        self.begin = self.front or [bos] * (bos is not None)
        # Of a LlamaTokenizer the settings say, and no longer the file, where a text gets a space
        # in front. A file that puts none is believed.
        llama = "LlamaTokenizer" in str(settings.get("tokenizer_class"))
        if spaced and llama and settings["model_type"] != "mistral":
            scheme = where_spaces(settings)
            self.hf.normalizer = None
            self.hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(SPACE, scheme, split=False)
            if scheme == "never":           # then a first space is the text's own
                self.hf.decoder = decoders.Sequence(
                    [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])

    def encode(self, text, bos):
        return self.hf.encode(text, add_special_tokens=bos).ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=False)

    def spell(self, token):
        """The bytes of one token."""
        text = self.hf.id_to_token(token) or ""
        if self.bytewise and token not in self.added:
            return text.translate(BYTES).encode("latin-1", "replace")
        return spell(text)


# --------------------------------------------------------------------------------- tokenizer.model


class FromModel:
    """tokenizer.model: a text is split at special and added tokens, the longest first, and
    sentencepiece reads what is between them.

    begin, front, special: as of FromJson. sp puts a space in front of every text, bare does not.
    marks: {text of a special or added token: its id}; pieces: {id: text} of all tokens.
    """

    def __init__(self, file):
        from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor
        settings = read_settings(file.parent)
        with blame(file, "not a sentencepiece model, or the list of added tokens is damaged"):
            data = file.read_bytes()
            # A part that stands twice in such a file is merged, and the later setting counts.
            bare = SentencePieceNormalizer(model_proto=data, add_dummy_prefix=False)
            self.sp = SentencePieceProcessor(model_proto=data)
            self.bare = SentencePieceProcessor(model_proto=data + bare.serialized_model_proto())
            self.pieces = {i: self.sp.id_to_piece(i) for i in range(self.sp.vocab_size())}
            # pieces that the model's maker defined for use in texts are found by sentencepiece
            marks = {i: {"content": text, "special": True} for i, text in self.pieces.items()
                     if self.sp.is_control(i) or self.sp.is_unknown(i)}
            marks |= added_tokens(settings, read_object(file.with_name("added_tokens.json")))
            self.special = {i for i, token in marks.items() if token["special"]}
            self.pieces |= {i: token["content"] for i, token in marks.items()}
            self.marks = {self.pieces[i]: i for i in marks}
            longest_first = sorted(self.marks, key=len, reverse=True)
            self.split = re.compile("|".join(pattern(marks[self.marks[text]])
                                             for text in longest_first))
        bos = special_tokens(settings).get("bos_token", "<s>")
        self.begin = [self.marks[bos]] if bos in self.marks else []
        self.front = self.begin * bool(settings.get("add_bos_token", True))
        self.spaces = where_spaces(settings)
        if self.spaces == "never":
            self.sp = self.bare
        if self.sp.encode("a") != self.bare.encode(" a"):
            self.spaces = "model"           # has its own way with spaces: take it as it is

    def encode(self, text, bos):
        ids, end = self.front * bos, 0
        for found in [*self.split.finditer(text), None]:
            part = text[end:found and found.start()]
            bare = part.startswith((" ", SPACE)) or self.spaces == "first" and end
            ids += (self.bare if bare and self.spaces != "model" else self.sp).encode(part)
            if found:
                ids.append(self.marks[found[found.lastindex or 0]])
                end = found.end()
        return ids

    def decode(self, ids):
        return self.sp.decode([self.pieces[i] for i in ids if i in self.pieces])

    def spell(self, token):
        return spell(self.pieces.get(token, ""))


def spell(piece):
    """The bytes of a piece of sentencepiece's, as text is written; <0xE6> is one byte."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


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
    roles = special_tokens(settings).values()
    return {int(i): listed[i] | {"special": listed[i]["content"] in roles
                                 or listed[i].get("special", False)}
            for i in sorted(listed, key=int)}


def pattern(token):
    """A regular expression for an added token; where it swallows the spaces around it, its own
    text is a group.
    """
    text = re.escape(token["content"]) or "(?!)"
    if token.get("single_word"):
        text = rf"(?<!\w){text}(?!\w)"
    left, right = (r"\s*" * bool(token.get(side)) for side in ("lstrip", "rstrip"))
    return f"{left}({text}){right}" if left + right else text


def where_spaces(settings):
    """Where a text gets a space in front, like a word inside a sentence.

    "first": where the whole text begins, "always": after special tokens too; both unless a space
    stands there already. "model": always and whatever stands there, as sentencepiece does it.
    """
    if settings.get("add_prefix_space") is False:
        return "never"
    if not settings.get("legacy"):
        return "first"
    return "model" if settings["model_type"] == "mistral" else "always"
