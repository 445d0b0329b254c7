"""Sharded tensors: what a rank holds of a plan, and the kernel that adds over the ranks."""

from .kernel import ShardedKernel, add_over, adder, make_kernel
from .shards import LocalPlan, Shard, is_sharded, local_of, shard_of, whole_of

__all__ = [
    "LocalPlan",
    "Shard",
    "ShardedKernel",
    "add_over",
    "adder",
    "is_sharded",
    "local_of",
    "make_kernel",
    "shard_of",
    "whole_of",
]
