"""Everything that docs/results/speed.md states, in one run: all layouts, what is paid once, and the peers.

    python benchmarks/speed.py --out benchmarks/results/speed.json --write-docs

Peers come from PyPI: pip install pytorch-optimizer adam-mini timm zclip smartclip heavyball; one that is not installed
or fails is listed with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gradsplit.lab.speed.figures import LAYOUTS, RATE, Figure, parameters_of
from gradsplit.lab.speed.pairs import in_turn
from gradsplit.lab.speed.session import measure, show, write

ROOT = Path(__file__).resolve().parents[1]


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[Any, Any], Callable[[], object]]:
    def make(named: Any, model: Any) -> Callable[[], object]:
        import pytorch_optimizer

        optimizer = getattr(pytorch_optimizer, name)([p for _, p in named], lr=RATE, **options)
        return optimizer.step

    return make


def _agc_timm(named: Any, model: Any) -> Callable[[], object]:
    from timm.utils.agc import adaptive_clip_grad

    parameters = [p for _, p in named]
    adamw = torch.optim.AdamW(parameters, lr=RATE, fused=True)

    def step() -> None:
        adaptive_clip_grad(parameters, clip_factor=0.2)
        adamw.step()

    return step


def _adam_mini(named: Any, model: Any) -> Callable[[], object]:
    from adam_mini import Adam_mini

    return Adam_mini(named_parameters=named, lr=RATE, dim=384, n_heads=6, verbose=False).step


def _zclip(named: Any, model: Any) -> Callable[[], object]:
    from zclip import ZClip

    adamw = torch.optim.AdamW([p for _, p in named], lr=RATE, fused=True)
    zclip = ZClip()

    def step() -> None:
        zclip.step(model)
        adamw.step()

    return step


def _heavyball(named: Any, model: Any) -> Callable[[], object]:
    import heavyball

    return heavyball.AdamW([p for _, p in named], lr=RATE).step


def _smartclip(named: Any, model: Any) -> Callable[[], object]:
    import smartclip

    adamw = torch.optim.AdamW([p for _, p in named], lr=RATE, fused=True)
    clipper = smartclip.AutoClip()

    def step() -> None:
        smartclip.step(model, adamw, clipper)

    return step


def _prodigy(named: Any, model: Any) -> Callable[[], object]:
    from prodigyopt import Prodigy

    return Prodigy([p for _, p in named], lr=RATE).step


PEERS: dict[str, Callable[[Any, Any], Callable[[], object]]] = {
    "timm AGC + fused AdamW": _agc_timm,
    "zclip + fused AdamW": _zclip,
    "smartclip AutoClip + fused AdamW": _smartclip,
    "pytorch-optimizer LAMB": _pytorch_optimizer("Lamb"),
    "pytorch-optimizer StableAdamW": _pytorch_optimizer("StableAdamW"),
    "pytorch-optimizer AdaFactor": _pytorch_optimizer("AdaFactor"),
    "prodigyopt Prodigy": _prodigy,
    "Adam-mini": _adam_mini,
    "heavyball AdamW (compiled)": _heavyball,
}
"""Per name a function of the named parameters and a module of them that returns one step."""


class _Holder(torch.nn.Module):
    """The parameters as a module, for peers that want one."""

    def __init__(self, named: Any) -> None:
        super().__init__()
        for i, (_, p) in enumerate(named):
            self.register_parameter(f"p{i}", p)


def peer_figures(layout: str, seconds: float, problems: dict[str, str]) -> Iterator[Figure]:
    """Yield each peer's step against the clip and a fused AdamW; what fails goes into ``problems``."""
    for name, make in PEERS.items():
        named, _ = parameters_of(LAYOUTS[layout]())
        parameters = [p for _, p in named]
        adamw = torch.optim.AdamW(parameters, lr=RATE, fused=True)

        def baseline(parameters: Any = parameters, adamw: Any = adamw) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1e9, foreach=True)
            adamw.step()

        began = time.perf_counter()
        try:
            step = make(named, _Holder(named))
            step()
            first = time.perf_counter() - began
            if first > 45:
                problems[name] = f"the first step took {first:.0f} s"
                continue
            pair = in_turn(step, baseline, seconds=seconds)
        except Exception as error:  # a peer's failure is a result of this comparison, not of ours
            problems[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"         {name}: {problems[name]}", file=sys.stderr)
            continue
        detail = {**pair.to_dict(), "first_step_seconds": first}
        print(f"{pair.ratio:8.3f} peer {name}", file=sys.stderr, flush=True)
        yield Figure(f"peer: {name} / clip + fused AdamW", layout, pair.ratio, None, detail=detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the raw results")
    parser.add_argument("--layouts", default="gpt-23m,gpt-124m,resnet-50,small-tensors,small-matrices")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each figure")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: as it is")
    parser.add_argument("--no-start", action="store_true", help="leave out import, first call and memory")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--write-docs", action="store_true", help="write the figures of --out into docs/results/speed.md"
    )
    options = parser.parse_args()
    if options.write_docs and options.out is None:
        parser.error("--write-docs needs --out")
    if options.threads:
        torch.set_num_threads(options.threads)
    load = list(os.getloadavg())  # later it holds this run's own threads
    figures = measure(options.layouts, options.seconds, start=not options.no_start)
    problems: dict[str, str] = {}
    if not options.no_peers:
        figures += peer_figures("gpt-23m", options.seconds / 2, problems)
    show(figures)
    for name, reason in problems.items():
        print(f"peer not measured: {name}: {reason}")
    if options.out is not None:
        write(figures, options.out, load_average_before=load, peers_not_measured=problems)
    if options.write_docs:
        sys.path.insert(0, str(ROOT))
        from benchmarks.speed_page import write_page

        write_page(options.out, ROOT / "docs/results/speed.md")


if __name__ == "__main__":
    main()
