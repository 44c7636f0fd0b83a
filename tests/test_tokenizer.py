"""support/tokenizer.py: text <-> ids by tokenizer.json and tokenizer.model, as transformers does.

Shrunken tokenizers of the published kinds are made here: a few hundred pieces, but the special
tokens, the settings and the rules for spaces, digits and words of the real files.
"""
import functools
import importlib.util
import io
import itertools
import json
import sys

import pytest
import sentencepiece

import golden
from conftest import ENGLISH, TOY, needs, real_weights
from model import Tokenizer

WORDS = "The fog is on the sea. user assistant system naïve café 1234567890 times"
INST = ("[INST]", "[/INST]")
CHATML = ("<|im_start|>", "<|im_end|>")
TURN = "<|im_start|>user\nThe fog<|im_end|>\n<|im_start|>assistant\n"
PLAIN = [
    "The fog", "", " ", "  ", " The", "▁The",
    "  The  fog \n",
    "\n\nThe\tfog\r\n\r\n",
    "naïve cafe\u0301",
    "東京 🙂🏽 x",
    "１２３ ½ 2045 days",
    "don't, I'M (no)  {x}   y",
    ENGLISH[:400],
]


def change(path, **new):
    """Set entries of a JSON file, which need not be there."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **new}))


# ------------------------------------------------------------------------- shrunken tokenizers


@functools.cache
def trained(control=(), user=(), dummy=True):
    """A tokenizer.model as Llama 2 has it, bytes: 256 bytes and 220 pieces of English words."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 9 + ENGLISH.split("\n")), model_writer=out,
        vocab_size=480, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        control_symbols=list(control), user_defined_symbols=list(user), add_dummy_prefix=dummy,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return out.getvalue()


def converted(model, spaces):
    """A tokenizer.model as a tokenizer.json, an object of the package tokenizers.

    spaces: "prepend" as Llama 2 and Mistral 0.2 have it, "first" as Mistral 0.3.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i)):
            halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            merges += [(i, vocab[a], (a, b)) for a, b in halves if a in vocab and b in vocab]
    made = Fast(models.BPE(vocab=vocab, merges=[pair for *_, pair in sorted(merges)],
                           unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if spaces == "prepend":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=spaces, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    add(made, *(sp.id_to_piece(i) for i in range(sp.vocab_size())
                if sp.is_control(i) or sp.is_unknown(i)))
    return made


def add(made, *texts, **flags):
    from tokenizers import AddedToken
    made.add_tokens([AddedToken(text, special=True, normalized=False, **flags) for text in texts])


# the rule that parts words: of Llama 3 three digits stay together, of Qwen2 one
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+"
         r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def bytewise(before, parts, first=(), last=(), normalizer=None, **model):
    """A byte-level BPE tokenizer: `first` special tokens, 400 pieces, `last` special tokens.

    before: the pre-tokenizers in front of the bytes; parts: whether these part words.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    made = Fast(models.BPE(**model))
    if normalizer:
        made.normalizer = normalizer
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=parts)
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, letters])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(first), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([WORDS, ENGLISH], trainer)
    add(made, *last)
    return made


def split(digits):
    from tokenizers import Regex, pre_tokenizers
    return pre_tokenizers.Split(Regex(SPLIT.replace("DIGITS", digits)), "isolated")


def llama3():
    from tokenizers import processors
    begin = "<|begin_of_text|>"
    last = (begin, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    made = bytewise([split("{1,3}")], False, last=last, ignore_merges=True)
    template = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, made.token_to_id(begin))])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return made


def qwen2():
    from tokenizers import normalizers
    return bytewise([split("")], False, last=("<|endoftext|>", *CHATML),
                    normalizer=normalizers.NFC())


def smollm2():
    from tokenizers import pre_tokenizers
    first = ("<|endoftext|>", *CHATML, "<repo_name>")
    return bytewise([pre_tokenizers.Digits(individual_digits=True)], True, first)


MODELS = {"Llama-2": trained, "OpenHermes": trained, "Mistral 0.2": trained,
          "Mistral 0.3": functools.partial(trained, INST)}
SPACES = {"Llama-2": "prepend", "OpenHermes": "prepend", "Mistral 0.2": "prepend",
          "Mistral 0.3": "first"}
FAMILY = {"Llama-2": "llama2", "Llama-3": "llama2", "SmolLM2": "llama2", "Qwen2": "qwen2",
          "OpenHermes": "mistral", "Mistral 0.2": "mistral", "Mistral 0.3": "mistral"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
SETTINGS = {
    "Llama-2": {**LLAMA, "legacy": False},
    "OpenHermes": {**LLAMA, "legacy": True, "eos_token": "<|im_end|>"},
    "Mistral 0.2": {**LLAMA, "legacy": True},
    "Mistral 0.3": {**LLAMA, "legacy": False},
    "Llama-3": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>"},
    "Qwen2": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "add_prefix_space": False, "unk_token": None},
    "SmolLM2": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
                "add_prefix_space": False},
}
BYTEWISE = {"Llama-3": llama3, "Qwen2": qwen2, "SmolLM2": smollm2}


def listed(fast):
    """The added tokens of a tokenizer as tokenizer_config.json lists them."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {str(i): {name: getattr(token, name) for name in names}
            for i, token in fast.get_added_tokens_decoder().items()}


def write(folder, kind):
    """The tokenizer's files of a kind and its config.json -> the folder."""
    golden.write_config(folder, {**golden.cases()[FAMILY[kind]], "vocab_size": 600})
    if kind in BYTEWISE:
        fast = BYTEWISE[kind]()
    else:
        model = MODELS[kind]()
        (folder / "tokenizer.model").write_bytes(model)
        fast = converted(model, SPACES[kind])
    if kind == "OpenHermes":
        add(fast, *CHATML)
    fast.save(str(folder / "tokenizer.json"))
    settings = {**SETTINGS[kind], "added_tokens_decoder": listed(fast)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def special_texts(kind):
    """Texts in which the special tokens of a kind stand, at the edges, in a row, between spaces."""
    marks = {"Llama-2": ("<s>", "</s>"), "Mistral 0.2": ("</s>", "<unk>"), "Mistral 0.3": INST,
             "Llama-3": ("<|eot_id|>", "<|start_header_id|>")}
    a, b = marks.get(kind, CHATML)
    return [
        TURN,
        "[INST] The fog [/INST]",
        f"{a}The fog{b}\n",
        f"{a} The {b} fog{a}{b}",
        f"  {a}  {b}",
        f"The{a}\n\n{b}the",
        f"{a}é{b} é",
        "x<s></s>y",
        f"{a[:-1]} {b[1:]}",
    ]


def without_package(folder, monkeypatch):
    """The tokenizer of a folder where the package tokenizers is not installed."""
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "tokenizers", None)
        return Tokenizer(folder)


def pieces(tokenizer, text, bos=True):
    return [tokenizer.piece(i) for i in tokenizer.encode(text, bos)]


# -------------------------------------------------------------------------------- transformers' ids


@needs("tokenizers")
@pytest.mark.parametrize("kind", FAMILY)
def test_ids_are_those_of_transformers(kind, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    reference = transformers.AutoTokenizer.from_pretrained(write(tmp_path, kind))
    ours = [Tokenizer(tmp_path)]
    if kind in MODELS:
        ours.append(without_package(tmp_path, monkeypatch))
    for text, tokenizer in itertools.product(PLAIN + special_texts(kind), ours):
        bare = reference(text, add_special_tokens=False).input_ids
        whole = reference(text).input_ids
        if len(whole) > len(bare) and bare[:1] == whole[:1]:    # begun by the text already
            whole = bare
        assert tokenizer.encode(text) == whole, text
        assert tokenizer.encode(text, bos=False) == bare, text
        assert tokenizer.decode(whole) == reference.decode(whole, skip_special_tokens=True), text


@needs("tokenizers")
@pytest.mark.parametrize("kind", FAMILY)
def test_ids_are_those_of_the_package(kind, tmp_path):
    from tokenizers import Tokenizer as Fast
    fast = Fast.from_file(str(write(tmp_path, kind) / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    for text in PLAIN + special_texts(kind):
        if kind != "Llama-2":           # whose `legacy` overrules the file
            assert ours.encode(text, bos=False) == fast.encode(text, add_special_tokens=False).ids
    assert ours.encode("The fog") == fast.encode("The fog").ids


@needs("tokenizers")
@pytest.mark.parametrize("legacy", [False, True, None])
@pytest.mark.parametrize("spaces", ["prepend", "first"])
def test_both_files_of_llama_give_the_same_ids(spaces, legacy, tmp_path, monkeypatch):
    """`legacy` of tokenizer_config.json decides, whatever the tokenizer.json says of spaces."""
    write(tmp_path, "Llama-2")
    model = trained(INST)
    (tmp_path / "tokenizer.model").write_bytes(model)
    made = converted(model, spaces)
    add(made, "<l>", "<l><l>", lstrip=True)
    add(made, "<r>", rstrip=True)
    add(made, "fog", single_word=True)
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {**LLAMA, "legacy": legacy, "added_tokens_decoder": listed(made)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    fast, slow = Tokenizer(tmp_path), without_package(tmp_path, monkeypatch)
    texts = ["The <l> fog<r> \n fog<l><l><l> fogs <r><l>", " <l> ", "fog<r> <s>fog <l>", "<r>fog"]
    for text in PLAIN + special_texts("Mistral 0.3") + texts:
        ids = slow.encode(text)
        assert fast.encode(text) == ids, text
        assert fast.decode(ids) == slow.decode(ids), text
        assert pieces(fast, text) == pieces(slow, text), text
    assert fast.prefix == slow.prefix == 1
    assert type(fast.inner) is not type(slow.inner)


@needs("tokenizers")
def test_a_tokenizer_json_that_puts_no_space_in_front_is_believed(tmp_path, monkeypatch):
    """Yi's: its tokenizer.model puts none either."""
    from tokenizers import normalizers
    write(tmp_path, "Llama-2")
    model = trained(dummy=False)
    (tmp_path / "tokenizer.model").write_bytes(model)
    made = converted(model, "prepend")
    made.normalizer = normalizers.Replace(" ", "▁")
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**LLAMA, "legacy": False}))
    fast, slow = Tokenizer(tmp_path), without_package(tmp_path, monkeypatch)
    for text in PLAIN:
        assert fast.encode(text) == slow.encode(text), text


# --------------------------------------------------------------------------------- tokenizer.model


@pytest.fixture
def config_only(tmp_path):
    """A directory with a config.json alone, for 600 tokens."""
    golden.write_config(tmp_path, {**golden.cases()["llama2"], "vocab_size": 600})
    return tmp_path


@pytest.fixture
def llama(config_only):
    """Llama 2's tokenizer.model and nothing else."""
    (config_only / "tokenizer.model").write_bytes(trained())
    return config_only


def test_control_pieces_in_the_text_are_one_token_each(llama):
    (llama / "tokenizer.model").write_bytes(trained(INST))
    tokenizer = Tokenizer(llama)
    want = ["<s>", "[INST]", " The", " fog", " ", "[/INST]"]
    assert pieces(tokenizer, "[INST] The fog [/INST]") == want
    ids = tokenizer.encode("[INST] The fog [/INST]")
    assert ids[:2] == [1, 3]
    assert ids[-1] == 4
    assert pieces(tokenizer, "</s><unk>[INST", bos=False)[:2] == ["</s>", "<unk>"]
    assert tokenizer.decode(ids) == "The fog "


DECODER = {"500": {"content": "<|im_start|>", "special": True},
           "501": {"content": "<|im_end|>", "special": False}}


DECODER = {"500": {"content": "<|im_start|>", "special": True},
           "501": {"content": "<|im_end|>", "special": False}}


@pytest.mark.parametrize("file, entries", [
    ("added_tokens.json", {"<|im_start|>": 500, "<|im_end|>": 501}),
    ("tokenizer_config.json", {"added_tokens_decoder": DECODER}),
])
def test_added_tokens_lie_beyond_the_vocabulary(file, entries, llama):
    change(llama / file, **entries)
    tokenizer = Tokenizer(llama)
    ids = tokenizer.encode(TURN)
    assert pieces(tokenizer, TURN) == [
        "<s>", "<|im_start|>", "us", "er", "<0x0A>", "T", "he", " fog", "<|im_end|>", "<0x0A>",
        "<|im_start|>", "as", "sistant", "<0x0A>"]
    assert [i for i in ids if i >= 480] == [500, 501, 500]


def test_decode_leaves_out_special_tokens_alone(llama):
    change(llama / "tokenizer_config.json", added_tokens_decoder=DECODER)
    tokenizer = Tokenizer(llama)
    ids = tokenizer.encode(TURN)
    assert tokenizer.decode(ids) == "user\nThe fog<|im_end|>\nassistant\n"
    text = "The <|im_end|> fog</s> is"
    assert tokenizer.decode(tokenizer.encode(text)) == "The <|im_end|> fog is"
    assert tokenizer.decode([501, *tokenizer.encode("The fog")]) == "<|im_end|> The fog"
    change(llama / "tokenizer_config.json", eos_token="<|im_end|>")     # has a role: is special
    assert Tokenizer(llama).decode(ids) == "user\nThe fog\nassistant\n"
    change(llama / "tokenizer_config.json", pad_token="us")             # a piece of the vocabulary
    assert Tokenizer(llama).decode(ids) == "er\nThe fog\nassistant\n"


# `legacy` and model_type -> the pieces of SPACED. The space that sentencepiece puts in front of a
# text stands once where one is there already; after a special token `legacy` alone wants it, and
# the old tokenizers of Mistral double it.
SPACED = " The</s>The</s> The"
FIRST = [" The", "</s>", "T", "he", "</s>", " The"]
WAYS = {
    (None, "llama2"): FIRST,
    (False, "llama2"): FIRST,
    (False, "mistral"): FIRST,
    (True, "llama2"): [" The", "</s>", " The", "</s>", " The"],
    (True, "mistral"): [" ", " The", "</s>", " The", "</s>", " ", " The"],
}


@pytest.mark.parametrize("legacy, family", WAYS)
def test_legacy_says_where_a_space_is_put_in_front(legacy, family, llama):
    golden.write_config(llama, {**golden.cases()[family], "vocab_size": 600})
    change(llama / "tokenizer_config.json", **{**LLAMA, "legacy": legacy})
    tokenizer = Tokenizer(llama)
    assert pieces(tokenizer, SPACED, bos=False) == WAYS[legacy, family]
    assert pieces(tokenizer, "The</s>", bos=False) == [" The", "</s>"]


def test_no_space_is_put_in_front_without_add_prefix_space(llama):
    change(llama / "tokenizer_config.json", **{**LLAMA, "add_prefix_space": False})
    tokenizer = Tokenizer(llama)
    assert pieces(tokenizer, "The fog</s>The", bos=False) == ["T", "he", " fog", "</s>", "T", "he"]
    assert pieces(tokenizer, " The", bos=False) == [" The"]


@pytest.mark.parametrize("flag, want", [
    ("lstrip", [" fog", "<m>", " ", "<0x0A>", "us"]),
    ("rstrip", [" fog", " ", "<0x0A>", "<m>", "us"]),
    ("special", [" fog", " ", "<0x0A>", "<m>", " ", "<0x0A>", "us"]),
])
def test_added_tokens_take_the_white_space_beside_them(flag, want, llama):
    token = {"content": "<m>", flag: True}
    change(llama / "tokenizer_config.json", added_tokens_decoder={"500": token})
    assert pieces(Tokenizer(llama), " fog \n<m> \nus", bos=False) == want


def test_a_whole_word_is_no_part_of_one_and_the_longest_token_wins(llama):
    tokens = {"500": {"content": "fog", "single_word": True}, "501": {"content": "<m>"},
              "502": {"content": "<m><m>"}}
    change(llama / "tokenizer_config.json", added_tokens_decoder=tokens)
    tokenizer = Tokenizer(llama)
    assert tokenizer.encode("fog", bos=False) == [500]
    assert 500 not in tokenizer.encode("fogs")
    assert tokenizer.encode("<m><m><m>", bos=False) == [502, 501]


def test_pieces_for_use_in_texts_are_found_by_sentencepiece(llama):
    model = trained(user=("<tool>",))
    (llama / "tokenizer.model").write_bytes(model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer, text = Tokenizer(llama), "The<tool>fog <tool> is"
    assert tokenizer.encode(text, bos=False) == sp.encode(text)
    assert "<tool>" in pieces(tokenizer, text)
    assert tokenizer.decode(sp.encode(text)) == text


def test_a_model_that_puts_no_space_in_front(llama):
    model = trained(dummy=False)
    (llama / "tokenizer.model").write_bytes(model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(llama)
    for text in PLAIN:
        assert tokenizer.encode(text, bos=False) == sp.encode(text)
        assert tokenizer.decode(sp.encode(text)) == text.replace("▁", " ")


def test_sentencepiece_tokenizer(llama):
    tokenizer = Tokenizer(llama)
    ids = tokenizer.encode(ENGLISH)
    assert ids[0] == 1
    assert tokenizer.encode(ENGLISH, bos=False) == ids[1:]
    assert tokenizer.decode(ids) == ENGLISH
    assert pieces(tokenizer, WORDS)[1:5] == [" The", " fog", " is", " on"]
    unknown = "naïve\n東京 🙂"          # its characters go through as bytes
    assert tokenizer.decode(tokenizer.encode(unknown)) == unknown


def test_tokenizer_config_may_leave_out_the_begin_of_text(llama):
    ids = Tokenizer(llama).encode(WORDS)
    change(llama / "tokenizer_config.json", add_bos_token=False)
    assert Tokenizer(llama).encode(WORDS) == ids[1:]


def test_a_vocabulary_may_be_padded_beyond_the_tokenizers_but_not_smaller(llama):
    tokenizer = Tokenizer(llama)
    ids = tokenizer.encode(WORDS)
    assert tokenizer.decode([550, *ids, 599]) == WORDS
    assert tokenizer.piece(599) == ""
    change(llama / "config.json", vocab_size=5)
    message = (f"{llama}: the tokenizer gives id {max(ids)}, "
               "by config.json the model knows 5 tokens")
    with pytest.raises(ValueError, match=message):
        Tokenizer(llama).encode(WORDS)


def test_ids_of_the_toy_are_those_of_its_tokenizer_model():
    sp = sentencepiece.SentencePieceProcessor(model_file=str(TOY / "tokenizer.model"))
    tokenizer = Tokenizer("toy")
    rows = (TOY / "train.jsonl").read_text().splitlines()
    assert len(rows) == 400
    for row in map(json.loads, rows):
        ids = sp.encode(row["instruction"])
        assert tokenizer.encode(row["instruction"]) == [1, *ids]
        assert tokenizer.decode(ids) == sp.decode(ids)
        assert tokenizer.encode(row["response"], bos=False) == sp.encode(row["response"])


# ---------------------------------------------------------------------------------- tokenizer.json


@needs("tokenizers")
def test_truncation_and_padding_of_a_file_are_not_applied(tmp_path):
    from tokenizers import Tokenizer as Fast
    write(tmp_path, "SmolLM2")
    file = str(tmp_path / "tokenizer.json")
    long, short = ENGLISH[:300], "The fog"
    want = [Tokenizer(tmp_path).encode(text) for text in (long, short)]
    fast = Fast.from_file(file)
    fast.enable_truncation(16)
    fast.enable_padding(length=24)
    fast.save(file)
    assert len(fast.encode(long).ids) == 24
    assert [Tokenizer(tmp_path).encode(text) for text in (long, short)] == want


TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n"


@needs("tokenizers")
def test_a_tiktoken_file_beside_a_tokenizer_json_is_not_read(tmp_path, monkeypatch):
    write(tmp_path, "Llama-3")
    want = Tokenizer(tmp_path).encode(ENGLISH)
    (tmp_path / "tokenizer.model").write_bytes(TIKTOKEN)
    assert Tokenizer(tmp_path).encode(ENGLISH) == want
    with pytest.raises(ImportError, match="not a sentencepiece.*pip install tokenizers") as e:
        without_package(tmp_path, monkeypatch)
    assert "\n" not in str(e.value)


def test_a_tiktoken_file_alone_is_refused(config_only):
    (config_only / "tokenizer.model").write_bytes(TIKTOKEN)
    with pytest.raises(ValueError, match="tokenizer.model: not a sentencepiece model"):
        Tokenizer(config_only)


def test_no_tokenizer(config_only):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer(config_only)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Tokenizer(config_only / "nowhere")


def test_damaged_tokenizer_files(config_only):
    (config_only / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="tokenizer.model: not a sentencepiece model"):
        Tokenizer(config_only)
    (config_only / "tokenizer.json").write_text("{}")
    if importlib.util.find_spec("tokenizers"):
        with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file"):
            Tokenizer(config_only)


def test_tokenizer_json_without_the_package_says_what_to_install(config_only, monkeypatch):
    (config_only / "tokenizer.json").write_text("{}")
    with pytest.raises(ImportError, match="pip install tokenizers"):
        without_package(config_only, monkeypatch)


@needs("tokenizers")
def test_tokens_that_only_the_other_files_know(tmp_path):
    write(tmp_path, "SmolLM2")
    size = Tokenizer(tmp_path).inner.hf.get_vocab_size()
    settings = tmp_path / "tokenizer_config.json"
    tokens = json.loads(settings.read_text())["added_tokens_decoder"]
    tokens[str(size)] = {"content": "<new>", "special": True, "rstrip": True}
    # " the" is a piece of the vocabulary
    change(settings, added_tokens_decoder=tokens, pad_token="\u0120the", sep_token="<none>")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<new>  fog") == [size, *tokenizer.encode("fog")]
    assert tokenizer.decode([size, *tokenizer.encode("\u0120the<none>")]) == "<none>"
    change(settings, added_tokens_decoder={str(size + 7): {"content": "<new>"}})
    with pytest.raises(ValueError, match=f"'<new>' would be token {size}, the list.*{size + 7}"):
        Tokenizer(tmp_path)


# ------------------------------------------------------------------------------ the begin of a text


@needs("tokenizers")
@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize("begins", [True, False])
def test_the_post_processor_alone_says_whether_a_text_begins(begins, asked, tmp_path):
    """add_bos_token beside a tokenizer.json counts nothing: so it is in transformers."""
    transformers = pytest.importorskip("transformers")
    write(tmp_path, "Llama-3")
    new = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": asked}
    change(tmp_path / "tokenizer_config.json", **new)
    if not begins:
        change(tmp_path / "tokenizer.json", post_processor=None)
    tokenizer = Tokenizer(tmp_path)
    begin = tokenizer.inner.hf.token_to_id("<|begin_of_text|>")
    ids = tokenizer.encode("The fog")
    assert (ids[0] == begin) == begins
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        assert kind.from_pretrained(tmp_path)("The fog").input_ids == ids
    assert tokenizer.prefix == begin


@needs("tokenizers")
def test_a_template_that_begins_the_text_itself_gets_no_second_begin_token(tmp_path):
    tokenizer = Tokenizer(write(tmp_path, "Llama-3"))
    begin, = tokenizer.encode("")
    said = "<|start_header_id|>user<|end_header_id|>\n\nThe fog<|eot_id|>"
    ids = tokenizer.encode(said)
    assert ids[0] == begin
    assert tokenizer.encode("<|begin_of_text|>" + said) == ids
    assert tokenizer.encode("<|begin_of_text|>" + said, bos=False) == ids
    assert tokenizer.encode("The<|begin_of_text|>").count(begin) == 2


def test_nor_does_it_with_a_tokenizer_model(llama):
    tokenizer = Tokenizer(llama)
    assert tokenizer.encode("") == tokenizer.encode("<s>") == [1]
    assert pieces(tokenizer, "<s> The fog") == ["<s>", " The", " fog"]
    change(llama / "tokenizer_config.json", bos_token="</s>")
    assert Tokenizer(llama).encode("")[:1] == [2]


@pytest.mark.parametrize("new, settings, want", [
    ({}, None, 1),
    ({}, {"add_bos_token": False}, 1),
    ({}, {"bos_token": "</s>"}, 2),
    ({"bos_token_id": None, "eos_token_id": [7, 8]}, None, 1),
])
def test_prefix_for_an_empty_context_by_tokenizer_model(new, settings, want, llama):
    change(llama / "config.json", **new)
    if settings is not None:
        change(llama / "tokenizer_config.json", **settings)
    assert Tokenizer(llama).prefix == want


@needs("tokenizers")
@pytest.mark.parametrize("kind, begin, ends, want", [
    ("Llama-3", None, [7, 8], "<|begin_of_text|>"),
    ("SmolLM2", None, 7, "<|im_start|>"),
    ("Qwen2", 5, [7, 8], 7),            # its tokenizer has no begin of text, by its settings
    ("Qwen2", 5, None, None),
    ("Qwen2", 5, 9999, None),           # beyond the vocabulary
])
def test_prefix_for_an_empty_context_by_tokenizer_json(kind, begin, ends, want, tmp_path):
    write(tmp_path, kind)
    change(tmp_path / "config.json", bos_token_id=begin, eos_token_id=ends)
    tokenizer = Tokenizer(tmp_path)
    if isinstance(want, str):
        want = tokenizer.inner.hf.token_to_id(want)
    assert tokenizer.prefix == want
    (tmp_path / "tokenizer_config.json").unlink()       # then config.json says all
    if kind != "Llama-3":
        ends = ends[0] if isinstance(ends, list) else ends
        known = [i for i in (begin, ends) if i is not None and i < 600]
        assert Tokenizer(tmp_path).prefix == known[0]


# --------------------------------------------------------------------------------------- bad input


BAD_LISTS = {  # added_tokens_decoder of tokenizer_config.json, what the message says
    "list": ([], "added_tokens_decoder is not an object"),
    "no number": ({"x": {"content": "<a>"}}, "'x' ('<a>'): its id is not a whole number"),
    "negative": ({"-1": {"content": "<a>"}}, "'-1' ('<a>'): its id is not a whole number"),
    "too large": ({"9" * 5000: {"content": "<a>"}}, "('<a>'): its id is not a whole number"),
    "a text": ({"500": "<a>"}, "added token 500 is not an object"),
    "empty": ({"500": {"content": ""}}, "added token 500 is '', expected a text"),
    "long": ({"500": {"content": "a" * 1001}}, "expected a text of 1 to 1000 characters"),
    "no content": ({"500": {}}, "added token 500 is None, expected a text"),
    "half": ({"500": {"content": "\ud800"}}, r"added token 500 is '\ud800', expected a text"),
    "flag": ({"500": {"content": "<a>", "lstrip": 1}}, "lstrip is 1, expected true or false"),
    "same text": ({"500": {"content": "<a>"}, "501": {"content": "<a>"}},
                  "501 ('<a>') stands there twice"),
    "same id": ({"500": {"content": "<a>"}, "0500": {"content": "<b>"}},
                "500 ('<b>') stands there twice"),
}


@pytest.mark.parametrize("fault", BAD_LISTS)
def test_bad_lists_of_added_tokens_are_refused(fault, llama):
    tokens, message = BAD_LISTS[fault]
    change(llama / "tokenizer_config.json", added_tokens_decoder=tokens)
    with pytest.raises(ValueError) as e:
        Tokenizer(llama)
    assert str(e.value).startswith(f"{llama / 'tokenizer_config.json'}: ")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("tokens, message", [
    ({"<a>": "500"}, "its id is not a whole number"),
    ({"<a>": 500.0}, "its id is not a whole number"),
    ({"<a>": 2**70}, "its id is not a whole number"),
    ({"<a>": 500, "<b>": 500}, "stands there twice"),
    ({"": 500}, "added token 500 is '', expected a text"),
])
def test_bad_added_tokens_json_is_refused(tokens, message, llama):
    (llama / "added_tokens.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match=message) as e:
        Tokenizer(llama)
    assert str(e.value).startswith(f"{llama / 'added_tokens.json'}: ")


def test_an_added_token_beyond_the_model_is_named_once_it_stands_in_a_text(llama):
    (llama / "added_tokens.json").write_text('{"<pad>": 600}')
    tokenizer = Tokenizer(llama)
    assert tokenizer.encode("The fog") == [1, *tokenizer.encode("The fog", bos=False)]
    with pytest.raises(ValueError, match="gives id 600, by config.json the model knows 600"):
        tokenizer.encode("The fog<pad>")


def test_half_a_character_is_no_text(llama):
    with pytest.raises(ValueError, match="half a character"):
        Tokenizer(llama).encode("The \ud83d")


# ------------------------------------------------------------------------------------- a real model


@pytest.mark.real
@real_weights
@needs("tokenizers")
@pytest.mark.parametrize("text", [
    ENGLISH,
    "x = 12345 + 6.75\n\n\n\tfoo()\r\n",
    "  naïve café, 東京 🙂🏽, １２３ ½ ²  ",
    "",
], ids=["English", "code", "Unicode", "empty"])
def test_smollm2_tokenizer_gives_back_any_text(text):
    tokenizer = Tokenizer("smollm2")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.real
@real_weights
@needs("tokenizers")
def test_smollm2_tokenizer():
    tokenizer = Tokenizer("smollm2")
    assert pieces(tokenizer, "In 2045 days") == ["In", " ", "2", "0", "4", "5", " days"]
    specials = [t.content for t in tokenizer.inner.hf.get_added_tokens_decoder().values()]
    assert len(specials) == 17
    assert [tokenizer.encode(t) for t in specials] == [[i] for i in range(17)]
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert (len(ids), ids[0], ids[-1]) == (5, 1, 2)
    assert tokenizer.prefix == 1
