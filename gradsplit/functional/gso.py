"""GSO outside of torch, in both of its forms: the share step of `share`, and AdamW over bins of `adam`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..budget import DEFAULT_OF_GSO
from ..plan import Plan
from .adam import GsoRule, gso_rule
from .arrays import Oriented
from .kinds import Choice, array_kinds
from .share import DEFAULT_OF_SHARE, ShareRule, share_rule

__all__ = ["GsoOptions"]


@dataclass(frozen=True)
class GsoOptions:
    """The arguments of GSO that no framework has names of its own for; `gradsplit.GSO` says what they mean.

    The direction "adam" for all arrays is AdamW over bins, everything else is the share step.

    Args:
        call: the caller's name, for errors.
        direction, kinds, blocks: see `array_kinds`.
        betas: decay of the two memories; None as the second: 0.99, and 0.999 for ``direction="adam"``.
        eps, weight_decay, second_moment, rule: see `gso_rule`.

    Raises:
        ValueError: an option of one form beside the other form.

    >>> GsoOptions("gso").rate(None), GsoOptions("gso", direction="adam").rate(None)
    (0.03, 0.01)
    """

    call: str
    direction: Choice = "auto"
    kinds: Choice = None
    blocks: Choice = None
    betas: tuple[float, Any] = (0.9, None)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    second_moment: str = "element"
    rule: str = "bottom_up"

    def __post_init__(self) -> None:
        if not self.by_share and (self.kinds is not None or self.blocks is not None):
            raise ValueError(
                f"{self.call}(direction='adam', …): expected neither kinds= nor blocks=, which belong to the share "
                "step. Leave them out, or use direction={'*': 'adam'}."
            )
        if self.by_share and self.second_moment != "element":
            raise ValueError(
                f"{self.call}(second_moment={self.second_moment!r}): expected 'element' beside a direction that has no "
                "second moment per bin. Use direction='adam' with it."
            )
        if self.betas[1] is None:
            object.__setattr__(self, "betas", (self.betas[0], 0.99 if self.by_share else 0.999))

    @property
    def by_share(self) -> bool:
        """Whether rows move by a share of their length."""
        return not (isinstance(self.direction, str) and self.direction == "adam")

    def rate(self, learning_rate: Any) -> Any:
        """Return a learning rate, or the default in place of None.

        Raises:
            ValueError: a number that is no share of a row's length.
        """
        if learning_rate is None:
            return 0.03 if self.by_share else 1e-2
        if self.by_share and isinstance(learning_rate, (int, float)) and not 0 <= learning_rate <= 0.5:
            raise ValueError(
                f"{self.call}({learning_rate}): expected a share of a row's length per step, in [0, 0.5]. The default "
                "is 0.03; use direction='adam' for a learning rate of AdamW."
            )
        return learning_rate

    def budget(self, budget: Any) -> Any:
        """Return a budget, or the default in place of None."""
        usual = DEFAULT_OF_SHARE if self.by_share else DEFAULT_OF_GSO
        return usual if budget is None else budget

    def rule_for(
        self,
        plan: Plan,
        budget: Any,
        oriented: Oriented | None = None,
        known: Mapping[str, tuple[str | None, int]] | None = None,
    ) -> GsoRule | ShareRule:
        """Return the functions of the step.

        Args:
            plan: the bins.
            budget: see `budget`.
            oriented: the arrays; None: those of the plan in PyTorch's order, by their shapes alone.
            known: see `array_kinds`.

        Raises:
            ValueError: a constant out of its range, an unknown name, a pattern that matches no array.
        """
        constants: dict[str, Any] = {
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "oriented": oriented,
            "rule": self.rule,
            "call": self.call,
        }
        if not self.by_share:
            return gso_rule(plan, self.budget(budget), second_moment=self.second_moment, **constants)
        kinds = None
        if oriented is not None:
            said = {"kinds": self.kinds, "direction": self.direction, "blocks": self.blocks}
            kinds = array_kinds(oriented, **said, known=known, call=self.call)
        return share_rule(plan, self.budget(budget), kinds=kinds, **constants)
