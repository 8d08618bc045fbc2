"""One rank of the conversion tests. Started by test_convert.py.

    main(WORK, LAYOUT, "load", NAME...)                     loads converted models in its layout
    main(WORK, LAYOUT, "convert", FOLDER, BYTES, WORD...)   is a rank of `megatron-apo convert WORD...` in FOLDER, where
                                                            no file may have more than so many BYTES (-1: any number)

Loading, rank 0 writes WORK/loaded-LAYOUT.pt: {NAME: {Hugging Face name: tensor}} of each WORK/megatron/NAME.
Converting, errors go to WORK/rank<k>.errors.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from megatron_apo import cli
from megatron_apo.learner.checkpoint import MODEL
from megatron_apo.model.build import build_model
from megatron_apo.model.hf_config import read_hf_config
from megatron_apo.parallel.groups import distributed
from megatron_apo.weights import torch_dist
from megatron_apo.weights.stream import WeightStream
from tests.dist.ranks import parallel_of


def main(work: str, layout: str, task: str, *arguments: str) -> None:
    if task == "load":
        load(Path(work), layout, *arguments)
    else:
        convert(Path(work), *arguments)


def load(work: Path, layout: str, *names: str) -> None:
    parallel = parallel_of(layout)
    found = {}
    with distributed(parallel) as topology:
        for name in names:
            folder = work / "megatron" / name
            spec = read_hf_config(folder / MODEL)
            chunks = build_model(spec, parallel, topology)
            torch_dist.load_model(chunks, folder)
            found[name] = dict(WeightStream(chunks, spec, topology))
        if topology.is_driver:
            torch.save(found, work / f"loaded-{layout}.pt")


def convert(work: Path, folder: str, most_bytes: str, *words: str) -> None:
    with open(work / f"rank{os.environ['RANK']}.errors", "wb") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most_bytes), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.argv = ["megatron-apo", "convert", *words]
    cli.main()
