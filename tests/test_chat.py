"""support/chat.py: prompts are what the checkpoint's own chat template renders."""
import json

import pytest

import test_tokenizer
from conftest import SMOLLM2, needs, real_weights
from support.chat import Chat, chat_notes, choose_chat, render
from support.tokenizer import Tokenizer
from test_tokenizer import change

# Templates of the published kinds, written anew and shorter.
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
    {% set loop_messages = messages %}
    {% set system = '' %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {{- bos_token + '[INST] ' + (system + message['content']).strip() + ' [/INST]' }}
{%- endfor %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if tools is not none %}{{ raise_exception('no tools') }}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
"""
MISTRAL = """\
{%- set ns = namespace(system='', seen=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = message.content %}{% continue %}{% endif %}
    {%- if documents is not none or not message is mapping %}{% break %}{% endif %}
    {%- set ns.seen = ns.seen + 1 %}
{%- endfor %}
{{- bos_token }}[INST] {{ (ns.system + '\\n\\n') if ns.system }}{{ messages[-1].content }}[/INST]
{{- eos_token if ns.seen != 1 }}
"""
THINK = """\
{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}
{{ message.content | tojson(indent=1) if '{' in message.content else message.content }}<|im_end|>
{% endfor %}
<|im_start|>assistant
<think>

"""
SHAPES = {"chatml": CHATML, "llama-2": LLAMA_2, "llama-3": LLAMA_3, "mistral": MISTRAL,
          "think": THINK}
TEXTS = ["Hi", " \n Who?\n\n  Clara {} <s>[INST] \t\n", "{é<b>'\"}", ""]


def write(folder, source, kind="SmolLM2"):
    """A checkpoint's folder with a template and a shrunken tokenizer of a kind."""
    test_tokenizer.write(folder, kind)
    (folder / "chat_template.jinja").write_text(source)
    return folder


def same_as_transformers(root):
    """Every text's prompt, with and without a system text, is transformers', token by token."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(root), Tokenizer(root)
    for text in TEXTS:
        for system in (None, "Be brief.", " Two\n\nlines. \n"):
            chat = choose_chat(root, system=system)
            messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            want = theirs.apply_chat_template(messages[system is None:], return_dict=False,
                                              add_generation_prompt=True)
            assert ours.encode(render(chat, text), bos=chat.bos) == want, (text, system)


@needs("tokenizers")
@pytest.mark.parametrize("kind", ["Llama-2", "Llama-3", "SmolLM2"])     # two begin every text
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_token_by_token(shape, kind, tmp_path):
    same_as_transformers(write(tmp_path, SHAPES[shape], kind))


NAMED = {"tool_use": "{{ 1 }}", "default": CHATML}


@needs("tokenizers")
@pytest.mark.parametrize("value", [
    CHATML, NAMED, [{"name": name, "template": text} for name, text in NAMED.items()]],
    ids=["text", "object", "list"])
def test_where_a_template_stands(value, tmp_path):
    root = write(tmp_path, "{{ 2 }}")
    change(root / "tokenizer_config.json", chat_template=value)
    change(root / "chat_template.json", chat_template=value)
    assert render(choose_chat(root), "Hi") == "2"           # the .jinja file counts first
    (root / "chat_template.jinja").rename(root / "other.jinja")
    assert render(choose_chat(root, str(root / "other.jinja")), "Hi") == "2"
    for file in ("chat_template.json", "tokenizer_config.json"):
        same_as_transformers(root)
        assert choose_chat(root).file.name == file
        change(root / file, chat_template=None)
    assert choose_chat(root).name == "plain"


CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n" + CHAT


@needs("tokenizers")
def test_built_in_templates_letter_for_letter(tmp_path):
    root = write(tmp_path, LLAMA_2)
    assert render(choose_chat(root, "chatml"), "Hi") == CHAT
    assert render(choose_chat(root, "chatml", "Be brief."), "Hi") == BRIEF
    for text in TEXTS:
        plain = choose_chat(root, "plain")
        assert render(plain, text) == text and plain.bos


@pytest.mark.real
@real_weights
@needs("tokenizers")
def test_smollm2s_own_prompt():
    own = choose_chat(SMOLLM2)
    system = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
              "Face<|im_end|>\n")
    assert own.name == "own" and render(own, "Hi") == system + CHAT
    assert render(choose_chat(SMOLLM2, system="Be brief."), "Hi") == BRIEF
    same_as_transformers(SMOLLM2)


@needs("tokenizers")
def test_who_says_which_template(tmp_path):
    root = write(tmp_path, CHATML)
    notes = chat_notes(choose_chat(root, system="Be brief."))
    assert notes.keys() == {"template", "template_sha", "system"}
    assert all(isinstance(value, str) for value in notes.values())
    said = choose_chat(root, metadata=notes)
    assert (said.name, said.system) == ("own", "Be brief.")
    assert chat_notes(said) == notes
    assert choose_chat(root, system="No.", metadata=notes).system == "No."
    assert choose_chat(root, "chatml", metadata=notes)[:3:2] == ("chatml", None)
    assert choose_chat(root, metadata={"template": "plain"}).name == "plain"
    (root / "chat_template.jinja").write_text(THINK)
    with pytest.raises(ValueError, match="chat_template.jinja: not the chat template that the"):
        choose_chat(root, metadata=notes)
    assert choose_chat(root, "own", metadata=notes).source == THINK


MESSAGES = [    # a template, what its one line says
    ("{{ raise_exception('No\nsystem') }}", "No system"),
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ raise_exception.func.__globals__.json }}", "unsafe"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ("{% for i in range(9**5) %}{% for j in range(9**5) %}x{% endfor %}{% endfor %}", "to an end"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ 'x' * 10**14 }}", "MemoryError"),
    ("{% if %}", "Expected an expression"),
    ("{{ messages[7].content }}", "no element 7"),
]


@needs("tokenizers")
@pytest.mark.parametrize("source, message", MESSAGES)
def test_a_template_that_fails_ends_in_one_line(source, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        render(choose_chat(write(tmp_path, source)), "Hi")
    line = str(e.value)
    assert line.startswith(f"{tmp_path / 'chat_template.jinja'}: the chat template fails")
    assert "\n" not in line and len(line) < 500


@needs("tokenizers")
def test_templates_that_are_not_there_or_damaged(tmp_path):
    root = write(tmp_path, "")
    (root / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: no default chat template"):
        choose_chat(root)
    (root / "chat_template.jinja").unlink()
    for name in ("own", "llama-3"):
        with pytest.raises(ValueError, match=f"no chat template {name} .asked for.; choose --templ"):
            choose_chat(root, name)
    with pytest.raises(ValueError, match="plain: .* has no place for a system text"):
        render(choose_chat(root, system="Be brief."), "Hi")
    change(root / "chat_template.json", chat_template={"tool_use": "{{ 1 }}"})
    with pytest.raises(ValueError, match="chat_template.json: no default chat template"):
        choose_chat(root)
