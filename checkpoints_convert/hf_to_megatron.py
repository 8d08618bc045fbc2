"""Hugging Face folder -> Megatron distributed checkpoint: `megatron-apo convert hf-to-megatron` as a script.

python checkpoints_convert/hf_to_megatron.py HF_FOLDER OUT [--dtype fp32|bf16]
"""

from __future__ import annotations

import sys

from megatron_apo import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "hf-to-megatron"]
    cli.main()
