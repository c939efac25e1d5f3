"""Turns a recorded trajectory into scores."""
