"""Sweeps over configurations and their comparison: grids, launching, run directories, tables.

``grid`` and ``plan`` say what to run, ``launch`` and ``slurm`` run it, ``progress`` says how long it takes, ``runs``
reads what runs left behind, ``comparison``, ``intervals``, ``tables`` and ``curves`` show it.
"""
