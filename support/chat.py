"""The prompt of a user's text: what the checkpoint's own chat template makes of it.

A chat template is a program in Jinja that comes with a checkpoint. It runs in jinja2's sandbox,
with the settings and names that transformers 5.23 gives it. So it can write text and do nothing
else. The tests compare prompts with transformers' apply_chat_template, token by token, for nineteen
templates of the published shapes, with system texts and earlier turns.

What is not known here: tools and documents; special tokens that no file of the checkpoint names,
where transformers' class of tokenizer has some; settings of `tojson` without their name, which are
refused. A template that loops for hours and writes nothing meanwhile is not stopped.
"""
import hashlib
import json
import re
from collections import namedtuple
from datetime import datetime
from functools import cache, partial
from itertools import islice
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.files import blame, need, read_object
from support.tokenizer import read_settings, special_tokens

BUILT_IN = {
    "plain": """\
{% if messages[1:] %}
    {{ raise_exception('it has no place for a system text or earlier turns') }}
{% endif %}
{{ messages[0].content }}""",
    # for checkpoints without a template; a system turn stands there only if it is asked for
    "chatml": """\
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}""",
}
LONGEST = 100_000                   # pieces of text; a template that writes more has no end

# How a prompt is written.
# name: plain, chatml, own, or the path of a file; source: the template, in Jinja; file: where it
# stands, for messages; tokens: the special tokens that it may write, {"bos_token": "<s>", ...}.
# system: the system text; None leaves it to the template. why: who says so, for people.
# bos: whether the tokenizer puts begin-of-text in front; a checkpoint's template writes it itself.
Chat = namedtuple("Chat", "name source system why bos file tokens")


def choose_chat(root, template=None, system=None, metadata=None):
    """The Chat of a checkpoint directory: the one asked for (--template, --system), else that of
    the predictors' metadata, else the checkpoint's own, else plain.

    template: "plain", "chatml", "own" or the path of a .jinja file. metadata: of predictors, where
    there are some, see chat_notes. Raises ValueError for a template that is missing, damaged, or no
    longer the one that the predictors were trained with; plain and chatml are known by their name.
    """
    metadata = metadata or {}
    trained = metadata.get("template")
    files = map(root.joinpath, ("chat_template.jinja", "chat_template.json",
                                "tokenizer_config.json"))
    own = next(filter(read_template, files), None)
    name = template or trained or ("own" if own else "plain")
    file = own if name == "own" else Path(name)
    source = BUILT_IN.get(name) or file and read_template(file)
    why = "that of the predictors" if trained else f"{own or 'the checkpoint has none'}"
    if template:
        why = f"asked for; that of the predictors is {trained}" if trained else "asked for"
        metadata = {}
    need(source, f"{root}: no chat template {name} ({why}); choose --template plain, chatml, own "
                 "(where the checkpoint has one) or a .jinja file")
    chat = Chat(name, source, system or metadata.get("system"), why, name in BUILT_IN, file,
                special_tokens(read_settings(root)))
    need(chat.bos or metadata.get("template_sha") in (None, chat_notes(chat)["template_sha"]),
         f"{file}: not the chat template that the predictors were trained with; --template {name} "
         "uses it all the same")
    return chat


def read_template(file):
    """The default chat template that a .jinja or .json file holds; None where it holds none."""
    with blame(file, "no default chat template that can be read"):
        if file.suffix == ".jinja" and file.is_file():
            return file.read_text(encoding="utf-8")
        found = read_object(file).get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        found = found["default"] if isinstance(found, dict) else found
        need(isinstance(found or "", str), "it is not text")
        (found or "").encode()          # a lone surrogate is no text
        return found


def chat_notes(chat):
    """What predictors keep of the prompts that they were trained on, all texts."""
    notes = {"template": chat.name,
             "template_sha": f"{hashlib.sha256(chat.source.encode()).hexdigest():.16}"}
    return notes | {"system": chat.system} if chat.system else notes


def render(chat, text, before=()):
    """The prompt of a user's text, up to where the answer begins: a str for the tokenizer, which
    puts begin-of-text in front only where chat.bos says so.

    before: the turns that stand before it, {"role": system, user or assistant, "content": text}.
    A system text that was asked for, chat.system, takes the place of theirs.
    Raises ValueError that names the template's file for whatever goes wrong in it.
    """
    before = [turn for turn in before if not chat.system or turn["role"] != "system"]
    try:
        pieces = compiled(chat.source).generate(
            messages=[{"role": "system", "content": chat.system}, *before,
                      {"role": "user", "content": text}][not chat.system:],
            add_generation_prompt=True, tools=None, documents=None, **chat.tokens,
            raise_exception=partial(need, False), strftime_now=datetime.now().strftime)
        pieces = list(islice(pieces, LONGEST))
        need(len(pieces) < LONGEST, "it does not come to an end")
        return "".join(pieces)
    except Exception as e:              # a program of others may fail in any way
        raise ValueError(f"{chat.file}: the chat template fails: "
                         f"{' '.join(str(e).split()) or type(e).__name__:.300}") from None


@cache
def compiled(source):
    """A chat template, ready to be rendered in the sandbox."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)     # not for HTML
    # {% generation %} marks what a model said, for its training; here it is a block like any other
    source = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source)
    return sandbox.from_string(source)
