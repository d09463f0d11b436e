"""Meshes and the rules that lay arrays out on them. Imports jax only."""
