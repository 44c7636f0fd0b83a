"""The command lines of saliency, prune, train and infer: all options in one place."""
from support.checkpoint import DTYPES
from support.files import need
from support.options import (add_data_arguments, add_json_argument, add_pruning_arguments,
                             add_quiet_argument, add_schedule_arguments, add_template_arguments,
                             add_tp_argument, at_least, command_parser, output_file, picture_file)
from support.places import own_rows

CKPT_HELP = "checkpoint directory, as given or under checkpoints/"
LONG_PROMPTS = [4096, 8192, 16384, 32768, 65536, 131072]


def saliency_parser(doc, reductions):
    parser = command_parser(doc)
    parser.add_argument("--ckpt", default="toy", help=CKPT_HELP)
    parser.add_argument("--figure", type=int, choices=(1, 2), default=1,
                        help="1: heat map of one row; 2: sparsity per block over rows")
    parser.add_argument("--reduce", choices=reductions, default="norm_gx",
                        help="how the gradient becomes one number per token")
    parser.add_argument("--row", type=at_least(0), default=0,
                        help="Figure 1: which of the held-out rows")
    parser.add_argument("--prompt", help="Figure 1: this prompt instead of a row (with --response)")
    parser.add_argument("--response",
                        help="Figure 1: the answer whose log-likelihood is traced back")
    parser.add_argument("--png", type=picture_file,
                        help="write the figure here (needs matplotlib)")
    add_quiet_argument(parser)
    add_json_argument(parser)
    add_data_arguments(parser, limit=20)
    return parser


def prune_parser(doc, shapes):
    parser = command_parser(doc)
    parser.add_argument("--shape", default="mistral-7b",
                        help=f"{', '.join(shapes)}, or a checkpoint directory (its config.json)")
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=LONG_PROMPTS,
                        help="prompt lengths")
    add_json_argument(parser)
    add_schedule_arguments(parser)
    return parser


RECIPE = {      # the fields of a train.Recipe and its Loss: type or choices, meaning
    "cls": (float, "weight of the pruned model's cross entropy, Eq. 7"),
    "mse": (float, "weight of the MSE to the saliency, Eq. 4"),
    "rank": (float, "weight of the ranking loss, Eq. 5 and 6"),
    "distill": (float, "weight of the KL divergence from the unpruned model"),
    "reduce": (("norm_gx", "norm_g", "abs_dot"), "how the gradient becomes one number per token"),
    "around": (float, "beyond the paper: share of a token's saliency that is the mean of the 65 "
               "tokens around it, as what answers a question stands in one place"),
    "near": (bool, "beyond the paper: the predictors also read the mean state of what is left of "
             "the 33 tokens around a token"),
    "pairs": (("equal", "saliency"), "beyond the paper: saliency weighs each pair of the ranking "
              "loss by how far its saliencies lie apart"),
    "mask": (("gumbel", "topk"), "gumbel: sample each token (paper; nothing then ties the number "
             "kept to the schedule); topk: keep the scheduled count, as inference does"),
    "tau": (float, "temperature of the Gumbel-Softmax"),
    "states": (("pruned", "marked"), "what the predictors read for MSE and ranking: the states of "
               "the pruning pass (paper) or of the marking pass; with marked and neither --cls nor "
               "--distill the pruning pass is left out, which is twice as fast"),
    "lr": (float, "peak learning rate of AdamW"),
    "warmup": (float, "share of the steps with a rising rate; a cosine follows"),
    "accum": (at_least(1), "rows whose gradients are added up before a step"),
    "batch": (at_least(1), "rows that go through the model together, padded to the longest: the "
              "same step, but for the noise of --mask gumbel, and faster on a GPU"),
    "seed": (at_least(0), "of the predictors' first weights, the rows' order and the noise"),
}


def train_parser(doc, defaults):
    parser = command_parser(doc)
    parser.add_argument("--ckpt", default="toy", help=CKPT_HELP)
    add_data_arguments(parser, limit=None, max_response=None)
    parser.add_argument("--epochs", type=at_least(1),
                        help="passes over the rows (default: 2, the paper's; toy: 1)")
    parser.add_argument("--steps", type=at_least(1), help="optimiser steps, instead of --epochs")
    for name, (kind, meaning) in RECIPE.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
            continue
        kind = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(f"--{name}", default=defaults[name], help=meaning, **kind)
    parser.add_argument("--hold", action="store_true", help="keep every row's marking pass in "
                        "memory (S x N values a row; with --states marked S x N x D, with "
                        "--distill its logits too)")
    parser.add_argument("--calibrate", type=at_least(0), default=0, metavar="ROWS",
                        help="beyond the paper: then choose how much a token's position counts, "
                        "by the pruned likelihood of this many validation rows")
    parser.add_argument("--out", help="where predictors.safetensors goes (default: out/NAME/, "
                        "where the other commands look first)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true",
                       help="go on from the state beside --out (from the start if there is none)")
    again.add_argument("--restart", action="store_true",
                       help="begin anew, though a run that was stopped left its state there")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between saves")
    parser.add_argument("--report-every", type=at_least(1), default=50,
                        help="steps between held-out reports")
    parser.add_argument("--report-rows", type=at_least(0), default=8,
                        help="held-out rows in a report (0: none)")
    parser.add_argument("--device", help="cuda, cpu or mps (default: cuda if there)")
    parser.add_argument("--dtype", choices=sorted(DTYPES),
                        help="of the backbone (default: bfloat16 on cuda, else float32)")
    parser.add_argument("--shard", action="store_true", help="under torchrun: spread the frozen "
                        "blocks over the devices (FSDP2), for a backbone too large for one")
    parser.add_argument("--png", metavar="FILE", type=picture_file,
                        help="draw the training curve (needs matplotlib)")
    add_quiet_argument(parser)
    add_json_argument(parser)
    add_schedule_arguments(parser)
    return parser


def infer_parser(doc, scorers):
    parser = command_parser(doc)
    add_pruning_arguments(parser, scorers)
    parser.add_argument("--prompt", help="the user's text (default: with the toy one of its rows, "
                        "else a page of ours and a question about it)")
    parser.add_argument("--prompt-file", help="the user's text, from a file; - reads stdin")
    parser.add_argument("--data", help="take the prompt from a row of this JSONL")
    parser.add_argument("--row", type=at_least(0), default=0,
                        help="which held-out row of --data")
    add_template_arguments(parser)
    parser.add_argument("--max-new-tokens", type=at_least(1),
                        help="default: 48, with --bench 128, or as many as fit")
    parser.add_argument("--h2o", type=float, metavar="SHARE",
                        help="compress both arms' KV caches to this share by H2O (Table 6: 0.4)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--html", metavar="FILE", type=output_file,
                        help="write the survivors as a self-contained page")
    parser.add_argument("--bench", type=at_least(1), nargs="+", metavar="N",
                        help="print Table 2's rows for these prompt lengths")
    parser.add_argument("--repeats", type=at_least(1), default=5,
                        help="--bench: timed prefills of each arm")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, and "
                        "decode in static shapes (on cuda a CUDA graph)")
    parser.add_argument("--seed", type=int, default=0)
    add_tp_argument(parser)
    add_quiet_argument(parser)
    add_json_argument(parser)
    return parser


def recipe_options(args, n_rows):
    """The fields of a train.Loss and of a train.Recipe for so many rows, two dicts."""
    given = {name: getattr(args, name) for name in RECIPE}
    weights = {name: given.pop(name) for name in ("cls", "mse", "rank", "distill")}
    own = not args.data and own_rows(args.ckpt)     # the toy's: once is enough
    epochs = args.epochs or (1 if own else 2)
    given["steps"] = args.steps or max(1, epochs * n_rows // args.accum)
    return weights, given


def check_training(args, world_size):
    """Refuse what can only do harm, or nothing, before anything is read."""
    weights = args.cls, args.mse, args.rank, args.distill
    need(any(weights), "all loss weights are 0: nothing to train on")
    need(not (args.steps and args.epochs), "--steps and --epochs each say how long to train: "
                                           "leave out one")
    need(0 <= args.around <= 1, "--around is a share, 0 to 1")
    need(0 < args.lr < 10 and args.tau > 0 and 0 <= args.warmup < 1
         and all(0 <= w < 1e6 for w in weights),
         "--lr and --tau are positive, --warmup a share, weights of losses not negative")
    need(args.batch == 1 or not args.hold, "--hold keeps single rows: leave out --batch")
    need(not (args.hold and args.shard), "--shard gathers blocks in step on all processes, so "
                                         "none may pass over a row: leave out --hold")
    need(world_size > 1 or not args.shard, "--shard needs several processes: put torchrun "
                                           "--nproc-per-node N before the command")
    need(world_size == 1 or args.accum % (args.batch * world_size) == 0,
         f"--accum {args.accum} rows a step in batches of {args.batch} do not divide among "
         f"{world_size} processes")


def check_inference(args):
    """Refuse what does not go together, before anything is read."""
    need(args.bench or not args.ckpt.startswith("random:"),
         "random weights have nothing to say: use --bench")
    need(not args.bench or not (args.h2o is not None or args.temperature),
         "--bench reads whole caches greedily: leave out --h2o and --temperature")
    need(not args.tp or not (args.compile or args.bench),
         "--tp runs without --compile and --bench, whose counts are those of one device")
    need(not args.compile or args.h2o is None,
         "H2O changes the caches, so it cannot decode in static shapes: leave out --h2o or "
         "--compile")
