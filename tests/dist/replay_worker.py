"""One rank of the tests of a replay: stage 2's own loop. Started by test_replay.py.

main(WORK, LAYOUT, KEY=VALUE ..)
"""

from __future__ import annotations

from pathlib import Path

from megatron_apo.config import load_recipe
from megatron_apo.parallel.groups import distributed
from megatron_apo.stages.train import train
from tests.dist.ranks import parallel_of


def main(work: str, layout: str, *overrides: str) -> None:
    recipe = load_recipe(Path(work) / "recipe.yaml", overrides)
    recipe.parallel = parallel_of(layout)
    with distributed(recipe.parallel) as topology:
        train(recipe, topology, None)
