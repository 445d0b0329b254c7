"""Workloads: what is trained, on real data, a file each; `detector`, `scenes` and `digits` are parts of several.

`gradsplit.lab.registry` is their table, and `gradsplit.lab.task` says what a workload is.
"""
