"""Prompt templates: how a chat model's own template writes a prompt, and which one a model has."""
from typing import NamedTuple, Optional

from support.files import need, read_json
from support.places import find


class Template(NamedTuple):
    """How a model's own chat template writes a prompt: a text goes into {}, the answer follows.

    inside: the system text stands in the user's turn, before the user's text; else it has a turn
    of its own. strips: white space around what goes into a turn is left out.
    """
    user: str
    system: Optional[str] = None            # None: there is no place for a system text
    default_system: Optional[str] = None    # the system text where none is asked for
    inside: bool = False
    strips: bool = False

    def turn(self, form, text):
        return form.replace("{}", text.strip() if self.strips else text)


CHATML = Template(user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
                  system="<|im_start|>system\n{}<|im_end|>\n")
LLAMA3 = Template(user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
                       "<|start_header_id|>assistant<|end_header_id|>\n\n",
                  system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
                  strips=True)
# Begin-of-text is not in them: Tokenizer.encode puts it in front, where the model has it.
TEMPLATES = {
    "plain": Template("{}"),
    "chatml": CHATML,
    "smollm2": CHATML._replace(
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen2": CHATML._replace(default_system="You are a helpful assistant."),
    "qwen2.5": CHATML._replace(default_system="You are Qwen, created by Alibaba Cloud. "
                                              "You are a helpful assistant."),
    "llama-2": Template("[INST] {} [/INST]", "<<SYS>>\n{}\n<</SYS>>\n\n", inside=True, strips=True),
    "llama-3": LLAMA3,
    # 3.1 and 3.3 have a system turn even without a system text; in 3.2 the day is today's
    "llama-3.1": LLAMA3._replace(
        system="<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
               "December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>",
        default_system=""),
    # 0.1, 0.2 and Mixtral; the space before the first [ is the tokenizer's
    "mistral": Template("[INST] {} [/INST]", "{}\n\n", inside=True),
    "mistral-v3": Template("[INST] {}[/INST]", "{}\n\n", inside=True),
    "mistral-nemo": Template("[INST]{}[/INST]", "{}\n\n", inside=True),
}
# What stands in a model's published chat template -> our name for it; the first that fits.
SIGNS = (
    ("smollm2", "<|im_start|>", "named SmolLM"),
    ("qwen2.5", "<|im_start|>", "You are Qwen, created by Alibaba Cloud"),
    ("qwen2", "<|im_start|>", "You are a helpful assistant"),
    ("chatml", "<|im_start|>"),
    ("llama-3.1", "<|start_header_id|>", "Cutting Knowledge Date"),
    ("llama-3", "<|start_header_id|>"),
    ("llama-2", "[INST]", "<<SYS>>"),
    ("mistral", "[INST] ", " [/INST]"),
    ("mistral-v3", "[INST] ", "[/INST]"),
    ("mistral-nemo", "[INST]", "[/INST]"),
)
# Models that end a turn with one of these are chat models of that form.
ENDS = {"<|im_end|>": "chatml", "<|eot_id|>": "llama-3"}


def prompt_text(row, template="plain", question="first", system=None):
    """The prompt of a row: the template around instruction, blank line, context.

    question="last" puts the context before the instruction. system: the system text, "" for no
    system turn; without one the template's own, if it has one.
    """
    need(template in TEMPLATES,
         f"unknown prompt template {template!r}; there are {', '.join(TEMPLATES)}")
    form = TEMPLATES[template]
    system = form.default_system if system is None else system or None
    need(system is None or form.system,
         f"the prompt template {template!r} has no place for a system text: leave out --system, "
         "or choose another --template")
    parts = [row["instruction"]]
    if row.get("context"):
        parts.insert(1 if question == "first" else 0, row["context"])
    text = "\n\n".join(parts)
    if system is None:
        return form.turn(form.user, text)
    if form.inside:
        return form.turn(form.user, form.system.replace("{}", system) + text)
    return form.turn(form.system, system) + form.turn(form.user, text)


class Chosen(NamedTuple):
    """The template to use, its system text (None: the template's own), and who says so."""
    template: str
    system: Optional[str]
    why: str


def chosen_template(args, metadata):
    """--template and --system, else those of the predictors' metadata, else the checkpoint's own.

    A system text in the metadata is one for the template there.
    """
    if args.template:
        template, why = args.template, "asked for"
    elif "template" in metadata:
        template, why = metadata["template"], "the predictors were trained with it"
    else:
        template, why = template_of(find(args.ckpt))
    system = args.system
    if system is None and template == metadata.get("template"):
        system = metadata.get("system")
    return Chosen(template, system, why)


def prompt_notes(args):
    """What predictors keep of the prompts that they were trained on; see `chosen_template`."""
    template, system, _ = chosen_template(args, {})
    notes = {"template": template}
    return notes if system is None else notes | {"system": system}


def template_of(root):
    """The template that a checkpoint's files ask for -> its name here, and why."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        text = chat_template(root / name)
        if text is not None:
            for template, *signs in SIGNS:
                if all(sign in text for sign in signs):
                    return template, f"from {name}"
            return "plain", f"the one in {name} is not known here: see --template"
    return template_by_end(root)


def chat_template(file):
    """The chat template that a file holds, or None."""
    if not file.is_file():
        return None
    if file.suffix == ".jinja":
        return file.read_text(encoding="utf-8", errors="replace")
    raw = read_json(file)
    found = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(found, list):     # several, each with a name
        named = {entry.get("name"): entry.get("template") for entry in found
                 if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def template_by_end(root):
    """The template by the tokens that end a text, where there is no chat template."""
    from support.checkpoint import read_config
    file = root / "tokenizer.json"
    raw = read_json(file) if file.is_file() else {}
    listed = raw.get("added_tokens") if isinstance(raw, dict) else None
    ends = read_config(root / "config.json")["eos"]
    for token in listed if isinstance(listed, list) else []:
        if isinstance(token, dict) and token.get("id") in ends and token.get("content") in ENDS:
            return ENDS[token["content"]], f"its texts end with {token['content']}"
    return "plain", "it has no chat template"
