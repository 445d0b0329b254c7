"""What is controlled together: layout, boxes, tree, and the strategies that cut."""

from .baselines import per_tensor, whole
from .boxes import Boxes
from .layout import Layout, layout_of, named_trainable, one_device
from .lbf import lbf, log_likelihood
from .part import part_of
from .plan import Bin, Box, Node, Plan
from .registry import STRATEGIES, Strategy, make_plan
from .tree import LEVELS, Tree
from .tree_sp import tree_sp
from .xsp import xsp

__all__ = [
    "LEVELS",
    "STRATEGIES",
    "Bin",
    "Box",
    "Boxes",
    "Layout",
    "Node",
    "Plan",
    "Strategy",
    "Tree",
    "layout_of",
    "lbf",
    "log_likelihood",
    "make_plan",
    "named_trainable",
    "one_device",
    "part_of",
    "per_tensor",
    "tree_sp",
    "whole",
    "xsp",
]
