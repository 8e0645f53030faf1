"""Capture: one forward with taps, one backward, and the scores of every parameter."""
