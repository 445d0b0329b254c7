"""Sharded tensors: a rank's local boxes, and the one all-reduce of squares a step."""

from .add import add_over, adder
from .carried import Carried
from .kernel import ShardedKernel, kernel_for
from .local_plan import LocalPlan
from .shards import Shard, is_sharded, local_of, shard_of, whole_of

__all__ = [
    "Carried",
    "LocalPlan",
    "Shard",
    "ShardedKernel",
    "add_over",
    "adder",
    "is_sharded",
    "kernel_for",
    "local_of",
    "shard_of",
    "whole_of",
]
