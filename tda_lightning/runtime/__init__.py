"""What every part stands on: module state, random states, loading, processes, progress, memory."""
