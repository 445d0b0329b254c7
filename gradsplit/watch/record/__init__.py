"""What a step leaves behind, and where it goes: step records, sinks, the run file."""

from ...resume.actions import GuardAction
from ...split import BinReport, StepRecord
from .outline import Outline, recording_plan
from .reader import Event, RunFile, Series
from .rows import Rows, Stream, Turns
from .run_file import RunFileError, tell
from .sinks import Recorder, RowSink, next_reading, summed_up
from .writer import RunWriter

__all__ = [
    "BinReport",
    "Event",
    "GuardAction",
    "Outline",
    "Recorder",
    "Rows",
    "RowSink",
    "RunFile",
    "RunFileError",
    "RunWriter",
    "Series",
    "StepRecord",
    "Stream",
    "Turns",
    "next_reading",
    "recording_plan",
    "summed_up",
    "tell",
]
