"""What `vstar.at_start` saves: both stages on one engine, beside estimate-vstar and then train, each with its own.

    python -m tests.benchmarks.at_start QUICKSTART [--rounds 3] [SECTION.KEY=VALUE ...]

QUICKSTART: the folder of a `megatron-apo quickstart` run, of whose reference a store of 512 prompts is made. One step
of training, and small evaluations. The two ways take turns; seconds are of whole commands.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from megatron_apo.runtime import launch

COMMON = ("data.max_prompts=512", "train.steps=1", "eval.samples=1", "eval.max_prompts=16", "telemetry.progress=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    two, one = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):

            def seconds(name: str, *stages: str, turn: int = turn) -> float:
                run, start = Path(folder) / f"{turn}-{name}", time.monotonic()
                own = [f"run.dir={run}", f"vstar.dir={run}-store", f"vstar.at_start={str(name == 'one').lower()}"]
                recipe = ["-r", str(args.quickstart / "recipe.yaml"), *own, *COMMON, *args.overrides]
                for stage in stages:
                    launch.run_command([stage, *recipe], run.with_suffix(f".{stage}.log"))
                return time.monotonic() - start

            two.append(seconds("two", "estimate-vstar", "train"))
            one.append(seconds("one", "train"))
            print(f"round {turn}: {two[-1]:.1f} s by two commands, {one[-1]:.1f} s by one", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(one, two, strict=True)]
    print(f"medians: {median(two):.1f} s, {median(one):.1f} s; {median(ratios):.2f} x in the median of rounds")


if __name__ == "__main__":
    main()
