"""Make checkpoints/toy: a small Llama that finds a few facts hidden in a long prompt.

The script writes its own text from a seed: a story of filler sentences in which a few say who
sells what, then a question about one or two of these people. So the truth about which tokens
matter is known, and an answer is right or wrong as a whole. Everything is made here: tokenizer,
weights, training rows for the predictors.

    python checkpoints/toy.py                # pretrain (22 minutes on one core) and write it
    python checkpoints/toy.py --eval 500     # exact answers on fresh prompts, by every scorer
"""
import json
import math
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Config, Llama, Tokenizer, hf_name  # noqa: E402
from prune import UNPRUNED, extend, prefill  # noqa: E402
from support.files import need, save_tensors  # noqa: E402
from support.options import (  # noqa: E402
    add_json_argument, add_pruning_arguments, add_quiet_argument, at_least, cli, command_parser,
    print_json)
from support.progress import Progress, counted  # noqa: E402
from support.sampling import finite, one_past  # noqa: E402
from support.saved import load_pruning  # noqa: E402

HERE = Path(__file__).resolve().parent / "toy"


# ------------------------------------------------------------------------------------------ text

NAMES = """Anna Boris Clara David Emma Felix Grace Henry Irene James Karen Louis Maria Nathan Olga
    Peter Quinn Rosa Simon Teresa Ursula Victor Wanda Xavier Yvonne Zoe Albert Bella Conrad Diana
    Edgar Flora""".split()
ADJECTIVES = """old green broken narrow golden silent wooden hidden round empty white dusty small
    dark painted crooked heavy yellow foreign frozen shiny simple brown quiet""".split()
THINGS = """keys maps lamps rings coins books letters flutes mirrors clocks baskets boxes chairs
    tables boats drums shoes hats bottles candles stones bells knives cups""".split()
WHO = """traveller farmer sailor teacher painter baker soldier child merchant widow shepherd
    singer""".split()
DID = ("walked past", "looked at", "counted", "talked about", "dreamed of", "waited near", "left",
       "turned toward", "rested beside", "asked about")
WHEN = ("in the morning", "after the rain", "before dinner", "on a cold day", "every summer",
        "without a word", "late at night", "for an hour", "once more", "as usual")
WEATHER = "wind rain snow fog light smoke music dust".split()
MOVED = ("drifted over", "came from", "faded behind", "settled on", "covered", "moved around",
         "rose above", "hung over")


def filler(rng):
    """A sentence that answers no question, with the same adjectives and things as the facts."""
    thing = f"{rng.choice(ADJECTIVES)} {rng.choice(THINGS)}"
    adjective = rng.choice(ADJECTIVES)
    other = rng.choice(THINGS)
    kind = rng.randrange(4)
    if kind == 0:
        return f"The {rng.choice(WHO)} {rng.choice(DID)} the {thing} {rng.choice(WHEN)}."
    if kind == 1:
        moved = f"{rng.choice(WEATHER)} {rng.choice(MOVED)}"
        return f"The {moved} the {thing} and the {adjective} {other}."
    if kind == 2:
        return f"A {rng.choice(WHO)} and a {rng.choice(WHO)} {rng.choice(DID)} the {thing}."
    moved = f"{rng.choice(WEATHER)} {rng.choice(MOVED)}"
    return f"Near the {thing} the {moved} the {other} {rng.choice(WHEN)}."


def fact(name, facts):
    """The sentence that tells, and that answers, what somebody sells."""
    adjective, thing = facts[name]
    return f"{name} sells {adjective} {thing}."


def story(rng, n_facts, n_sentences):
    """-> (sentences, indices of the facts among them, {name: (adjective, thing)}).

    Facts stand anywhere.
    """
    people = rng.sample(NAMES, n_facts)
    facts = {name: (rng.choice(ADJECTIVES), rng.choice(THINGS)) for name in people}
    where = set(rng.sample(range(n_sentences), n_facts))
    told = iter(people)
    sentences = []
    for i in range(n_sentences):
        sentences.append(fact(next(told), facts) if i in where else filler(rng))
    return sentences, where, facts


def ask(rng, facts):
    """-> (question, answer) about one or two of the people."""
    names = rng.sample(list(facts), rng.randint(1, 2))
    verb = "does" if len(names) == 1 else "do"
    question = f"Question: what {verb} {' and '.join(names)} sell? Answer:"
    return question, " ".join(fact(name, facts) for name in names)


def make_tokenizer(seed, path):
    """Train the sentencepiece tokenizer on generated text: every word becomes one token."""
    import sentencepiece
    rng = random.Random(seed)
    text = []
    for _ in range(4000):
        sentences, _, facts = story(rng, 4, 12)
        text.append(" ".join([*sentences, *ask(rng, facts)]))
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=f, vocab_size=1280, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


# ----------------------------------------------------------------------------------- pretraining

# Retrieval does not come by itself. First copying: random tokens repeated at one fixed distance
# (easy: look back 16), then at any distance (which takes an induction head). Then stories, from
# two facts in 48 tokens to six in 560. Each step up is taken when the words of the facts are
# answered right.
COPY_UNTIL = (0.3, 0.4)             # the loss at which each of the two copying phases ends
LEVELS = (                          # tokens, facts, questions
    (48, 2, 2), (64, 3, 2), (96, 4, 3), (128, 4, 4),
    (192, 5, 4), (256, 6, 4), (384, 6, 5), (560, 6, 5))
BACKGROUND = 0.05                   # weight in the loss of a token outside the answers


def copy_batch(rng, used, phase, rows=32, length=64):
    """Rows in which a random piece repeats -> tokens, their weights in the loss."""
    tokens = torch.empty(rows, length, dtype=torch.long)
    weight = torch.ones(rows, length)
    for i in range(rows):
        period = 16 if phase == 0 else rng.randint(4, 20)
        chosen = [rng.randrange(len(used)) for _ in range(period)]
        piece = used[torch.tensor(chosen)]
        tokens[i] = piece.repeat(length // period + 1)[:length]
        weight[i, :period] = 0
    return tokens, weight


def story_batch(rng, sp, level, tokens_per_batch=4096):
    """Rows of one length: a story, then several questions with answers, which carry the loss."""
    length, n_facts, n_questions = LEVELS[level]
    rows = max(4, tokens_per_batch // length)
    free = length - 2 - 20 * n_questions - 6 * n_facts
    n_sentences = n_facts + max(0, free // 13)
    tokens = torch.zeros(rows, length, dtype=torch.long)
    weight = torch.zeros(rows, length)
    for i in range(rows):
        sentences, _, facts = story(rng, n_facts, n_sentences)
        ids = [sp.bos_id(), *sp.encode(" ".join(sentences))]
        weights = [BACKGROUND] * len(ids)
        for _ in range(n_questions):
            question, answer = ask(rng, facts)
            for text, value in ((question, BACKGROUND), (answer, 1.0)):
                new = sp.encode(text)
                ids += new
                weights += [value] * len(new)
        n = min(len(ids), length)
        tokens[i, :n] = torch.tensor(ids[:n])
        weight[i, :n] = torch.tensor(weights[:n])
    return tokens, weight


class Course:
    """What is learned now: copying in two phases, stories level by level, then a cool-down."""

    def __init__(self, cooldown, quiet=False):
        self.cooldown, self.progress = cooldown, Progress(quiet=quiet)
        self.phase = 0              # 0 and 1: copying; 2: stories
        self.level = 0
        self.right = 0.0            # running share of the asked words that are answered right
        self.end = None             # the number of steps in all, once it is known

    def rate(self, step):
        """Share of the peak learning rate."""
        warm = min(1.0, (step + 1) / 30)
        return warm if self.end is None else warm * ((self.end - step) / self.cooldown)

    def copied(self, loss):
        """After a batch of copying."""
        if loss < COPY_UNTIL[self.phase]:
            self.phase += 1

    def answered(self, right, asked, step):
        """After a batch of the level: `right` words of the `asked` ones."""
        self.right = 0.9 * self.right + 0.1 * right / asked
        if self.level < len(LEVELS) - 1 and self.right > 0.93:
            self.level += 1
            self.right = 0.0
        elif self.end is None and self.right > 0.95:
            self.end = step + 1 + self.cooldown

    def report(self, step, loss, seconds):
        """How far it is after a step; every hundredth is said on stdout."""
        if self.phase < 2:
            where = f"copying {self.phase}"
        else:
            length = LEVELS[self.level][0]
            where = f"level {self.level} ({length} tokens), words right {self.right:.1%}"
        left = f", {self.end - step - 1} steps left" if self.end else ""
        text = f"step {step + 1}  loss {loss:.3f}  {where}  {seconds:.0f} s{left}"
        self.progress.note(text)
        if step % 100 == 99:
            self.progress.clear()
            print(text, flush=True)


def fresh_model(sp):
    """A model of 2.3 million random weights: 12 blocks, two query heads per key/value head."""
    # an answer ends where the next question would begin
    ends = (sp.eos_id(), sp.encode("Question")[0])
    config = Config(dim=128, n_blocks=12, n_heads=4, n_kv_heads=2, head_dim=32, ffn=336,
                    vocab=sp.vocab_size(), max_positions=2048, tied=True,
                    bos=sp.bos_id(), eos=ends)
    model = Llama(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            continue
        p.data.normal_(0, 0.05 if "embed" in name else config.dim ** -0.5)
        # the blocks start as the identity, so that the embeddings are not drowned
        if name.endswith(("o.weight", "down.weight")):
            p.data.zero_()
    return model


def make_optimizers(model):
    """Muon for the blocks' matrices, AdamW for the rest -> [(optimizer, peak learning rate)]."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = p.dim() == 2 and "embed" not in name
        (matrices if inside else others).append(p)
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0,
                            adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    return [(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in (muon, adam)]


def used_tokens(rng, sp):
    """The tokens that stories are made of, increasing."""
    used = set()
    for _ in range(200):
        sentences, _, _ = story(rng, 4, 12)
        used.update(sp.encode(" ".join(sentences)))
    return torch.tensor(sorted(used))


def learn(model, optimizers, rate, tokens, weight):
    """One step on tokens (B, N) -> its loss, and the likeliest next tokens (B, N - 1)."""
    logits = model(tokens)[:, :-1]
    weight = weight[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = (each * weight.flatten()).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in optimizers:
        optimizer.param_groups[0]["lr"] = peak * rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), logits.argmax(-1)


def pretrain(seed, max_steps, cooldown=400, quiet=False):
    """Pretrain from nothing; returns the model."""
    sp = make_tokenizer(seed, HERE / "tokenizer.model")
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    model = fresh_model(sp)
    optimizers = make_optimizers(model)
    used = used_tokens(rng, sp)
    is_answer = torch.zeros(model.config.vocab, dtype=torch.bool)
    is_answer[[sp.encode(word)[0] for word in ADJECTIVES + THINGS]] = True
    course = Course(cooldown, quiet)
    start = time.time()
    for step in range(max_steps):
        level = course.level if rng.random() < 0.75 else rng.randint(0, course.level)
        copying = course.phase < 2
        if copying:
            tokens, weight = copy_batch(rng, used, course.phase)
        else:
            tokens, weight = story_batch(rng, sp, level)
        loss, said = learn(model, optimizers, course.rate(step), tokens, weight)
        if copying:
            course.copied(loss)
        elif level == course.level:
            target = tokens[:, 1:]
            asked = (weight[:, 1:] > 0.5) & is_answer[target]
            right = (said == target) & asked
            course.answered(right.sum().item(), asked.sum().item(), step)
        if step % 10 == 9:
            course.report(step, loss, time.time() - start)
        if step + 1 == course.end:
            break
    course.progress.clear()
    print(f"pretrained in {(time.time() - start) / 60:.0f} minutes, {step + 1} steps")
    return model


# ----------------------------------------------------------------------------------------- files


def write(model, seed):
    """config.json, model.safetensors (fp16: half the size, the same answers), rows for train.py."""
    state = {hf_name(name): p.half() for name, p in model.named_parameters()}
    save_tensors(HERE / "model.safetensors", state, {"format": "pt"})
    config = json.dumps(hf_config(model.config), indent=1)
    (HERE / "config.json").write_text(config + "\n")
    rng = random.Random(seed + 2)
    with open(HERE / "train.jsonl", "w") as f:
        for _ in range(400):
            sentences, _, facts = story(rng, 6, rng.randint(30, 38))
            question, answer = ask(rng, facts)
            row = {"instruction": " ".join([*sentences, question]), "response": answer}
            f.write(json.dumps(row) + "\n")


def hf_config(config):
    """A Config in the words of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.n_blocks,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos),
        "torch_dtype": "float16",
    }


# ------------------------------------------------------------------------------------ evaluation


def fresh_prompt(rng, tokenizer, least):
    """A prompt of at least `least` tokens.

    -> tokens (1, N) with the answer, prompt_len, positions of the asked facts' tokens
    """
    n_sentences = 30
    while True:
        sentences, where, facts = story(rng, 6, n_sentences)
        question, answer = ask(rng, facts)
        prompt = tokenizer.encode(" ".join([*sentences, question]))
        if len(prompt) >= least:
            break
        n_sentences += 1
    response = tokenizer.encode(answer, bos=False)
    asked = []
    start = 1                       # the begin-of-text token stands before
    for i, sentence in enumerate(sentences):
        end = start + len(tokenizer.encode(sentence, bos=False))
        if i in where and sentence.split()[0] in question:
            asked += range(start, end)
        start = end
    return torch.tensor([prompt + response]), len(prompt), asked


def examine(model, prompt, schedule, scorer):
    """One prompt -> is the answer right, how many of the asked facts' tokens live to the end?"""
    tokens, prompt_len, asked = prompt
    tokens = tokens.to(model.device)
    logits, caches, trace = prefill(
        model, tokens[:, :prompt_len], schedule, scorer, room=tokens.shape[1])
    rest = extend(model, tokens[:, prompt_len:-1], prompt_len, caches)
    # Greedy decoding gives the answer exactly when each of its tokens is the likeliest one
    # after those before it.
    said = finite(model, torch.cat((logits[:, None], rest), 1)).argmax(-1)
    alive = trace[-1].kept[0].tolist() if trace else range(prompt_len)
    return torch.equal(said, tokens[:, prompt_len:]), len(set(alive) & set(asked))


def measure(name, model, prompts, schedule, predictors, quiet=False):
    """One scorer on all prompts -> its row of the table."""
    from lab.scorers import make_scorer
    right = kept = 0
    for i, prompt in enumerate(counted(prompts, f"prompts, {name}", quiet), start=1):
        if name == "full":
            exact, alive = examine(model, prompt, UNPRUNED, None)
        else:
            scorer = make_scorer(name, model, schedule, predictors, seed=i - 1)
            exact, alive = examine(model, prompt, schedule, scorer)
        right += exact
        kept += alive
    n = len(prompts)
    share = right / n
    return {"scorer": name,
            "metric": "exact",
            "value": share,
            "stderr": math.sqrt(share * (1 - share) / n),
            "n": n,
            "fact_tokens_kept": kept / sum(len(asked) for _, _, asked in prompts)}


def evaluate(args):
    """Exact answers on fresh prompts, every scorer on the same ones."""
    from lab.scorers import SCORERS, TRAINED
    model, schedule, predictors, _ = load_pruning(args)
    tokenizer = Tokenizer(args.ckpt)
    rng = random.Random(args.seed + 1_000_000)
    one_past(model.config, args.least, 1)
    prompts = [fresh_prompt(rng, tokenizer, args.least) for _ in range(args.eval)]
    for number, (tokens, n, _) in enumerate(prompts, start=1):
        one_past(model.config, n, tokens.shape[1] - n, f"prompt {number} of {len(prompts)}: ")
    lengths = [prompt_len for _, prompt_len, _ in prompts]
    print(f"{len(prompts)} fresh prompts of {min(lengths)} to {max(lengths)} tokens,"
          f" stages after blocks {schedule.after(len(model.blocks))},"
          f" {1 - schedule.share(schedule.stages):.0%} dropped by the last stage")
    print(f"{'scorer':12} exact answers   asked facts' tokens kept to the end")
    left_out = {"prior"}            # these predictors have none
    if predictors is None:
        left_out.update(TRAINED)
    rows = []
    for name in ("full", *SCORERS):
        if name in left_out:
            continue
        row = measure(name, model, prompts, schedule, predictors, args.quiet)
        print(f"{name:12} {row['value']:13.1%} {row['fact_tokens_kept']:38.1%}", flush=True)
        rows.append(row)
    print_json(args, model, {"schedule": asdict(schedule), "rows": rows})


def main():
    parser = command_parser(__doc__)
    parser.add_argument(
        "--seed", type=int, default=0,
        help="of the text, the weights and, with --eval, the fresh prompts (plus one million)")
    parser.add_argument("--max-steps", type=int, default=8000,
                        help="pretraining stops here at the latest")
    parser.add_argument("--eval", type=at_least(1), metavar="N",
                        help="do not pretrain; answer N fresh prompts")
    parser.add_argument("--least", type=int, default=400,
                        help="--eval: fewest tokens of a prompt")
    add_quiet_argument(parser)
    add_json_argument(parser)
    add_pruning_arguments(parser)
    args = parser.parse_args()
    need(args.eval or not args.json, "--json goes with --eval")
    if args.eval:
        evaluate(args)
    else:
        HERE.mkdir(exist_ok=True)
        write(pretrain(args.seed, args.max_steps, quiet=args.quiet), args.seed)
        print(f"wrote {HERE}; now train its predictors: python train.py --out {HERE}")


if __name__ == "__main__":
    cli(main)
