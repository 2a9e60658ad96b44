"""Benchmarks: all implementations in one run, interleaved, medians; results are JSON with machine, versions and command."""
