"""A Megatron checkpoint held against a Hugging Face folder: `megatron-apo convert verify` as a script.

    python checkpoints_convert/verify.py --hf DIR --megatron DIR [--prompts FILE [--tp N] [--pp N] [--ep N]] [--ranks N]

Names, shapes and every bit, a tensor at a time; with --prompts also log-probs against transformers. Exits with 1 on a
difference.
"""

from __future__ import annotations

import sys

from megatron_apo import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "verify"]
    cli.main()
