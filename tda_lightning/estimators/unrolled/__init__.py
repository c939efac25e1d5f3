"""Exact unrolling, piece by piece: replays, their states, the adjoints of the optimizers' steps."""
