"""Training and evaluation of built objects: loop, optimizer, checkpoints, processes, logging, evaluation."""
