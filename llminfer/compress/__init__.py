"""Smaller models, and what they cost: every lossy option is measured by `evaluate`."""
