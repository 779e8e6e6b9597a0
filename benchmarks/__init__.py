"""Benchmarks of taps_fast: see README.md in this folder."""
