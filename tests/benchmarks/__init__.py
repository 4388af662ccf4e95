"""Benchmarks: each prints a table and writes build/bench/NAME.json; none fails on a time."""
