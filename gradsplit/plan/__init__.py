"""What is controlled together: layout, boxes, tree, and the strategies that cut."""

from .boxes import Boxes
from .layout import Layout, layout_of, named_trainable, one_device, refuse_lazy
from .lbf import lbf
from .pattern import Pattern, pattern_of
from .plan import Bin, Box, Node, Plan, part_of
from .registry import STRATEGIES, Strategy, make_plan, register
from .slices import per_tensor, whole, xsp
from .tree import LEVELS, Tree
from .tree_sp import tree_sp

__all__ = [
    "LEVELS",
    "STRATEGIES",
    "Bin",
    "Box",
    "Boxes",
    "Layout",
    "Node",
    "Pattern",
    "Plan",
    "Strategy",
    "Tree",
    "layout_of",
    "lbf",
    "make_plan",
    "named_trainable",
    "one_device",
    "refuse_lazy",
    "part_of",
    "pattern_of",
    "per_tensor",
    "register",
    "tree_sp",
    "whole",
    "xsp",
]
