"""support/tokenizer.py: text <-> ids by tokenizer.json and tokenizer.model, as transformers does.

Shrunken tokenizers of the published kinds are made here: a few hundred pieces, but the special
tokens, the settings and the rules for spaces, digits and words of the real files.
"""
import functools
import io
import json
import sys

import pytest
import sentencepiece

import golden
from conftest import TOY, change, needs
from support.tokenizer import FromJson, FromModel, Tokenizer

CONFIG = golden.BASE | {"vocab_size": 600}
ENGLISH = " ".join(json.loads(line)["instruction"]
                   for line in (TOY / "train.jsonl").read_text().splitlines()[:30])
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


LANGUAGES = ["霧が海の上にある。", "หมอกอยู่ บนทะเล", "🙂🏽 👩‍👩‍👧🇫🇷 x", "Туман над морем", "naïve 1"]


def texts_with(a, b):
    """Texts in which two special tokens stand at the edges, in a row, between spaces."""
    return [f"{a}The fog{b}\n", f"{a} The {b} fog{a}{b}", f"  {a}  {b}", f"The{a}\n\n{b}the",
            f"{a}é{b} é", f"{a[:-1]} {b[1:]}"]


TEXTS = [*PLAIN, TURN, "[INST] The fog [/INST]", "x<s></s>y", *texts_with(*CHATML),
         *texts_with(*INST), *texts_with("</s>", "<unk>"), *texts_with("<|eot_id|>", "<s>"),
         *texts_with("<s>", "<s>"), *texts_with(*2 * ["<|begin_of_text|>"])]


# ------------------------------------------------------------------------- shrunken tokenizers


@functools.cache
def trained(control=(), user=(), dummy=True):
    """A tokenizer.model as Llama 2 has it, bytes: 256 bytes and pieces of English words."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 9 + ENGLISH.split(". ")), model_writer=out,
        vocab_size=400, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        control_symbols=list(control), user_defined_symbols=list(user), add_dummy_prefix=dummy,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return out.getvalue()


BY_SENTENCEPIECE = """{"added_tokens": [],
 "post_processor": {"type": "TemplateProcessing",
  "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
             {"Sequence": {"id": "A", "type_id": 0}}],
  "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
  "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
 "decoder": {"type": "Sequence", "decoders": [
  {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
  {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
 "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true}}"""
SPACES = {  # where a text gets a space in front; "prepend" as Llama 2 and Mistral 0.2 have it
    "prepend": """{"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}}""",
    "first": """{"pre_tokenizer": {"type": "Metaspace", "replacement": "▁",
                 "prepend_scheme": "first", "split": false}}""",
    "never": """{"normalizer": {"type": "Replace", "pattern": {"String": " "},
                 "content": "▁"}}""",
}


def converted(model, spaces):
    """A tokenizer.model as a tokenizer.json, an object of the package tokenizers."""
    import tokenizers
    raw = json.loads(BY_SENTENCEPIECE) | json.loads(SPACES[spaces])
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    special = [text for text, i in vocab.items() if sp.is_control(i) or sp.is_unknown(i)]
    merges = [(text[:k], text[k:]) for text in vocab for k in range(1, len(text))]
    raw["model"] |= {"vocab": vocab, "merges": [
        pair for pair in merges if vocab.keys() >= set(pair) and "".join(pair) not in special]}
    made = tokenizers.Tokenizer.from_str(json.dumps(raw))
    made.add_special_tokens(special)
    return made


# the rule that parts words: of Llama 3 three digits stay together, of Qwen2 one
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+"
         r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def bytewise(kind):
    """A byte-level BPE tokenizer of 400 pieces, with the special tokens of its kind."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "Llama-3"))
    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    if kind != "SmolLM2":
        split = SPLIT.replace("DIGITS", "{1,3}" if kind == "Llama-3" else "")
        parts = [Split(tokenizers.Regex(split), "isolated"),
                 ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = Sequence(parts)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator([WORDS, ENGLISH], tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", *CHATML], show_progress=False,
        initial_alphabet=ByteLevel.alphabet()))
    if kind == "Qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    if kind == "Llama-3":
        made.add_special_tokens(["<|begin_of_text|>", "<|end_header_id|>", "<|eot_id|>"])
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 400)])
    return made


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "add_bos_token": True}
BYTES = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None,
         "eos_token": "<|im_end|>"}
KINDS = {   # model_type, how tokenizer.json puts spaces, tokenizer_config.json
    "Llama-2": ("llama", "prepend", {**LLAMA, "legacy": False}),
    "Llama-2, its file saved again": ("llama", "first", LLAMA),
    "Llama-2, legacy": ("llama", "prepend", {**LLAMA, "legacy": True}),
    "OpenHermes": ("mistral", "prepend", {**LLAMA, "legacy": True, "eos_token": "<|im_end|>"}),
    "Mistral 0.2": ("mistral", "prepend", {**LLAMA, "legacy": True}),
    "Mistral 0.3": ("mistral", "first", {**LLAMA, "legacy": False}),
    "no space in front": ("llama", "prepend",
                          {**LLAMA, "legacy": False, "add_prefix_space": False}),
    "CodeLlama": ("llama", "prepend", {**LLAMA, "tokenizer_class": "CodeLlamaTokenizer"}),
    "Qwen3, by sentencepiece": ("qwen3", "prepend", {**LLAMA, "legacy": True}),
    "Llama-3": ("llama", None, {**BYTES, "bos_token": "<|begin_of_text|>"}),
    "Qwen2": ("qwen2", None, {**BYTES, "tokenizer_class": "Qwen2Tokenizer"}),
    "SmolLM2": ("llama", None, {**BYTES, "tokenizer_class": "GPT2Tokenizer",
                                "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}),
}


def write(folder, kind):
    """The files of a tokenizer of a kind, and its config.json -> the folder."""
    family, spaces, settings = KINDS[kind]
    change(folder / "config.json", **CONFIG | {"model_type": family})
    if spaces:
        model = trained(INST if kind == "Mistral 0.3" else ())
        (folder / "tokenizer.model").write_bytes(model)
        fast = converted(model, spaces)
    else:
        fast = bytewise(kind)
    if kind == "OpenHermes":
        fast.add_special_tokens(list(CHATML))
    fast.save(str(folder / "tokenizer.json"))
    tokens = json.loads(fast.to_str())["added_tokens"]
    change(folder / "tokenizer_config.json", **settings,
           added_tokens_decoder={str(token.pop("id")): token for token in tokens})
    return folder


def without_package(folder, monkeypatch):
    """The tokenizer of a folder where the package tokenizers is not installed."""
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "tokenizers", None)
        return Tokenizer(folder)


def readers(folder, monkeypatch):
    """The tokenizers of a folder: of tokenizer.json, and of a tokenizer.model if there is one."""
    if (folder / "tokenizer.model").exists():
        return [Tokenizer(folder), without_package(folder, monkeypatch)]
    return [Tokenizer(folder)]


def pieces(tokenizer, text, bos=True):
    return tokenizer.pieces(tokenizer.encode(text, bos))


# ------------------------------------------------------------------------------- as transformers


def same_as_transformers(ours, texts):
    """Ids and decoded text of every text are those of transformers; begin-of-text stands once."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    theirs = transformers.AutoTokenizer.from_pretrained(ours.path)
    for text in texts:
        bare = theirs(text, add_special_tokens=False).input_ids
        whole = theirs(text).input_ids
        if len(whole) > len(bare) and bare[:1] == whole[:1]:    # begun by the text already
            whole = bare
        assert ours.encode(text) == whole, text
        assert ours.encode(text, bos=False) == bare, text
        assert ours.decode(whole) == theirs.decode(whole, skip_special_tokens=True), text


@needs("tokenizers")
@pytest.mark.parametrize("kind", KINDS)
def test_both_files_give_the_ids_of_transformers_and_whole_characters(kind, tmp_path, monkeypatch):
    fast, *slow = readers(write(tmp_path, kind), monkeypatch)
    assert isinstance(fast.inner, FromJson)
    assert fast.prefix == {"Llama-3": 400, "Qwen2": 2}.get(kind, 1)     # of Qwen2 the end
    same_as_transformers(fast, TEXTS)
    for tokenizer in slow:
        assert isinstance(tokenizer.inner, FromModel)
        same_as_transformers(tokenizer, TEXTS)
        for text in TEXTS:
            assert pieces(tokenizer, text) == pieces(fast, text)
    for tokenizer in (fast, *slow):
        for text in LANGUAGES:          # a character is shown at its last token
            ids = tokenizer.encode(text, bos=False)
            shown = tokenizer.pieces(ids)
            assert "".join(shown).removeprefix(" ") == text and len(shown) == len(ids)
        assert tokenizer.pieces(tokenizer.encode("🙂")[:-1])[-1] == "\ufffd"


@needs("tokenizers")
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized", "special"])
@pytest.mark.parametrize("kind", ["Llama-2", "Mistral 0.3", "Qwen2"])
def test_the_list_of_added_tokens_counts_before_tokenizer_json(kind, flag, tmp_path, monkeypatch):
    settings = write(tmp_path, kind) / "tokenizer_config.json"
    tokens = json.loads(settings.read_text())["added_tokens_decoder"]
    known = tokens["1"]                 # <s> or <|im_start|>
    known[flag] = not known[flag]
    size = Tokenizer(tmp_path).inner.hf.get_vocab_size()
    tokens[str(size)] = known | {"content": "<é>", "special": False}
    change(settings, added_tokens_decoder=tokens)
    a, b = known["content"], "<é>"
    texts = [f"a {a} b", f"a{a}b {a} \n", *texts_with(b, a), "a <e\u0301> b<é>", "_<é> \t<é>-"]
    for tokenizer in readers(tmp_path, monkeypatch):
        same_as_transformers(tokenizer, TEXTS + texts)


DIFFERENT = [   # what tokenizer_config.json says, a text, our tokens; transformers differs
    ("Llama-3", {"pad_token": "fog"}, "fog", ["f", "og"]),
    ("Llama-3", {"split_special_tokens": True}, "<|eot_id|>", ["<|eot_id|>"]),
    # in what decode gives back
    ("Llama-3", {"added_tokens_decoder": {"1": {"content": "<|im_start|>"}}}, "<|im_start|>",
     ["<|im_start|>"]),
    ("Qwen2", {"added_tokens_decoder": {"2": {"content": "<|im_end|>", "rstrip": True}}},
     "<|im_end|> a", ["<|im_end|>", "a"]),
]


@needs("tokenizers")
@pytest.mark.parametrize("kind, entries, text, shown", DIFFERENT)
def test_different_on_purpose(kind, entries, text, shown, tmp_path):
    change(write(tmp_path, kind) / "tokenizer_config.json", **entries)
    assert pieces(Tokenizer(tmp_path), text, bos=False) == shown
    with pytest.raises(AssertionError):
        same_as_transformers(Tokenizer(tmp_path), [text])


@needs("tokenizers")
@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize("begins", [True, False])
def test_tokenizer_json_alone_says_whether_a_text_begins(begins, asked, tmp_path):
    write(tmp_path, "Llama-3")
    change(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast",
           add_bos_token=asked)
    if not begins:
        change(tmp_path / "tokenizer.json", post_processor=None)
    tokenizer = Tokenizer(tmp_path)
    same_as_transformers(tokenizer, TEXTS)
    assert (tokenizer.encode("The")[0] == tokenizer.prefix) == begins
    assert tokenizer.pieces([tokenizer.prefix]) == ["<|begin_of_text|>"]


@needs("tokenizers")
def test_older_checkpoints_name_their_tokens_in_special_tokens_map(tmp_path, monkeypatch):
    write(tmp_path, "Llama-2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    change(tmp_path / "special_tokens_map.json", bos_token={"content": "</s>"}, eos_token="<s>")
    same_as_transformers(Tokenizer(tmp_path), TEXTS)
    slow = without_package(tmp_path, monkeypatch)
    assert slow.encode("") == [slow.prefix] == [2]


# --------------------------------------------------------------------------------- tokenizer.model


@pytest.fixture
def llama(tmp_path):
    """Llama 2's tokenizer.model and a config.json, nothing else."""
    change(tmp_path / "config.json", **CONFIG)
    (tmp_path / "tokenizer.model").write_bytes(trained())
    return tmp_path


def test_of_added_tokens_beyond_the_vocabulary_the_longest_wins(llama):
    change(llama / "added_tokens.json", **{"": 499, "<m>": 500, "<m><m>": 501})
    assert Tokenizer(llama).encode("<m><m><m>", bos=False) == [501, 500]
    assert Tokenizer(llama).pieces([501, 5]) == ["<m><m>", "\2"]


def test_pieces_for_use_in_texts_are_found_by_sentencepiece(llama):
    model = trained(user=("<tool>",))
    (llama / "tokenizer.model").write_bytes(model)
    text, tokenizer = "The<tool>fog <tool> is", Tokenizer(llama)
    ids = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    assert tokenizer.encode(text, bos=False) == ids
    assert tokenizer.decode(ids) == text


@needs("tokenizers")
def test_files_that_put_no_space_in_front_are_believed(tmp_path, monkeypatch):
    """Yi's."""
    model = trained(dummy=False)
    (write(tmp_path, "Llama-2") / "tokenizer.model").write_bytes(model)
    converted(model, "never").save(str(tmp_path / "tokenizer.json"))
    fast, slow = readers(tmp_path, monkeypatch)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in PLAIN:
        ids = sp.encode(text)
        assert fast.encode(text, bos=False) == slow.encode(text, bos=False) == ids
        assert slow.decode(ids) == text.replace("▁", " ")


# ------------------------------------------------------------------------------------ begin and end


@pytest.mark.parametrize("new, settings, first, prefix", [
    ({"bos_token_id": None}, {"add_bos_token": False}, [], 1),
    ({"eos_token_id": [7, 8]}, {"bos_token": "<none>"}, [], 7),
    ({"eos_token_id": None}, {"bos_token": "<none>"}, [], None),
])
def test_what_begins_a_text_and_stands_for_an_empty_one(new, settings, first, prefix, llama):
    change(llama / "config.json", **new)
    change(llama / "tokenizer_config.json", **settings)
    tokenizer = Tokenizer(llama)
    assert tokenizer.encode("") == first
    assert tokenizer.prefix == prefix


@needs("tokenizers")
def test_length_limit_and_padding_of_a_file_are_not_applied(tmp_path):
    want = Tokenizer(write(tmp_path, "Llama-2")).encode(ENGLISH)
    fast = converted(trained(), "prepend")
    fast.enable_truncation(16)
    fast.enable_padding(length=24, direction="left")
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode(ENGLISH) == want
    assert tokenizer.encode("") == [1]


# --------------------------------------------------------------------------------------- bad input


def test_texts_and_ids_that_a_model_cannot_take(llama):
    tokenizer = Tokenizer(llama)
    ids = tokenizer.encode(WORDS)
    assert tokenizer.decode([550, *ids, 599]) == WORDS
    assert tokenizer.pieces([599]) == [""]
    with pytest.raises(ValueError, match="half a character"):
        tokenizer.encode("The \ud83d")
    change(llama / "added_tokens.json", **{"<pad>": 600})
    assert Tokenizer(llama).encode(WORDS) == ids
    with pytest.raises(ValueError, match="gives ids .600., by config.json the model knows 600"):
        Tokenizer(llama).encode("The fog<pad>")


LIST = "tokenizer.model: not a sentencepiece model, or the list of added tokens is damaged"
DAMAGED = [     # a file, what it holds, what the one line says
    ("tokenizer.model", "no model", LIST),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
    ("added_tokens.json", '{"<a>": "x"}', LIST),
    *(("tokenizer_config.json", f'{{"added_tokens_decoder": {tokens}}}', LIST) for tokens in
      ('["x"]', '{"x": {"content": "a"}}', '{"5": "a"}', '{"5": {}}', '{"5": {"content": 1}}',
       '{"5": {"content": null}}')),
    ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer file"),
    # the package panics
    ("tokenizer.json", """{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
     "added_tokens": [], "post_processor": {"type": "TemplateProcessing", "pair": [],
     "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "special_tokens": {}}}""",
     "tokenizer.json: not a tokenizer file"),
]


@pytest.mark.parametrize("file, text, message", DAMAGED)
def test_damaged_files_are_refused_in_one_line(file, text, message, llama):
    if file == "tokenizer.json":
        pytest.importorskip("tokenizers")
    (llama / file).write_text(text)
    with pytest.raises(ValueError) as e:
        Tokenizer(llama)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_no_tokenizer_that_can_be_read(llama, monkeypatch):
    (llama / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer(llama)
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ImportError, match="pip install tokenizers"):
        without_package(llama, monkeypatch)
