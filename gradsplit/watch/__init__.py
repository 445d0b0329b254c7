"""Watching a run: the run file, attaching to a script, the report in words and pages, loggers."""
