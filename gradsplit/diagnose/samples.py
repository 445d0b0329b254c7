"""Where the gradient comes from: the sample or the loss term that carries most of it, or is not finite."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..sources import RunningLimit, SampleSplitter
from .evidence import Evidence
from .finding import Finding

FEWEST = 4  # samples: of fewer, one carries a large share by itself
MOST = 0.5  # share of a layer's gradient
BEYOND = 20.0  # times the median sample
LOUD = 30.0  # times the gradient of the next term


def one_sample(evidence: Evidence) -> list[Finding]:
    """Samples that are not finite while others are, or one sample that carries most of the gradient of most layers.

    The share of sample i in a layer is n_i / sum n_j with n_i = ||a_i|| ||d_i||; see `SampleSplitter`.
    """
    parameters = [parameter for parameter in evidence.model.parameters() if parameter.requires_grad]
    splitter = SampleSplitter(evidence.model, RunningLimit(quantile=0.5, factor=1.0), quarantine=(), keep=100_000)
    splitter.unruled.clear()  # nothing is trained here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with splitter:
                loss: Tensor = evidence.loss_fn(evidence.model, evidence.batch)
                # Not backward(): its hooks may be those of an optimizer that steps inside it.
                torch.autograd.grad(loss, parameters, allow_unused=True)
    except (RuntimeError, ValueError) as error:
        evidence.notes.append(f"samples were not examined: {error}")
        return []
    layers: dict[str, dict[int, float]] = {}
    for row in splitter.named(beyond=0.0):
        ratio = row.ratio if isinstance(row.ratio, float) else math.nan
        layers.setdefault(row.layer, {})[row.sample] = ratio
    return _not_finite(layers) or _heavy(layers)


def loud_term(evidence: Evidence) -> list[Finding]:
    """Terms that are not finite while others are, or one term whose gradient drowns all others.

    The figure is ||g_1|| / ||g_2||, the norms over all parameters of the largest and the next gradient of a term.
    """
    terms = None if evidence.terms_of is None else evidence.terms_of(evidence.model, evidence.batch)
    if not isinstance(terms, Mapping) or len(terms) < 2:
        return []
    parameters = [parameter for parameter in evidence.model.parameters() if parameter.requires_grad]
    norms: dict[str, float] = {}
    for name, term in terms.items():
        if term.requires_grad:
            found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            squares = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in found if g is not None]
            norms[name] = math.sqrt(sum(squares))
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if bad and len(bad) < len(norms):
        shown = ", ".join(bad)
        return [
            Finding(
                "loud term",
                shown,
                float(len(bad)),
                "terms that are not finite",
                f"the gradient of the loss term {shown} is not finite, the others are",
                "the norm of each term's own gradient: " + _listed(norms),
                "look at this term; gs.TermSplitter(model).backward(…) trains on without it, and names it",
                90.0,
            )
        ]
    ordered = sorted((norm, name) for name, norm in norms.items() if norm > 0)
    if len(ordered) < 2 or not ordered[-1][0] > LOUD * ordered[-2][0]:
        return []
    (next_norm, _), (norm, name) = ordered[-2:]
    return [
        Finding(
            "loud term",
            name,
            norm / next_norm,
            "times the gradient of the next term",
            f"the gradient of the loss term {name} is {norm / next_norm:.3g} times that of the next term",
            "the norm of each term's own gradient: " + _listed(norms),
            f"weigh it with {next_norm / norm:.2g}, or let gs.TermSplitter(model).backward(…) bound each term",
            math.log10(norm / next_norm / LOUD),
        )
    ]


def _listed(norms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())


def _not_finite(layers: dict[str, dict[int, float]]) -> list[Finding]:
    # A layer in which no sample is finite says nothing about samples.
    bad = {name: [i for i, ratio in found.items() if math.isnan(ratio)] for name, found in layers.items()}
    mixed = [name for name, found in bad.items() if found and len(found) < len(layers[name])]
    if not mixed:
        return []
    samples = sorted({sample for name in mixed for sample in bad[name]})
    shown = ", ".join(map(str, samples[:10])) + (", …" if len(samples) > 10 else "")
    one = len(samples) == 1
    return [
        Finding(
            "one sample",
            f"sample {shown}" if one else f"samples {shown}",
            float(len(samples)),
            "samples that are not finite",
            f"sample {shown} of the batch is not finite, the others are"
            if one
            else f"samples {shown} of the batch are not finite, the others are",
            f"seen in {len(mixed)} layers, in {mixed[0]} first on the way back",
            "look at these samples; gs.SampleSplitter(model) trains on without them, and names them",
            90.0,
        )
    ]


def _heavy(layers: dict[str, dict[int, float]]) -> list[Finding]:
    judged = {name: found for name, found in layers.items() if len(found) >= FEWEST}
    heavy: Counter[int] = Counter()
    shares: dict[int, list[tuple[float, float]]] = {}
    for found in judged.values():
        sample = max(found, key=lambda i: found[i])
        share = found[sample] / sum(found.values())
        if share > MOST and found[sample] > BEYOND:
            heavy[sample] += 1
            shares.setdefault(sample, []).append((share, found[sample]))
    if not heavy:
        return []
    ((sample, count),) = heavy.most_common(1)
    if 2 * count <= len(judged):
        return []
    share, ratio = sorted(shares[sample])[len(shares[sample]) // 2]
    return [
        Finding(
            "one sample",
            f"sample {sample}",
            share,
            "share of the batch's gradient",
            f"sample {sample} of the batch carries {share:.0%} of the gradient",
            f"in {count} of {len(judged)} layers, by the median {ratio:.3g} times the middle sample",
            'look at this sample; gs.SampleSplitter(model, kind="regression") bounds what one sample adds',
            0.5 * math.log10(ratio / BEYOND),
        )
    ]
