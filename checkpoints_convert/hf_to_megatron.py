"""Hugging Face folder -> Megatron distributed checkpoint: `megatron-apo convert hf-to-megatron` as a script.

python checkpoints_convert/hf_to_megatron.py --hf DIR --out DIR [--dtype fp32|bf16|fp16] [--ranks N]
"""

from __future__ import annotations

import sys

from megatron_apo import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "hf-to-megatron"]
    cli.main()
