"""Which node of a job does what, and what each stage's nodes are told. One file, decided once, read by every node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_apo.config import Recipe
from megatron_apo.learner.checkpoint import exported
from megatron_apo.runtime.files import write_whole
from megatron_apo.runtime.job import Node

Step = Literal["check", "prepare", "estimate-vstar", "train", "evaluate"]
STAGES: tuple[Step, ...] = ("estimate-vstar", "train", "evaluate")  # in their order
PLAN = "plan.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Plan:
    """nodes: those that work, in the job's order. trainers: how many of them, from the first, have ranks. address: by
    which the others reach the first. master_port, driver_port: free there, for the ranks' store and for engines of
    other nodes. workers_per_node: of stage 1 and of the evaluation; first_worker, num_workers: of this job, and in all
    tasks of a job array. todo: steps that are not complete yet."""

    nodes: tuple[str, ...]
    trainers: int
    ranks_per_node: int
    address: str = ""
    master_port: int = 0
    driver_port: int = 0
    workers_per_node: int = 1
    first_worker: int = 0
    num_workers: int = 1
    todo: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "todo", tuple(self.todo))

    @classmethod
    def of(
        cls, recipe: Recipe, nodes: tuple[str, ...], gpus_per_node: int = 0, todo: Sequence[Step] = ("train",)
    ) -> Plan:
        """Raises ValueError, a line that names the key, for a recipe that these nodes are too few to train."""
        parallel, dedicated = recipe.parallel, recipe.rollout.placement == "dedicated"
        ranks = parallel.ranks_per_node or gpus_per_node or parallel.world_size
        trainers = -(-parallel.world_size // ranks)
        needed = trainers + dedicated
        workers = max(1, gpus_per_node // recipe.rollout.tp)
        if "train" not in todo:
            plan = cls(nodes, min(trainers, len(nodes)), ranks, workers_per_node=workers, todo=tuple(todo))
            return plan.in_array(0, 1)
        if len(nodes) < needed:
            beside = ", and rollout.placement=dedicated at least one more" if dedicated else ""
            raise ValueError(
                f"parallel: tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} = "
                f"{parallel.world_size} ranks, {ranks} a node, take {trainers} nodes{beside}, and the job has "
                f"{len(nodes)}; use sbatch --nodes={needed} or more, or a smaller layout"
            )
        if parallel.world_size % ranks and trainers > 1:
            raise ValueError(
                f"parallel.ranks_per_node: {ranks} does not divide the {parallel.world_size} ranks; give each node as "
                "many"
            )
        ranks = min(ranks, parallel.world_size)
        if dedicated and gpus_per_node and recipe.rollout.replicas > (room := (len(nodes) - trainers) * workers):
            raise ValueError(
                f"rollout.replicas: {recipe.rollout.replicas} dedicated engines of rollout.tp={recipe.rollout.tp}, and "
                f"{len(nodes) - trainers} nodes without ranks have room for {room}; use fewer, or more nodes"
            )
        return cls(nodes, trainers, ranks, workers_per_node=workers, todo=tuple(todo)).in_array(0, 1)

    def in_array(self, task: int, tasks: int) -> Plan:
        """The plan of one of the tasks of a job array, which share stage 1's shards; its number may be any, and the
        workers' only spread them over the shards."""
        workers = len(self.nodes) * self.workers_per_node
        return replace(self, first_worker=task % tasks * workers, num_workers=tasks * workers)

    def workers_of(self, node: str) -> range:
        first = self.first_worker + self.place(node) * self.workers_per_node
        return range(first, first + self.workers_per_node)

    def ranks_of(self, node: str, recipe: Recipe, secret: str) -> Node:
        """What the launcher of one of the ranks' nodes starts; each rank has a log under the node's name."""
        place = self.place(node)
        return Node(
            first_rank=place * self.ranks_per_node,
            num_ranks=self.ranks_per_node,
            world_size=recipe.parallel.world_size,
            master_address=self.address,
            master_port=self.master_port,
            secret=secret,
            index=place,
            count=self.trainers,
            label=f"{node}-",
        )

    def place(self, node: str) -> int:
        return self.nodes.index(node)

    @property
    def trainer_nodes(self) -> tuple[str, ...]:
        return self.nodes[: self.trainers]

    def others(self, recipe: Recipe) -> tuple[str, ...]:
        """Nodes of engines alone."""
        return self.nodes[self.trainers :] if recipe.rollout.placement == "dedicated" else ()

    def working(self, step: Step, recipe: Recipe) -> tuple[str, ...]:
        """The nodes that a step runs on."""
        if step == "train":
            return self.trainer_nodes + self.others(recipe)
        return self.nodes[:1] if step == "prepare" else self.nodes

    def first_at(self, address: str, ports: list[int]) -> Plan:
        """The plan with what the first node has told of itself."""
        return replace(self, address=address, master_port=ports[0], driver_port=ports[1])

    def write(self, folder: Path) -> None:
        write_whole(folder / PLAN, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        return cls(**json.loads((folder / PLAN).read_text()))


def sampling_arguments(step: Step, recipe: Recipe, path: Path) -> list[str]:
    """The command line of a step's ranks, or of each worker beside its number. path: of the recipe."""
    model = ["--model", str(exported(recipe.run.dir))] if step == "evaluate" else []
    return [step, "--recipe", str(path), *model]
