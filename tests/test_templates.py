"""support/data.py: prompts as the models' own chat templates write them, letter for letter."""
import json
from types import SimpleNamespace

import pytest

import golden
from conftest import SCHEDULE, needs, predictors_for, real_weights
from support import prompts
from support.data import encode_row
from support.saved import load_predictors, save_predictors
from support.templates import TEMPLATES, chosen_template, prompt_notes, prompt_text
from support.tokenizer import Tokenizer

# The Jinja templates in the models' tokenizer_config.json, cut down to what they do with a system
# text and one question: {our name: [(the model, its begin-of-text, the template)]}.
CHATML = ("{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{{ '<|im_start|>assistant\n' }}")
HEADED = ("{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
          "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
SPLIT = ("{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
         "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}")


def chatml_with(system):
    """A template that puts a system turn before a conversation that has none."""
    return ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
            "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}{% endif %}" + CHATML)


def instructions(before, after):
    """Mistral's: a system text and a blank line come before the user's text."""
    return ("{{ bos_token }}" + SPLIT + "{% if system is defined %}"
            "{{ '" + before + "' + system + '\n\n' + message['content'] + '" + after + "' }}"
            "{% else %}{{ '" + before + "' + message['content'] + '" + after + "' }}{% endif %}"
            "{% endfor %}")


PUBLISHED = {
    "chatml": [("01-ai/Yi-6B-Chat", "", "{% for message in messages %}" + CHATML)],
    "smollm2": [("HuggingFaceTB/SmolLM2-135M-Instruct", "", chatml_with(
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face"))],
    "qwen2": [("Qwen/Qwen2-7B-Instruct", "", chatml_with("You are a helpful assistant."))],
    "qwen2.5": [("Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen2.5-Coder-7B-Instruct", "", chatml_with(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."))],
    "llama-2": [("meta-llama/Llama-2-7b-chat-hf", "<s>", SPLIT +
                 "{% if system is defined %}{% set content = '<<SYS>>\n' + system "
                 "+ '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
                 "{% set content = message['content'] %}{% endif %}"
                 "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% endfor %}")],
    "llama-3": [("meta-llama/Meta-Llama-3-8B-Instruct", "<|begin_of_text|>",
                 "{{ bos_token }}{% for message in messages %}" + HEADED)],
    "llama-3.1": [("meta-llama/Llama-3.1-8B-Instruct", "<|begin_of_text|>",
                   "{{ bos_token }}{% set date_string = '26 Jul 2024' %}"
                   "{% set system = '' %}" + SPLIT +
                   "{% if loop.first %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
                   "Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' "
                   "+ system | trim + '<|eot_id|>' }}{% endif %}" + HEADED)],
    "mistral": [("mistralai/Mistral-7B-Instruct-v0.2", "<s>", instructions(" [INST] ", " [/INST]")),
                ("the same, as first published", "<s>", instructions("[INST] ", " [/INST]"))],
    "mistral-v3": [("mistralai/Mistral-7B-Instruct-v0.3", "<s>",
                    instructions("[INST] ", "[/INST]"))],
    "mistral-nemo": [("mistralai/Mistral-Nemo-Instruct-2407", "<s>",
                      instructions("[INST]", "[/INST]"))],
}
CASES = [pytest.param(name, *published, id=f"{name}, {published[0]}")
         for name, several in PUBLISHED.items() for published in several]
TEXTS = ["Hi", " \n Who?\n\n  Clara {} <s>[INST] \t\n"]
SYSTEMS = [None, "Be brief.", " Two\n\nlines. \n"]


def render(template, begin, text, system):
    """A conversation as transformers renders it, up to where the answer begins."""
    jinja2 = pytest.importorskip("jinja2")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, bos_token=begin)


@pytest.mark.parametrize("name, model, begin, template", CASES)
def test_a_prompt_is_what_the_published_template_renders(name, model, begin, template):
    for text in TEXTS:
        for system in SYSTEMS:
            want = render(template, begin, text, system).removeprefix(begin)
            got = prompt_text({"instruction": text}, name, system=system)
            # Mistral's tokenizer puts a space in front, if none is there
            assert got == want.removeprefix(" "), (text, system)


def test_every_template_is_compared():
    assert set(TEMPLATES) == {"plain", *PUBLISHED}


CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TURN = ("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LITERALLY = {   # the prompt "Hi" without a system text of one's own, with "Be brief."
    "plain": ("Hi", None),
    "chatml": (CHAT, f"<|im_start|>system\nBe brief.<|im_end|>\n{CHAT}"),
    "smollm2": ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
                f"Hugging Face<|im_end|>\n{CHAT}",
                f"<|im_start|>system\nBe brief.<|im_end|>\n{CHAT}"),
    "qwen2": (f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{CHAT}",
              f"<|im_start|>system\nBe brief.<|im_end|>\n{CHAT}"),
    "qwen2.5": ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
                f"assistant.<|im_end|>\n{CHAT}",
                f"<|im_start|>system\nBe brief.<|im_end|>\n{CHAT}"),
    "llama-2": ("[INST] Hi [/INST]", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
    "llama-3": (TURN, "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>" + TURN),
    "llama-3.1": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|>{TURN}",
        f"<|start_header_id|>system<|end_header_id|>\n\n{DATES}Be brief.<|eot_id|>{TURN}"),
    "mistral": ("[INST] Hi [/INST]", "[INST] Be brief.\n\nHi [/INST]"),
    "mistral-v3": ("[INST] Hi[/INST]", "[INST] Be brief.\n\nHi[/INST]"),
}


@pytest.mark.parametrize("name", LITERALLY)
def test_a_prompt_letter_for_letter(name):
    row, (alone, brief) = {"instruction": "Hi"}, LITERALLY[name]
    assert prompt_text(row, name) == alone
    if brief:
        assert prompt_text(row, name, system="Be brief.") == brief


def test_a_system_text_that_is_empty_is_none():
    row = {"instruction": "Hi"}
    for name in ("chatml", "smollm2", "qwen2", "qwen2.5"):
        assert prompt_text(row, name, system="") == CHAT
    for name in ("llama-3", "llama-3.1"):
        assert prompt_text(row, name, system="") == TURN
    for name in ("llama-2", "mistral"):
        assert prompt_text(row, name, system="") == "[INST] Hi [/INST]"
    assert prompt_text(row, "plain", system="") == "Hi"


def test_a_template_without_a_system_turn_refuses_a_system_text():
    message = "the prompt template 'plain' has no place for a system text: leave out --system"
    with pytest.raises(ValueError, match=message):
        prompt_text({"instruction": "Hi"}, system="Be brief.")


def test_llama_strips_what_its_templates_strip():
    row = {"instruction": "\n a \n", "context": " b\n"}
    assert prompt_text(row, "llama-2") == "[INST] a \n\n\n b [/INST]"
    assert "\n\na \n\n\n b<|eot_id|>" in prompt_text(row, "llama-3")
    assert prompt_text(row, "mistral") == "[INST] \n a \n\n\n b\n [/INST]"
    assert prompt_text(row, "chatml", "last").startswith("<|im_start|>user\n b\n\n\n\n a \n<|im_")


# ---------------------------------------------------------------------------------------- as tokens


@pytest.mark.parametrize("name, model, begin, template", CASES)
def test_a_prompt_token_by_token(name, model, begin, template, tmp_path):
    tokenizer = with_special_tokens(tmp_path, begin)
    for text in TEXTS:
        for system in SYSTEMS:
            rendered = render(template, begin, text, system)
            want = tokenizer.inner.hf.encode(rendered, add_special_tokens=False).ids
            row = {"instruction": text, "response": "Clara"}
            example = encode_row(tokenizer, row, name, system=system)
            ids = example.tokens[:example.prompt_len].tolist()
            if rendered.startswith("<s> [INST]"):
                want.remove(tokenizer.inner.hf.token_to_id("\u0120"))
            assert ids == want, (text, system)
            assert tokenizer.decode(example.tokens[example.prompt_len:].tolist()) == "Clara"


def with_special_tokens(folder, begin):
    """A Tokenizer of bytes and of the templates' special tokens; `begin` begins every text."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "[INST]",
                             "[/INST]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    if begin:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, made.token_to_id(begin))])
    made.save(str(folder / "tokenizer.json"))
    golden.write_config(folder, {**golden.cases()["llama2"], "vocab_size": 300})
    return Tokenizer(folder)


def test_the_toys_tokenizer_begins_a_text_once_and_puts_the_space_before_it():
    tokenizer = Tokenizer("toy")
    ids = tokenizer.encode(prompt_text({"instruction": "Clara sells cups."}, "mistral"))
    assert ids.count(tokenizer.prefix) == 1 and ids[0] == tokenizer.prefix
    assert ids == tokenizer.encode("<s> [INST] Clara sells cups. [/INST]")


@pytest.mark.real
@real_weights
@needs("tokenizers")
def test_smollm2s_own_prompt_in_its_own_tokens():
    row, tokenizer = {"instruction": "Hi"}, Tokenizer("smollm2")
    ids = tokenizer.encode(prompt_text(row, "smollm2"))
    assert ids == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28,
                   7018, 411, 407, 19712, 8182, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531,
                   198]
    (_, begin, template), = PUBLISHED["smollm2"]
    for text in TEXTS:
        rendered = render(template, begin, text, None)
        want = tokenizer.inner.hf.encode(rendered, add_special_tokens=False).ids
        assert tokenizer.encode(prompt_text({"instruction": text}, "smollm2")) == want


# --------------------------------------------------------------------------- what the options name


def options(**given):
    names = ("prompt", "prompt_file", "data", "template", "system")
    return SimpleNamespace(ckpt="toy", row=0, **{**dict.fromkeys(names), **given})


def test_predictors_remember_their_template_and_its_system_text():
    def chosen(args, metadata):
        return chosen_template(args, metadata)[:2]

    known = {"template": "qwen2", "system": "Be brief."}
    assert chosen(options(), {}) == ("plain", None)
    assert chosen(options(), {"template": "qwen2"}) == ("qwen2", None)
    assert chosen(options(), known) == ("qwen2", "Be brief.")
    assert chosen(options(template="qwen2"), known) == ("qwen2", "Be brief.")
    assert chosen(options(system=""), known) == ("qwen2", "")
    assert chosen(options(template="llama-3"), known) == ("llama-3", None)
    assert chosen(options(template="llama-3", system="No."), known) == ("llama-3", "No.")


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_what_a_training_notes_is_what_its_predictors_use(system, tiny, tmp_path):
    notes = prompt_notes(options(template="qwen2", system=system))
    path = tmp_path / "p.safetensors"
    save_predictors(path, predictors_for(tiny), tiny.config, SCHEDULE, **notes)
    metadata = load_predictors(path, tiny)[1]
    assert chosen_template(options(), metadata)[:2] == ("qwen2", system)


def test_the_prompt_of_an_option_or_a_file(tmp_path):
    brief = options(prompt="Hi", template="chatml", system="Be brief.")
    chosen = chosen_template(brief, {})
    assert prompts.chosen_prompt(brief, chosen) == (LITERALLY["chatml"][1], None)
    (tmp_path / "p.txt").write_text("Hi", encoding="utf-8")
    told = options(prompt_file=tmp_path / "p.txt")
    chosen = chosen_template(told, {"template": "qwen2"})
    assert prompts.chosen_prompt(told, chosen) == (LITERALLY["qwen2"][0], None)


def test_the_rows_have_the_system_text(tmp_path):
    from support.options import chosen_example, rows_from
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps({"instruction": "Hi", "response": "Ho"}) + "\n") * 2)
    rest = dict(min_prompt=1, max_prompt=99, max_response=9, context=False, limit=9,
                question="first", response="Ho")
    args = options(data=str(file), template="llama-2", system="Clara sells", **rest)
    tokenizer = Tokenizer("toy")
    want = tokenizer.encode("[INST] <<SYS>>\nClara sells\n<</SYS>>\n\nHi [/INST]")
    row, = rows_from(args, tokenizer, "heldout")
    assert row.tokens[:row.prompt_len].tolist() == want
    args.prompt = "Hi"
    row = chosen_example(args, tokenizer)
    assert row.tokens[:row.prompt_len].tolist() == want
    args.template = None
    row, = rows_from(args, tokenizer, "heldout", metadata={"template": "llama-2"})
    assert row.tokens[:row.prompt_len].tolist() == want


REFUSED = [     # a command, its options, what its one line says
    ("infer.py", ("--prompt", ""), "the prompt is empty"),
    ("infer.py", ("--prompt", "a", "--prompt-file", "README.md"), "leave all but one out"),
    ("infer.py", ("--prompt", "a", "--data", "rows.jsonl"), "leave all but one out"),
    ("infer.py", ("--prompt-file", "checkpoints/toy/tokenizer.model"), "not UTF-8 text"),
    ("infer.py", ("--prompt", "a", "--system", "b"), "has no place for a system text"),
    ("saliency.py", ("--prompt", "", "--response", "a"), "the prompt is empty"),
    ("lab/batch.py", ("--system", "b"), "has no place for a system text"),
]


@pytest.mark.parametrize("script, words, message", REFUSED)
def test_bad_input_ends_in_one_line(script, words, message, leaves):
    ended = leaves(script, *words)
    assert isinstance(ended, str) and message in ended
    assert len(ended.splitlines()) == 1
