"""Run by Python at its start in every process of a script under `gradsplit run`; then the user's own sitecustomize."""

import importlib
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(_HERE))))


def _run_the_users_own() -> None:
    """Import the sitecustomize that this one hides, if there is any; its errors are the user's to see."""
    ours = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


def _attach() -> None:
    sys.path.append(_ROOT)  # only while it is looked for: the script's own path is not to be changed
    try:
        from gradsplit.watch.run.on_import import begin  # absolute: Python runs this file outside of the package
    finally:
        sys.path.remove(_ROOT)
    begin()


sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _HERE]
if os.environ.get("GRADSPLIT_RUN"):
    try:
        _attach()
    except Exception as error:
        print(f"gradsplit: not attached, the script runs without ({error!r})", file=sys.stderr)
_run_the_users_own()
