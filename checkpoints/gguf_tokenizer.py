"""The tokenizer that stands in the metadata of a GGUF file -> the files of a checkpoint.

Byte-level BPE (tokenizer.ggml.model = gpt2) becomes a tokenizer.json. Its list of merges is in the
file; how a text is cut into words before is not, only a name for it, tokenizer.ggml.pre. WORDS says
what the names stand for in the models' own tokenizer.json. Sentencepiece (= llama) becomes a
tokenizer.model, whose three lists (pieces, scores, types) are in the file as they were.
"""
import struct
from typing import NamedTuple

from support.files import need

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)   # the types of tokens
ADDED = -1000.0                     # the score of tokens that were added to a sentencepiece model


class Words(NamedTuple):
    """How a byte-level tokenizer cuts a text into words before its merges are asked."""
    split: str = ""                 # a regular expression; "": GPT-2's words
    digits: bool = False            # each digit stands alone
    nfc: bool = False               # the text's characters are composed first
    whole: bool = False             # a word that is a token needs no merges
    begin: bool = False             # texts get a begin-of-text token, if the file does not say


LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = Words(LETTERS + r"\p{N}{1,3}" + REST, whole=True, begin=True)
WORDS = {
    "gpt-2": Words(),
    "smollm": Words(digits=True),
    "starcoder": Words(digits=True),
    "refact": Words(digits=True),
    "qwen2": Words(LETTERS + r"\p{N}" + REST, nfc=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
}


def plan_tokenizer(gguf, pre=None):
    """The tokenizer of an open file -> (its file's name, what writes it, tokenizer_config.json).

    pre: the name of the words where the file has none. Raises ValueError for what is unknown.
    """
    for name in ("precompiled_charsmap", "remove_extra_whitespaces", "add_eos_token"):
        need(not gguf.get(f"tokenizer.ggml.{name}"),
             f"{gguf.path}: tokenizer.ggml.{name} is not supported")
    tokens = read_tokens(gguf)
    kind = gguf.field("tokenizer.ggml.model")
    need(kind in ("gpt2", "llama"), f"{gguf.path}: the tokenizer {kind!r:.60} is not supported "
                                    "(gpt2: byte-level BPE, llama: sentencepiece)")
    config = roles(gguf, tokens)
    if kind == "llama":
        return "tokenizer.model", *sentencepiece(gguf, tokens, config)
    return "tokenizer.json", *byte_level(gguf, tokens, config, pre)


def vocabulary(gguf):
    """The texts of all tokens."""
    return read_list(gguf, "tokenizer.ggml.tokens", str)


def read_list(gguf, name, kind):
    """Metadata that are a list of texts or numbers."""
    value = gguf.field(name)
    need(isinstance(value, list) and value and all(type(each) is kind for each in value),
         f"{gguf.path}: {name} is not a list of {kind.__name__}")
    return value


def read_tokens(gguf):
    """The tokens, [(text, type)] in the order of their ids."""
    texts, kinds = vocabulary(gguf), read_list(gguf, "tokenizer.ggml.token_type", int)
    need(len(texts) == len(kinds),
         f"{gguf.path}: tokenizer.ggml.tokens and token_type differ in length")
    need(len(set(texts)) == len(texts), f"{gguf.path}: a token stands there twice")
    return list(zip(texts, kinds))


def token_id(gguf, role, default=None):
    """The id of the token with that role, bos or eos, say; None where there is none."""
    name = f"tokenizer.ggml.{role}_token_id"
    token = gguf.get(name, default)
    count = len(vocabulary(gguf))
    need(token is None or type(token) is int and 0 <= token < count,
         f"{gguf.path}: {name} is {token!r:.60}, there are {count} tokens")
    return token


def roles(gguf, tokens):
    """What tokenizer_config.json says of every kind of tokenizer."""
    sp = gguf.get("tokenizer.ggml.model") == "llama"    # the ids a sentencepiece file may leave out
    ids = {"bos_token": token_id(gguf, "bos", 1 if sp else None),
           "eos_token": token_id(gguf, "eos", 2 if sp else None),
           "unk_token": token_id(gguf, "unknown", 0 if sp else None),
           "pad_token": token_id(gguf, "padding")}
    config = {role: tokens[token][0] for role, token in ids.items() if token is not None}
    config["clean_up_tokenization_spaces"] = False
    if gguf.get("tokenizer.chat_template"):
        config["chat_template"] = gguf.get("tokenizer.chat_template")
    return config


# ---------------------------------------------------------------------------------- byte-level BPE


def byte_level(gguf, tokens, config, pre):
    """-> (what writes tokenizer.json, tokenizer_config.json)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    pre = pre or gguf.get("tokenizer.ggml.pre")
    need(pre in WORDS, f"{gguf.path}: tokenizer.ggml.pre is {pre!r:.60}, known are "
                       f"{', '.join(WORDS)}; if you know which of them cuts this model's texts "
                       "into words, name it with --pre")
    words = WORDS[pre]
    vocab = {text: i for i, (text, kind) in enumerate(tokens) if kind != UNUSED}
    pairs = read_list(gguf, "tokenizer.ggml.merges", str)
    merges = [tuple(pair.split(" ")) for pair in pairs]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=words.whole)
    except Exception as e:          # the package raises bare Exception
        raise ValueError(f"{gguf.path}: tokenizer.ggml.merges do not belong to its tokens ({e})"
                         ) from None
    tokenizer = Tokenizer(model)
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cutter(words)
    tokenizer.decoder = decoders.ByteLevel()
    for text, kind in tokens:       # no space is put around one
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    begins = gguf.get("tokenizer.ggml.add_bos_token", words.begin)
    if begins:
        tokenizer.post_processor = put_first(gguf, config)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": begins}
    return lambda path: tokenizer.save(str(path)), config


def cutter(words):
    """Words -> what the package tokenizers calls a pre-tokenizer."""
    from tokenizers import Regex, pre_tokenizers
    # no space is put before the text
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words.split)
    if words.split:
        first = pre_tokenizers.Split(Regex(words.split), behavior="isolated")
    elif words.digits:
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        return encode
    return pre_tokenizers.Sequence([first, encode])


def put_first(gguf, config):
    """What puts the begin-of-text token in front of every text."""
    from tokenizers import processors
    need("bos_token" in config, f"{gguf.path}: texts shall begin with a begin-of-text token, but "
                                "tokenizer.ggml.bos_token_id is missing")
    begin = config["bos_token"]
    number = token_id(gguf, "bos")
    return processors.TemplateProcessing(single=[begin, "$A"], pair=[begin, "$A", begin, "$B"],
                                         special_tokens=[(begin, number)])


# ---------------------------------------------------------------------------------- sentencepiece


def sentencepiece(gguf, tokens, config):
    """-> (what writes tokenizer.model, tokenizer_config.json)."""
    scores = read_list(gguf, "tokenizer.ggml.scores", float)
    need(len(scores) == len(tokens),
         f"{gguf.path}: tokenizer.ggml.tokens and scores differ in length")
    ranks = [s for s, (_, kind) in zip(scores, tokens) if kind == NORMAL]
    need(len(set(ranks)) > 1 and all(s == int(s) for s in ranks),
         f"{gguf.path}: tokenizer.ggml.scores are no ranks of merges; only the BPE kind of "
         "sentencepiece is supported")
    space = gguf.get("tokenizer.ggml.add_space_prefix", True)
    data = model_proto(tokens, scores, config, space)
    try:
        from sentencepiece import SentencePieceProcessor
        SentencePieceProcessor(model_proto=data)
    except RuntimeError as e:
        raise ValueError(f"{gguf.path}: its tokens make no sentencepiece model ({e})") from None
    added = {str(i): {"content": text, "special": kind == CONTROL, "normalized": False,
                      "lstrip": False, "rstrip": False, "single_word": False}
             for i, ((text, kind), score) in enumerate(zip(tokens, scores))
             if kind in (CONTROL, USER_DEFINED) and score == ADDED}
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False,
               "add_bos_token": gguf.get("tokenizer.ggml.add_bos_token", True),
               "added_tokens_decoder": added}
    if not space:
        config["add_prefix_space"] = False
    return lambda path: path.write_bytes(data), config


def model_proto(tokens, scores, config, space):
    """The bytes of a tokenizer.model, which is a protobuf message of sentencepiece.

    space: a text without a space in front gets one.
    """
    pieces = [message((1, text), (2, float(score)), (3, kind))
              for (text, kind), score in zip(tokens, scores)]
    fallback = any(kind == BYTE for _, kind in tokens)
    trainer = message((3, 2), (4, len(tokens)), (35, int(fallback)),        # 3, 2: BPE
                      *((field, config[role]) for field, role in
                        ((45, "unk_token"), (46, "bos_token"), (47, "eos_token"))
                        if role in config))
    # without a table of characters, with the first space, runs of spaces stay
    normalizer = message((1, "identity"), (3, int(space)), (4, 0))
    return message(*((1, piece) for piece in pieces), (2, trainer), (3, normalizer))


def message(*fields):
    """(number, value) pairs -> a protobuf message; a value is an int, a float, a str or bytes."""
    out = []
    for number, value in fields:
        if isinstance(value, float):
            out += [varint(number << 3 | 5), struct.pack("<f", value)]
        elif isinstance(value, int):
            out += [varint(number << 3), varint(value)]
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += [varint(number << 3 | 2), varint(len(raw)), raw]
    return b"".join(out)


def varint(value):
    """A whole number from 0 on, seven bits a byte, the lowest first."""
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
