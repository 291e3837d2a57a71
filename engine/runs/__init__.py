"""What a run directory needs: starting and ending a process, claiming the directory, faults, signals, fine-tuning."""
