"""Megatron distributed checkpoint -> Hugging Face folder: `megatron-apo convert megatron-to-hf` as a script.

    python checkpoints_convert/megatron_to_hf.py --megatron DIR --out DIR [--dtype D] [--max-shard-size 5GB] [--ranks N]

--megatron is what hf_to_megatron.py wrote, or RUN/checkpoints/step-*: the weights alone are read, beside a running job.
"""

from __future__ import annotations

import sys

from megatron_apo import cli

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "megatron-to-hf"]
    cli.main()
