"""One module per command: what it does, given its configuration."""
