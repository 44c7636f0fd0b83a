"""support/chat.py: prompts are what the checkpoint's own chat template renders."""
import itertools

import pytest

import test_tokenizer
from conftest import SMOLLM2, change, needs, real_weights
from support.chat import chat_notes, choose_chat, render
from support.tokenizer import Tokenizer

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
SHAPES = {
    "chatml": CHATML, "llama-2": LLAMA_2, "llama-3": LLAMA_3, "mistral": MISTRAL, "think": THINK,
    # Qwen2.5-Math: another default system text; {%+ keeps the spaces before it
    "math": """\
{%- if tools %}{{- '# Tools' + (tools | tojson) }}{%- endif %}
{%- set first = messages[0] %}
<|im_start|>system
{% if first['role'] == 'system' %}{{ first['content'] }}{% else %}Put the answer in \\boxed{}.
  {%+ endif %}<|im_end|>
{% for m in messages[1 if first.role == 'system' else 0:] %}
    {%- if m.role in ('user', 'assistant') and not m.tool_calls %}
        {{- ['<|im_start|>', m.role, '\n', m.content, '<|im_end|>\n'] | join }}
    {%- endif %}
{%- endfor %}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}""",
    # Qwen1.5: the default has no full stop; the last line break is the text's
    "qwen1.5": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    # Qwen3: thoughts of earlier turns are cut out, enable_thinking is not defined
    "qwen3": """\
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" and message.content is string
            and not message.content.startswith('<tool>') %}
        {%- set ns.searching, ns.last = false, messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == "assistant" and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ text ~ '<|im_end|>\n' ~ loop.index0 ~ ns.last }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{% endif %}
""",
    # QwQ: the generation prompt opens a think block
    "qwq": """\
{%- for message in messages %}
    {%- if message.role == 'assistant' and not loop.last %}
        {%- set content = (message.content.split('</think>') | last).strip() %}
    {%- else %}{% set content = message.content %}{% endif %}
    {{- '<|im_start|>%s\n%s<|im_end|>\n' | format(message.role, content) }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n<think>\n" }}{% endif %}""",
    # Gemma: the system text is the user's, the assistant is called model
    "gemma": """\
{{ bos_token }}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else 'user' %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}
""",
    "phi-3": """\
{% for message in messages %}{% if message.role in {'system': 1, 'user': 1, 'assistant': 1} %}
{{ '<|' + message.role + '|>' }}
{{ message.content + '<|end|>' }}
{% endif %}{% endfor %}
{%- if add_generation_prompt -%}
  <|assistant|>
{% else %}{{ eos_token }}{% endif %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] != 'assistant' %}
{{ '<|' ~ message['role'] ~ '|>\n' + message['content'] + eos_token }}
{% elif loop.previtem.role == 'user' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    # Mistral Large: brackets around the system text
    "mistral-large": """\
{%- if messages[0].role == "system" %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- set ns = namespace() %}{% set ns.index = 0 %}
{{- bos_token }}
{%- if system is defined %}{{- "[SYSTEM_PROMPT] " + system + "[/SYSTEM_PROMPT]" }}{% endif %}
{%- for turn in turns %}
    {%- if (turn.role == "user") != (ns.index % 2 == 0) %}{{ raise_exception("Order") }}{% endif %}
    {%- set ns.index = ns.index + 1 %}
    {{- "[INST] " + turn.content + "[/INST]" if turn.role == "user"
        else " " + turn.content|trim + eos_token }}
{%- endfor %}""",
    # DeepSeek: a namespace, thoughts cut out, wide bars
    "deepseek": """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(first=true, system='') %}{%- for m in messages %}\
{%- if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] %}{%- endif %}\
{%- endfor %}{{bos_token}}{{ns.system}}{%- for m in messages %}{%- if m['role'] == 'user' %}\
{{'<｜User｜>' + m['content']}}{%- endif %}\
{%- if m['role'] == 'assistant' and m['content'] is not none %}\
{% set text = m['content'] %}{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}\
{% endif %}{{'<｜Assistant｜>' + text + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}""",
    "vicuna": """\
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set own = messages | rejectattr('role', 'ne', 'system') | first %}
{{- (own | default({'content': 'A chat.'})).content }}
{%- for message in messages if message.role != 'system' %}
    {{- {'user': ' USER: ', 'assistant': ' ASSISTANT: '}[message.role] ~ message.content.strip() }}
    {{- '</s>' if message.role == 'assistant' }}
{%- endfor %} ASSISTANT:{# {{ asked }} #}{{ asked | map(attribute='content') | join('|') }}""",
    "alpaca": """\
  {%- for message in messages -%}
    {%- set names = {'user': 'Instruction', 'assistant': 'Response'} %}
    ### {{ names.get(message.role, message.role | title) }}:
    {{ message.content | trim | replace('\t', '    ') | indent(2) }}
    {{- "\n\n" -}}
  {%- endfor -%}
  ### Response:
""",
    # macros, `items`, `tojson`, sorted keys, slices, the time
    "macros": """\
{%- macro turn(role, text, mark='|') -%}
    <{{ mark }}{{ role }}{{ mark }}>{{ caller() if caller else '' }}{{ text }}
{%- endmacro -%}
{%- for message in messages[-3:] %}
    {{- turn(message.role, message.content[:20]) }}
    {%- for key, value in message | items %}{{ key }}={{ value | tojson }};{% endfor %}
    {%- for key, value in message.items() | sort(reverse=true) %}
        {{- loop.cycle(key, '-') }}
    {%- endfor %}
{%- endfor %}
{%- call turn('x', strftime_now('%Y-%m-%d %j'), mark='') %}{{ messages | length }}{% endcall %}
{{- {'b': [1, none, true], 'a': messages[0]} | tojson(indent=2, sort_keys=true) }}
{{- strftime_now('%f') | length }}{{ unk_token }}{{ pad_token is defined }}{{ cls_token }}""",
    # {% generation %} stands around what is trained on
    "generation": """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{%- set text = message.content %}
{% if message.role == 'assistant' %}
    {%- generation -%} {% set text = text | upper %}
  {{ text }}{{ loop.index }}
  {%+ endgeneration %}
{%generation%}{{ eos_token }}{%- endgeneration -%}
{% else %}
{{ text }}
{% endif %}
{{ text }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    # the content may be a list of parts
    "parts": """\
{%- for message in messages %}
    {%- if message.content is string %}{% set parts = [{'type': 'text', 'text': message.content}] %}
    {%- elif message.content is iterable and message.content is not mapping %}
        {%- set parts = message.content %}
    {%- endif %}
    {%- for part in parts if part.type == 'text' %}
        {{- loop.length ~ message.role[0] | upper ~ (part['text'] | trim) ~ message.name }}
    {%- else %}{{ raise_exception('no text') }}
    {%- endfor %}
    {%- if not loop.last %}{{ '\n' * 2 }}{% endif %}
{%- endfor %}
{%- set tail = ['<end_of_turn>'] %}{{ tail | join('') }}{{ (documents or []) | length }}""",
}
TEXTS = ["Hi", " \n Who?\n\n  Clara {} <s>[INST] \t\n", "{é<b>'\"}", ""]
OWN = {"role": "system", "content": " The row's\n"}
TURNS = [{"role": "user", "content": "{Hi} "},
         {"role": "assistant", "content": "<think>\nhm\n</think>\n\n Hello.\t\n"}]


def write(folder, source, kind="SmolLM2"):
    """A checkpoint's folder with a template and a shrunken tokenizer of a kind."""
    test_tokenizer.write(folder, kind)
    (folder / "chat_template.jinja").write_text(source)
    return folder


def same_as_transformers(root):
    """Every prompt, with and without a system text and earlier turns, is transformers', token by
    token.
    """
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(root), Tokenizer(root)
    befores = [], TURNS, [OWN], [OWN, *TURNS, *TURNS]
    for text, system, before in itertools.product(TEXTS, (None, "Be\n\nbrief. "), befores):
        chat, turns = choose_chat(root, system=system), [*before, {"role": "user", "content": text}]
        if system:
            turns = [{"role": "system", "content": system}, *turns[before[:1] == [OWN]:]]
        want = theirs.apply_chat_template(turns, return_dict=False, add_generation_prompt=True)
        assert ours.encode(render(chat, text, before), bos=chat.bos) == want, turns


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
    assert "named SmolLM" in render(choose_chat(SMOLLM2), "Hi")
    same_as_transformers(SMOLLM2)


@needs("tokenizers")
def test_who_says_which_template(tmp_path):
    root = write(tmp_path, CHATML)
    notes = chat_notes(choose_chat(root, system="Be brief."))
    assert all(isinstance(value, str) for value in notes.values())
    said = choose_chat(root, metadata=notes)
    assert said[:3] == ("own", CHATML, "Be brief.") and chat_notes(said) == notes
    assert choose_chat(root, system="No.", metadata=notes).system == "No."
    assert choose_chat(root, "chatml", metadata=notes)[2:4] == (
        None, "asked for; that of the predictors is own")
    (root / "chat_template.jinja").write_text(THINK)
    with pytest.raises(ValueError, match="chat_template.jinja: not the chat template that the"):
        choose_chat(root, metadata=notes)
    assert choose_chat(root, "own", metadata=notes).source == THINK
    (root / "chat_template.jinja").rename(root / "mine.jinja")
    with pytest.raises(ValueError, match="no chat template own .that of the predictors.; choose"):
        choose_chat(root, metadata=notes)
    plain, mine = choose_chat(root), choose_chat(root, str(root / "mine.jinja"))
    write(root, CHATML)
    for chat in plain, mine:        # the checkpoint's own, which came later, does not count
        found = choose_chat(root, metadata=chat_notes(chat))
        assert found == chat._replace(why="that of the predictors")


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
        with pytest.raises(ValueError, match=f"no chat template {name} .asked for.; choose --te"):
            choose_chat(root, name)
    for system, before in (("Be brief.", []), (None, TURNS)):
        with pytest.raises(ValueError, match="plain: .* has no place for a system text or earlie"):
            render(choose_chat(root, system=system), "Hi", before)
    for value in {"tool_use": "{{ 1 }}"}, 5, {"default": True}, [{"name": "default"}]:
        change(root / "chat_template.json", chat_template=value)
        with pytest.raises(ValueError, match="chat_template.json: no default chat template"):
            choose_chat(root)
