"""Make checkpoints/toy: a small Llama that finds a few facts hidden in a long prompt.

The script writes its own text from a seed: a story of filler sentences in which a few say who
sells what, then a question about one or two of these people. So the truth about which tokens
matter is known, and an answer is right or wrong as a whole. Everything is made here: tokenizer,
weights, training rows for the predictors.

    python checkpoints/toy.py                # pretrain (an hour on one core) and write it
    python checkpoints/toy.py --eval 500     # exact answers on fresh prompts, by every scorer

Shapes: B rows of N tokens; only pretraining reads several rows at once.
"""
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

TOY = Path(__file__).resolve().parent / "toy"
sys.path.insert(0, str(TOY.parent.parent))

from lab.scorers import SCORERS, make_scorer  # noqa: E402
from model import Config, Llama, Tokenizer  # noqa: E402
from prune import UNPRUNED, extend, load_pruning, prefill  # noqa: E402
from support import config, files, options, runs  # noqa: E402
from support.weights import hf_name  # noqa: E402

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
DID = ("walked past,looked at,counted,talked about,dreamed of,waited near,left,turned toward,"
       "rested beside,asked about").split(",")
WHEN = ("in the morning,after the rain,before dinner,on a cold day,every summer,without a word,"
        "late at night,for an hour,once more,as usual").split(",")
WEATHER = "wind rain snow fog light smoke music dust".split()
MOVED = ("drifted over,came from,faded behind,settled on,covered,moved around,rose above,"
         "hung over").split(",")


def filler(rng):
    """A sentence that answers no question, with the same adjectives and things as the facts."""
    thing = f"{rng.choice(ADJECTIVES)} {rng.choice(THINGS)}"
    adjective = rng.choice(ADJECTIVES)
    other = rng.choice(THINGS)
    kind = rng.randrange(4)
    if kind == 0:
        return f"The {rng.choice(WHO)} {rng.choice(DID)} the {thing} {rng.choice(WHEN)}."
    if kind == 2:
        return f"A {rng.choice(WHO)} and a {rng.choice(WHO)} {rng.choice(DID)} the {thing}."
    moved = f"{rng.choice(WEATHER)} {rng.choice(MOVED)}"
    if kind == 1:
        return f"The {moved} the {thing} and the {adjective} {other}."
    return f"Near the {thing} the {moved} the {other} {rng.choice(WHEN)}."


def story(rng, n_facts, n_sentences):
    """-> (sentences, facts): the facts, {name: the sentence that says what they sell}, stand
    anywhere among the sentences. They are the answers, too.
    """
    facts = {name: f"{name} sells {rng.choice(ADJECTIVES)} {rng.choice(THINGS)}."
             for name in rng.sample(NAMES, n_facts)}
    where = rng.sample(range(n_sentences), n_facts)
    told = iter(facts.values())
    return [next(told) if i in where else filler(rng) for i in range(n_sentences)], facts


def ask(rng, facts):
    """-> (question, answer) about one or two of the people."""
    names = rng.sample(list(facts), rng.randint(1, 2))
    verb = "does" if len(names) == 1 else "do"
    question = f"Question: what {verb} {' and '.join(names)} sell? Answer:"
    return question, " ".join(facts[name] for name in names)


def make_tokenizer(seed):
    """Train the sentencepiece tokenizer on generated text: every word becomes one token."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    rng, texts = random.Random(seed), []
    for _ in range(4000):
        sentences, facts = story(rng, 4, 12)
        texts.append(" ".join([*sentences, *ask(rng, facts)]))
    path = TOY / "tokenizer.model"
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=1280, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1)
    return SentencePieceProcessor(model_file=str(path))


# A prompt ends in "Answer:", and the answer goes on in that line. There are no line breaks.
TEMPLATE = ("{% if messages[1:] %}{{ raise_exception('it has no place for a system text') }}"
            "{% endif %}<s> {{ messages[0].content | replace('\\n\\n', ' ') }}")

# ----------------------------------------------------------------------------------- pretraining

# Retrieval does not come by itself. First copying: random tokens repeated at one fixed distance
# (easy: look back 16), then at any distance (which takes an induction head). Then stories, from
# two facts in 48 tokens to six in 2,000. Each step up is taken when the answers are right.
COPY_UNTIL = (0.3, 0.4)             # the loss at which each of the two copying phases ends
LEVELS = (                          # tokens, facts, sentences with the facts, questions
    (48, 2, 2, 2), (64, 3, 3, 2), (96, 4, 4, 3), (128, 4, 5, 4),
    (192, 5, 11, 4), (256, 6, 16, 4), (384, 6, 24, 5), (560, 6, 38, 5),
    (900, 6, 52, 16), (1400, 6, 96, 16), (2040, 6, 144, 20))
# Long stories are too hard at the peak learning rates, which fall from the first of these on. The
# embeddings and two blocks stay as they are by then: long stories would let fade what they tell of
# a word, those before it, and the first stage is to score a fact by that.
COOL = 8
BACKGROUND = 0.05                   # weight in the loss of a token outside the answers


def copy_row(rng, used, phase):
    """A row in which a random piece repeats: a (token, its weight in the loss) for each place."""
    period = rng.randint(4, 20) if phase else 16
    piece = rng.choices(used, k=period) * 16
    return [(token, float(i >= period)) for i, token in enumerate(piece[:64])]


def story_row(rng, sp, level):
    """The same for a story, then several questions with answers, which carry the loss."""
    length, n_facts, n_sentences, n_questions = LEVELS[level]
    sentences, facts = story(rng, n_facts, n_sentences)
    parts = [(" ".join(sentences), BACKGROUND)]
    for _ in range(n_questions):
        question, answer = ask(rng, facts)
        parts += [(question, BACKGROUND), (answer, 1.0)]
    row = [(token, weight) for text, weight in parts for token in sp.encode(text)]
    return [(sp.bos_id(), BACKGROUND), *row, *[(0, 0.0)] * length][:length]


def fresh_model(sp):
    """A model of 2.3 million random weights: 12 blocks, two query heads per key/value head."""
    model = Llama(Config(dim=128, n_blocks=12, n_heads=4, n_kv_heads=2, head_dim=32, ffn=336,
                         vocab=sp.vocab_size(), max_positions=2048, tied=True, bos=sp.bos_id(),
                         # an answer ends where the next question would begin
                         eos=(sp.eos_id(), *sp.encode("Question"))))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.05 if "embed" in name else 128 ** -0.5)
        # the blocks start as the identity, so that the embeddings are not drowned
        if name.endswith(("o.weight", "down.weight")):
            p.data.zero_()
    return model


class Muon(torch.optim.SGD):
    """Each gradient (n, m), smoothed, becomes about the nearest orthogonal matrix.

    torch.optim.Muon takes its five Newton-Schulz steps in bfloat16, which is slow on most CPUs.
    """

    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:          # else it no longer learns
                mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                p.grad = orthogonal(p.grad.lerp(mean, 0.95))
        super().step()


def orthogonal(x):
    """About the nearest orthogonal matrix, of the size that Muon gives it: (n, m) -> (n, m)."""
    x = F.normalize(x, dim=(0, 1))
    for _ in range(5):
        gram = x.mT @ x
        x = 3.4445 * x + x @ (2.0315 * gram @ gram - 4.775 * gram)
    return x * max(1, len(x) / len(x.T)) ** 0.5


def make_optimizers(model):
    """Muon for the blocks' matrices, AdamW for the rest, at their peak learning rates."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [model.embed.weight, *(p for p in model.parameters() if p.dim() == 1)]
    return (Muon(matrices, lr=0.02),
            torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0))


def learn(model, optimizers, rate, tokens, weight):
    """One step on tokens (B, N) with weights in the loss, at a share of the peak rates.

    -> the loss, and the share of the tokens of full weight that are the likeliest ones.
    """
    logits, target, weight = model(tokens[:, :-1]), tokens[:, 1:], weight[:, 1:]
    each = F.cross_entropy(logits.mT, target, reduction="none")
    loss = (each * weight).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()
    hits = logits.argmax(-1) == target
    return loss.item(), hits[weight == 1].float().mean().item()


def pretrain(seed, quiet, cooldown=600):
    """Pretrain from nothing; writes the tokenizer and returns the model."""
    sp = make_tokenizer(seed)
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    model = fresh_model(sp)
    optimizers = make_optimizers(model)
    used = sorted({*sp.encode(" ".join(story(rng, len(NAMES), 2000)[0]))})
    progress = runs.Progress(quiet=quiet)
    # Phases 0 and 1 copy, phase 2 reads stories up to the hardest level. right: the running share
    # of the answers' tokens that are right at that level.
    phase = hardest = right = step = 0
    end = 8000                      # at the latest
    while step < end:
        step += 1
        level = hardest if rng.random() < 0.75 else rng.randint(0, hardest)
        if phase < 2:
            rows = [copy_row(rng, used, phase) for _ in range(32)]
        else:
            rows = [story_row(rng, sp, level) for _ in range(4096 // LEVELS[level][0])]
        tokens, weight = torch.tensor(rows).unbind(-1)
        rate = min(1.0, step / 30, (end - step + 1) / cooldown)
        loss, share = learn(model, optimizers, rate, tokens.long(), weight)
        progress.note(f"step {step} of at most {end}, phase {phase}, level {hardest}: "
                      f"loss {loss:.3f}, answers' tokens right {right:.1%}")
        if phase < 2:
            phase += loss < COPY_UNTIL[phase]
        elif level == hardest:
            # two of an answer's five tokens have to be found: 0.972 is 93% of these
            right = 0.9 * right + 0.1 * share
            if LEVELS[hardest + 1:] and right > 0.972:
                hardest, right = hardest + 1, 0
        if hardest == COOL and model.embed.weight.requires_grad:
            end = min(end, step + cooldown)
            model.embed.requires_grad_(False)
            model.blocks[:2].requires_grad_(False)
    return model


def write(model, seed):
    """config.json, model.safetensors (fp16: half the size, the same answers), the chat template,
    rows for train.py, and the story that infer.py reads, with a question about each fact.
    """
    state = {hf_name(name): p.half() for name, p in model.named_parameters()}
    files.save_tensors(TOY / "model.safetensors", state, {"format": "pt"})
    (TOY / "config.json").write_text(json.dumps(config.hf_config(model.config), indent=1))
    (TOY / "chat_template.jinja").write_text(TEMPLATE)
    rng = random.Random(seed + 2)
    with open(TOY / "train.jsonl", "w") as file:
        # Short rows to train on: more of them for the time, and facts are more of their tokens. The
        # last 10%, which are held out, are as long as the prompts that get pruned.
        for i in range(400):
            sentences, facts = story(rng, 6, rng.randint(12, 20) if i < 360 else 131)
            question, answer = ask(rng, facts)
            row = {"instruction": " ".join([*sentences, question]), "response": answer}
            print(json.dumps(row), file=file)
    sentences, facts = story(rng, 6, 131)
    demo = {"text": " ".join(sentences),
            "questions": [[f"Question: what does {name} sell? Answer:", fact]
                          for name, fact in facts.items()]}
    (TOY / "demo.json").write_text(json.dumps(demo, indent=1))


# ------------------------------------------------------------------------------------ evaluation


def fresh_prompt(rng, tokenizer, least):
    """A prompt of at least `least` tokens.

    -> tokens (1, N) with the answer, prompt_len, positions of the asked facts' tokens
    """
    prompt, n_sentences = [], 6 + least // 13
    while len(prompt) < least:
        sentences, facts = story(rng, 6, n_sentences)
        question, answer = ask(rng, facts)
        prompt, asked = tokenizer.encode(""), []        # the begin-of-text token
        for sentence in [*sentences, question]:
            ids = tokenizer.encode(sentence, bos=False)
            if sentence in answer:
                asked += range(len(prompt), len(prompt) + len(ids))
            prompt += ids
        n_sentences += 1
    return torch.tensor([prompt + tokenizer.encode(answer, bos=False)]), len(prompt), asked


def measure(name, model, prompts, schedule, predictors, quiet):
    """One scorer on all prompts -> its row of the table."""
    right = alive = facts = 0
    for seed, (tokens, n, asked) in enumerate(runs.counted(prompts, f"prompts, {name}", quiet)):
        arm = (UNPRUNED, None) if name == "full" else (
            schedule, make_scorer(name, model, schedule, predictors, seed))
        tokens = tokens.to(model.device)
        first, caches, trace = prefill(model, tokens[:, :n], *arm, room=tokens.shape[1])
        rest = extend(model, tokens[:, n:-1], n, caches)
        # Greedy decoding gives the answer exactly when each of its tokens is the likeliest one
        # after those before it.
        right += torch.equal(torch.cat((first, rest[0])).argmax(-1), tokens[0, n:])
        kept = trace[-1].kept[0].tolist() if trace else range(n)
        alive += len({*kept} & {*asked})
        facts += len(asked)
    n = len(prompts)
    share = right / n
    return {"scorer": name, "metric": "exact", "value": share,
            "stderr": (share * (1 - share) / n) ** 0.5, "n": n, "fact_tokens_kept": alive / facts}


def evaluate(args):
    """Exact answers on fresh prompts, every scorer on the same ones."""
    model, schedule, predictors = load_pruning(args)
    tokenizer, rng = Tokenizer(args.ckpt), random.Random(args.seed + 1_000_000)
    prompts = [fresh_prompt(rng, tokenizer, 1500) for _ in range(args.eval)]
    print(f"{'scorer':12} exact answers   asked facts' tokens kept to the end")
    rows = []
    for name in ("full", *SCORERS):
        rows.append(measure(name, model, prompts, schedule, predictors, args.quiet))
        print(f"{name:12} {rows[-1]['value']:13.1%} {rows[-1]['fact_tokens_kept']:38.1%}")
    options.print_json(args, model, {"schedule": vars(schedule), "rows": rows})


def main():
    parser = options.command_parser(__doc__)
    parser.add_argument(
        "--seed", type=int, default=0,
        help="of the text, the weights and, with --eval, the fresh prompts (plus one million)")
    parser.add_argument("--eval", type=options.at_least(1),
                        help="do not pretrain; answer so many fresh prompts of 1,500 tokens")
    options.add_pruning_options(parser)
    args = parser.parse_args()
    if args.eval:
        evaluate(args)
    else:
        write(pretrain(args.seed, args.quiet), args.seed)
        print(f"wrote {TOY}; now train its predictors: python train.py --out {TOY}")


if __name__ == "__main__":
    options.cli(main)
