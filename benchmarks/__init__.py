"""Measurements: every result is a JSON file in benchmarks/results/, never overwritten."""
