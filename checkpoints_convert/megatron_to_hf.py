"""Megatron distributed checkpoint -> Hugging Face folder: `megatron-apo convert megatron-to-hf` as a script.

python checkpoints_convert/megatron_to_hf.py CHECKPOINT OUT [--dtype fp32|bf16]

CHECKPOINT is what hf_to_megatron.py wrote, or RUN/checkpoints/step-*.
"""

from __future__ import annotations

import sys

from megatron_apo import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "megatron-to-hf"]
    cli.main()
