"""Sharded tensors: what a rank holds of a plan, and the kernel that adds over the ranks."""

from .kernel import ShardedKernel, add_over, adder, check_group, make_kernel
from .shards import Shard, gathering, in_form, is_sharded, local_of, local_plan_of, place_of, shard_of, whole_of

__all__ = [
    "Shard",
    "ShardedKernel",
    "add_over",
    "adder",
    "check_group",
    "gathering",
    "in_form",
    "is_sharded",
    "local_of",
    "local_plan_of",
    "make_kernel",
    "place_of",
    "shard_of",
    "whole_of",
]
