"""Broken share steps. Each is named for the law that must catch it."""

from __future__ import annotations

from contextlib import contextmanager

import torch

import gradsplit as gs
from gradsplit import collective, rates
from gradsplit.functional import kinds as array_kinds
from gradsplit.optim import gso, kinds, share
from gradsplit.optim.directions import adam, orthogonal
from tests.optim.share import laws


def true(model, **options):
    """The definition, whose parts can be broken one by one."""
    return gs.GSO(model, **{"fused": False, **options})


def without_the_rule(make):
    """The same optimizer, in which the collective rule never fires."""

    def made(model, **options):
        optimizer = make(model, **options)
        optimizer._collective.median = lambda ratio_B: torch.full((), torch.nan, dtype=ratio_B.dtype)
        return optimizer

    return made


def _by_columns(kind, rows, cols):
    return array_kinds.of_width(kind, kind.blocks * cols, cols)


def _without_blocks(kind, rows, cols):
    return kinds.replace(kind, least=array_kinds.of_width(kinds.replace(kind, blocks=1), rows, cols).least)


@contextmanager
def replaced(*changes):
    """Other attributes for a while: (object, name, value)."""
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _with_kinds(change):
    """Kinds other than those that the tensors have."""
    find = kinds.kinds_of

    def found(*arguments):
        return [change(kind) for kind in find(*arguments)]

    return gso, "kinds_of", found


def _changed(**values):
    def change(kind):
        made = {key: value for key, value in values.items() if key != "of"}
        return kinds.replace(kind, **made) if kind.name in values.get("of", kind.name) else kind

    return change


def _entered_always(memory, gradient, weight, learns):
    return memory.lerp_(gradient, weight)


def _step_without(method):
    """A share step in which one method does nothing."""
    return share.ShareUpdate, method, lambda *_: None


def _bounded_by_tensor(self, *measured):
    """A bad row condemns its tensor."""
    decision, *more = _BOUND(self, *measured)
    finite_B = decision.finite_B.clone()
    for ids in self.split.bins_of_tensor:
        finite_B[torch.from_numpy(ids)] &= bool(finite_B[torch.from_numpy(ids)].all())
    scale_B = torch.where(finite_B, decision.scale_B, 0.0)
    return share.Decision(decision.plan, decision.norm_B, finite_B, scale_B, decision.limits), *more


def _bad_rows_move(self, *measured):
    decision, *more = _BOUND(self, *measured)
    fine_B = torch.ones_like(decision.finite_B)
    return share.Decision(decision.plan, decision.norm_B, fine_B, decision.scale_B, decision.limits), *more


def _unbounded(self, *measured):
    decision, *more = _BOUND(self, *measured)
    scale_B = torch.where(decision.finite_B, 1.0, 0.0).to(decision.scale_B)
    return share.Decision(decision.plan, decision.norm_B, decision.finite_B, scale_B, decision.limits), *more


_BOUND = share.ShareUpdate._bound
_STEP = share.ShareUpdate.step


def _scales_the_mean(self, ratio_B):
    return ratio_B.nanmean()


def _decays_what_stays(self, gradients, states, groups, scaling=None):
    _STEP(self, gradients, states, groups, scaling)
    for w, g in zip(self.split.parameters, gradients, strict=True):
        if g is not None and w.dim() > 1:
            w[g.reshape(w.shape).flatten(1).norm(dim=1) == 0] *= 0.999


def _writes_gradients(self, gradients, states, groups, scaling=None):
    _STEP(self, gradients, states, groups, scaling)
    for g in gradients:
        if g is not None:
            g.mul_(0.5)


def _forgets_recent(self, state, *, call):
    self.most_B = state["most"].clone()


def _rows_walk(self, *measured):
    """A row without a gradient goes on along its momentum."""
    decision, *more = _BOUND(self, *measured)
    norm_B = decision.norm_B.clamp(min=1e-300)
    return share.Decision(decision.plan, norm_B, decision.finite_B, decision.scale_B, decision.limits), *more


def _tokens_stay(self, *arguments):
    """Rows of embeddings stay where they have no gradient, as those of matrices do."""
    _MAKE(self, *arguments)
    self._fades_B = torch.zeros_like(self._fades_B)


_MAKE = share.ShareUpdate.__init__


def _whole(stack, **_):
    """Divided by its largest entry."""
    return stack / stack.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-30)


def _decay_per_step(self, key, num_bins):
    """Decay in units of the step, not of the share."""
    value = _VALUE(self, key, num_bins)
    return value / 0.03 if key == "weight_decay" else value


_VALUE = rates.Rates.value_B


def _deaf(stack, **_):
    """Small gradients are not made orthogonal."""
    return orthogonal_true(stack) if float(stack.abs().max()) > 1e-4 else stack


orthogonal_true = orthogonal.orthogonalised


def _rounds_memory(optimizer, saved, *, by_share):
    """What torch's own `load_state_dict` does to the float32 memory of a bfloat16 parameter."""
    _MEND(optimizer, saved, by_share=by_share)
    for state in optimizer.state.values():
        for value in state.values():
            value.copy_(value.bfloat16() if not value.is_complex() else value)


_MEND = gso.mend_memories


def _formulas(make=true):
    laws.check_follows_the_formulas(make)


def _bad(make=true):
    laws.check_a_bad_row_stays_a_bad_row(make, "linear.weight", float("nan"))


def _bad_embedding(make=true):
    laws.check_a_bad_row_stays_a_bad_row(make, "words.weight", float("inf"))


def _clean(make=true):
    laws.check_the_rule_costs_a_clean_run_nothing(make, without_the_rule(make))


def _few(make=true):
    laws.check_few_rows_are_no_batch(make, without_the_rule(make))


_huge = laws.check_one_huge_row_moves_no_other_tensor
_scale = laws.check_the_scale_of_the_loss_does_not_matter
_share = laws.check_rows_move_by_their_share
_rests = laws.check_a_row_that_loses_its_gradient_rests
_width = laws.check_short_rows_count_as_less_in_wide_matrices

LAWS = (
    _formulas,
    _bad,
    _bad_embedding,
    _huge,
    laws.check_a_scaled_batch_is_scaled_back,
    _clean,
    _few,
    _scale,
    laws.check_rows_do_not_outgrow_their_limit,
    _share,
    _width,
    laws.check_without_gradient_a_row_stays,
    _rests,
    laws.check_saving_changes_nothing,
    laws.check_gradients_are_only_read,
    laws.check_blocks_do_not_see_each_other,
    laws.check_the_built_in_schedule,
)

UPDATE, COLLECTIVE = share.ShareUpdate, collective.Collective

MUTANTS = {
    "decay per step": ([(rates.Rates, "value_B", _decay_per_step)], _formulas),
    "four steps of Newton-Schulz": (
        [(orthogonal, "STEPS", 4), (orthogonal.orthogonalised, "__defaults__", (4,))],
        _formulas,
    ),
    "vectors take whole shares": ([_with_kinds(_changed(of="vector", share=1.0))], _formulas),
    "vectors count as rows": ([_with_kinds(_changed(of="vector", least=0.1))], _formulas),
    "a wide matrix counts as a narrow one": ([(array_kinds, "WIDE", float("inf"))], _width),
    "the columns alone are looked at": ([(kinds, "of_width", _by_columns)], _width),
    "blocks are one matrix": ([(kinds, "of_width", _without_blocks)], _width),
    "embeddings are matrices": ([_with_kinds(_changed(of="embedding", direction="orthogonal"))], _formulas),
    "a bad row condemns its tensor": ([(UPDATE, "_bound", _bounded_by_tensor)], _bad_embedding),
    "a bad row moves": ([(UPDATE, "_bound", _bad_rows_move)], _bad),
    "a bad row learns": ([(orthogonal, "entered", _entered_always)], _bad),
    "a bad embedding learns": ([(adam, "entered", _entered_always)], _bad_embedding),
    "no bound before the memory": ([(UPDATE, "_bound", _unbounded)], _huge),
    "the mean in place of the median": (
        [(COLLECTIVE, "median", _scales_the_mean)],
        _huge,
    ),
    "no collective rule": ([(collective, "COLLECTIVE", float("inf"))], laws.check_a_scaled_batch_is_scaled_back),
    "a median of any number of rows": ([(collective, "ENOUGH", 1)], _few),
    "the rule fires early": ([(collective, "COLLECTIVE", 0.5)], _clean),
    "a matrix is not made orthogonal but divided": ([(orthogonal, "orthogonalised", _whole)], _formulas),
    "small gradients are left as they are": (
        [(orthogonal, "orthogonalised", _deaf)],
        _scale,
    ),
    "no growth limit": ([_step_without("_shorten")], laws.check_rows_do_not_outgrow_their_limit),
    "the share at most, not exactly": (
        [(orthogonal.Orthogonal, "keeps_length", True)],
        _share,
    ),
    "rows without gradient decay": ([(UPDATE, "step", _decays_what_stays)], laws.check_without_gradient_a_row_stays),
    "rows without gradient walk on": ([(UPDATE, "_bound", _rows_walk)], _rests),
    "tokens that do not come stay": ([(UPDATE, "__init__", _tokens_stay)], _rests),
    "history is not loaded": ([(UPDATE, "load", _forgets_recent)], laws.check_saving_changes_nothing),
    "memory in half precision": ([(gso, "mend_memories", _rounds_memory)], laws.check_saving_changes_nothing),
    "gradients are halved": ([(UPDATE, "step", _writes_gradients)], laws.check_gradients_are_only_read),
    "no blocks": ([_with_kinds(_changed(blocks=1))], laws.check_blocks_do_not_see_each_other),
    "the schedule stands still": ([(rates.Clock, "pace", lambda _: 1.0)], laws.check_the_built_in_schedule),
}
"""Name -> (what is replaced, the law that must catch it)."""
