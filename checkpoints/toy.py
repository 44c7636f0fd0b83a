"""Make checkpoints/toy: a small Llama that answers a question from a few facts hidden in a long prompt, with its tokenizer and rows.

The script writes its own text from a seed: a story of filler sentences in which a few sentences say who sells what,
then a question about one or two of these people. So the truth about which tokens matter is known, and an answer
is right or wrong as a whole. Everything is made here: tokenizer, weights, training rows for the predictors.

    python checkpoints/toy.py                    # pretrain (22 minutes on one core) and write checkpoints/toy
    python checkpoints/toy.py --eval 500         # exact answers on fresh prompts: full model, predictors, random, recent, ...
"""
import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import at_least, cli, provenance  # noqa: E402
from infer import add_pruning_arguments, load_pruning  # noqa: E402
from model import Config, Llama, Tokenizer, hf_name  # noqa: E402
from predictor import save_tensors  # noqa: E402
from prune import SCORERS, extend, make_scorer, prefill  # noqa: E402

HERE = Path(__file__).resolve().parent / "toy"
NAMES = ("Anna Boris Clara David Emma Felix Grace Henry Irene James Karen Louis Maria Nathan Olga Peter "
         "Quinn Rosa Simon Teresa Ursula Victor Wanda Xavier Yvonne Zoe Albert Bella Conrad Diana Edgar Flora").split()
ADJECTIVES = ("old green broken narrow golden silent wooden hidden round empty white dusty "
              "small dark painted crooked heavy yellow foreign frozen shiny simple brown quiet").split()
THINGS = ("keys maps lamps rings coins books letters flutes mirrors clocks baskets boxes "
          "chairs tables boats drums shoes hats bottles candles stones bells knives cups").split()
WHO = "traveller farmer sailor teacher painter baker soldier child merchant widow shepherd singer".split()
DID = "walked past|looked at|counted|talked about|dreamed of|waited near|left|turned toward|rested beside|asked about".split("|")
WHEN = "in the morning|after the rain|before dinner|on a cold day|every summer|without a word|late at night|for an hour|once more|as usual".split("|")
WEATHER = "wind rain snow fog light smoke music dust".split()
MOVED = "drifted over|came from|faded behind|settled on|covered|moved around|rose above|hung over".split("|")


def filler(rng):
    """A sentence that answers no question; it uses the same adjectives and things as the facts do."""
    a, t, a2, t2 = rng.choice(ADJECTIVES), rng.choice(THINGS), rng.choice(ADJECTIVES), rng.choice(THINGS)
    kind = rng.randrange(4)
    if kind == 0:
        return f"The {rng.choice(WHO)} {rng.choice(DID)} the {a} {t} {rng.choice(WHEN)}."
    if kind == 1:
        return f"The {rng.choice(WEATHER)} {rng.choice(MOVED)} the {a} {t} and the {a2} {t2}."
    if kind == 2:
        return f"A {rng.choice(WHO)} and a {rng.choice(WHO)} {rng.choice(DID)} the {a} {t}."
    return f"Near the {a} {t} the {rng.choice(WEATHER)} {rng.choice(MOVED)} the {t2} {rng.choice(WHEN)}."


def story(rng, n_facts, n_sentences):
    """-> (sentences, indices of the facts among them, {name: (adjective, thing)}). Facts stand anywhere."""
    people = rng.sample(NAMES, n_facts)
    facts = {name: (rng.choice(ADJECTIVES), rng.choice(THINGS)) for name in people}
    where, told = set(rng.sample(range(n_sentences), n_facts)), iter(people)
    sentences = []
    for i in range(n_sentences):
        name = next(told) if i in where else None
        sentences.append(f"{name} sells {facts[name][0]} {facts[name][1]}." if name else filler(rng))
    return sentences, where, facts


def ask(rng, facts):
    """-> (question, answer) about one or two of the people."""
    names = rng.sample(list(facts), rng.randint(1, 2))
    question = f"Question: what does {names[0]} sell?" if len(names) == 1 else f"Question: what do {names[0]} and {names[1]} sell?"
    return question + " Answer:", " ".join(f"{name} sells {facts[name][0]} {facts[name][1]}." for name in names)


def make_tokenizer(seed, path):
    """Train the sentencepiece tokenizer on generated text; every word of the stories becomes one token."""
    rng, text = random.Random(seed), []
    for _ in range(4000):
        sentences, _, facts = story(rng, 4, 12)
        text.append(" ".join(sentences + list(ask(rng, facts))))
    import sentencepiece
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=f, vocab_size=1280, model_type="bpe", byte_fallback=True,
                                                 hard_vocab_limit=False, minloglevel=2, num_threads=1)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


# ---------------------------------------------------------------------------------------------------------- pretraining

# Retrieval does not come by itself. First copying: random tokens repeated at one fixed distance (easy: look back 16),
# then at any distance (which takes an induction head). Then stories, from two facts in 48 tokens to six in 560; each
# step up is taken when the words of the facts are answered right.
COPY_UNTIL = (0.3, 0.4)             # loss at which each of the two copying phases ends
LEVELS = ((48, 2, 2), (64, 3, 2), (96, 4, 3), (128, 4, 4), (192, 5, 4), (256, 6, 4), (384, 6, 5), (560, 6, 5))  # tokens, facts, questions


def copy_batch(rng, used, phase, rows=32, length=64):
    tokens, weight = torch.empty(rows, length, dtype=torch.long), torch.ones(rows, length)
    for i in range(rows):
        period = 16 if phase == 0 else rng.randint(4, 20)
        chunk = used[torch.tensor([rng.randrange(len(used)) for _ in range(period)])]
        tokens[i], weight[i, :period] = chunk.repeat(length // period + 1)[:length], 0
    return tokens, weight


def story_batch(rng, sp, level, tokens_per_batch=4096):
    """Rows of one length: a story, then several questions with answers; the answers carry the loss (and 5% of the rest)."""
    length, n_facts, n_questions = LEVELS[level]
    rows = max(4, tokens_per_batch // length)
    tokens, weight = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length)
    for i in range(rows):
        sentences, _, facts = story(rng, n_facts, n_facts + max(0, (length - 2 - 20 * n_questions - 6 * n_facts) // 13))
        ids = [sp.bos_id()] + sp.encode(" ".join(sentences))
        weights = [0.05] * len(ids)
        for _ in range(n_questions):
            question, answer = (sp.encode(text) for text in ask(rng, facts))
            ids, weights = ids + question + answer, weights + [0.05] * len(question) + [1.0] * len(answer)
        ids, weights = ids[:length], weights[:length]
        tokens[i, :len(ids)], weight[i, :len(ids)] = torch.tensor(ids), torch.tensor(weights)
    return tokens, weight


def pretrain(seed, max_steps, cooldown=400):
    """Pretrain from nothing; returns the model. About 2.3 million weights, 12 blocks, two query heads per key/value head."""
    sp = make_tokenizer(seed, HERE / "tokenizer.model")
    config = Config(dim=128, n_blocks=12, n_heads=4, n_kv_heads=2, head_dim=32, ffn=336, vocab=sp.vocab_size(), max_positions=2048, tied=True,
                    bos=sp.bos_id(), eos=(sp.eos_id(), sp.encode("Question")[0]))  # an answer ends where the next question would begin
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    model = Llama(config)
    for name, p in model.named_parameters():
        if p.dim() > 1:             # the blocks start as the identity, so that the embeddings are not drowned
            p.data.normal_(0, 0.05 if "embed" in name else config.dim ** -0.5)
            if name.endswith(("o.weight", "down.weight")):
                p.data.zero_()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"),
                  torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)]
    peak = [o.param_groups[0]["lr"] for o in optimizers]
    used = torch.tensor(sorted({t for _ in range(200) for t in sp.encode(" ".join(story(rng, 4, 12)[0]))}))
    answers = torch.zeros(config.vocab, dtype=torch.bool)
    answers[[sp.encode(word)[0] for word in ADJECTIVES + THINGS]] = True
    phase, level, right, end, start = 0, 0, 0.0, None, time.time()
    for step in range(max_steps):
        rate = min(1.0, (step + 1) / 30) * (1.0 if end is None else (end - step) / cooldown)
        for optimizer, lr in zip(optimizers, peak):
            optimizer.param_groups[0]["lr"] = lr * rate
        here = level if rng.random() < 0.75 else rng.randint(0, level)
        tokens, weight = copy_batch(rng, used, phase) if phase < 2 else story_batch(rng, sp, here)
        logits, weight = model(tokens)[:, :-1], weight[:, 1:]
        loss = (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none") * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if phase < 2:
            phase += loss.item() < COPY_UNTIL[phase]
        elif here == level:
            asked = (weight > 0.5) & answers[tokens[:, 1:]]
            right = 0.9 * right + 0.1 * ((logits.argmax(-1) == tokens[:, 1:]) & asked).sum().item() / asked.sum().item()
            if level < len(LEVELS) - 1 and right > 0.93:
                level, right = level + 1, 0.0
            elif end is None and right > 0.95:
                end = step + 1 + cooldown
        if step % 10 == 9:
            where = f"copying {phase}" if phase < 2 else f"level {level} ({LEVELS[level][0]} tokens), words right {right:.1%}"
            print(f"\rstep {step + 1}  loss {loss.item():.3f}  {where}  {time.time() - start:.0f} s" + (f", {end - step - 1} steps left" if end else "") + "   ",
                  end="\n" if step % 100 == 99 else "", flush=True)
        if step + 1 == end:
            break
    print(f"\npretrained in {(time.time() - start) / 60:.0f} minutes, {step + 1} steps")
    return model


def write(model, seed):
    """config.json, model.safetensors (fp16: half the size, and the answers do not change) and the rows for train.py."""
    c = model.config
    state = {hf_name(name): p.half() for name, p in model.named_parameters()}
    save_tensors(HERE / "model.safetensors", state, {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": c.dim, "intermediate_size": c.ffn,
              "num_hidden_layers": c.n_blocks, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim,
              "vocab_size": c.vocab, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "rope_scaling": None, "max_position_embeddings": c.max_positions,
              "tie_word_embeddings": True, "bos_token_id": c.bos, "eos_token_id": list(c.eos), "torch_dtype": "float16"}
    (HERE / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    rng = random.Random(seed + 2)
    with open(HERE / "train.jsonl", "w") as f:
        for _ in range(400):
            sentences, _, facts = story(rng, 6, rng.randint(30, 38))
            question, answer = ask(rng, facts)
            f.write(json.dumps({"instruction": " ".join(sentences + [question]), "response": answer}) + "\n")


# ----------------------------------------------------------------------------------------------------------- evaluation


def fresh_prompt(rng, tokenizer, least):
    """A prompt of at least `least` tokens: -> tokens (1, N), prompt_len, positions of the asked facts' tokens."""
    n_sentences = 30
    while True:
        sentences, where, facts = story(rng, 6, n_sentences)
        question, answer = ask(rng, facts)
        prompt = tokenizer.encode(" ".join(sentences + [question]))
        if len(prompt) >= least:
            break
        n_sentences += 1
    response, asked, at = tokenizer.encode(answer, bos=False), [], 1
    for i, sentence in enumerate(sentences):
        size = len(tokenizer.encode(sentence, bos=False))
        if i in where and sentence.split()[0] in question:
            asked += range(at, at + size)
        at += size
    return torch.tensor([prompt + response]), len(prompt), asked


def evaluate(n, seed, least, args):
    """Exact answers on fresh prompts, every scorer on the same ones; and how many of the asked facts' tokens live to the last stage."""
    model, schedule, predictors, metadata = load_pruning(args)
    tokenizer, rng = Tokenizer(args.ckpt), random.Random(seed)
    prompts = [fresh_prompt(rng, tokenizer, least) for _ in range(n)]
    names = ["full"] + [name for name in SCORERS if name != "prior" and (name != "predictor" or predictors is not None)]
    print(f"{n} fresh prompts of {min(p[1] for p in prompts)} to {max(p[1] for p in prompts)} tokens, stages after blocks {schedule.after(len(model.blocks))},"
          f" {schedule.pruned:.0%} dropped by the last stage\n{'scorer':12} exact answers   asked facts' tokens kept to the end")
    rows = []
    for name in names:
        exact = kept = total = 0
        for i, (tokens, prompt_len, asked) in enumerate(prompts):
            tokens = tokens.to(model.device)
            arm = (None, None) if name == "full" else (schedule, make_scorer(name, model, schedule, predictors, i))
            logits, caches, trace = prefill(model, tokens[:, :prompt_len], *arm, room=tokens.shape[1])
            # greedy decoding gives the answer exactly when every answer token is the most likely one after those before it
            said = torch.cat((logits[:, None], extend(model, tokens[:, prompt_len:-1], prompt_len, caches)), 1).argmax(-1)
            exact += torch.equal(said, tokens[:, prompt_len:])
            alive = set(trace[-1].kept[0].tolist()) if trace else set(range(prompt_len))
            kept, total = kept + len(alive & set(asked)), total + len(asked)
            if i % 20 == 19:
                print(f"\r{name} {i + 1}/{n}", end="", file=sys.stderr, flush=True)
        print(f"\r{name:12} {exact / n:13.1%} {kept / total:38.1%}", flush=True)
        rows.append({"scorer": name, "metric": "exact", "value": exact / n, "stderr": math.sqrt(exact / n * (1 - exact / n) / n), "n": n, "fact_tokens_kept": kept / total})
    if args.json:
        print(json.dumps({**provenance(model), "schedule": schedule.__dict__, "rows": rows}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the text, the weights and, with --eval, the fresh prompts (plus one million)")
    parser.add_argument("--max-steps", type=int, default=8000, help="pretraining stops here at the latest")
    parser.add_argument("--eval", type=at_least(1), metavar="N", help="do not pretrain; answer N fresh prompts")
    parser.add_argument("--least", type=int, default=400, help="--eval: fewest tokens of a prompt")
    parser.add_argument("--json", action="store_true", help="--eval: print the table as one JSON object on the last line")
    add_pruning_arguments(parser)
    args = parser.parse_args()
    if args.eval:
        evaluate(args.eval, args.seed + 1_000_000, args.least, args)
    else:
        HERE.mkdir(exist_ok=True)
        write(pretrain(args.seed, args.max_steps), args.seed)
        print(f"wrote {HERE}; now train its predictors: python train.py --out {HERE}")


if __name__ == "__main__":
    cli(main)
