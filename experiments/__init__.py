"""Sweeps over configurations and their comparison: grids, launching, run directories, tables.

``grid`` and ``plan`` say what to run, ``launch`` and ``slurm`` run it, ``runs`` reads what runs left behind,
``comparison``, ``tables`` and ``curves`` show it.
"""
