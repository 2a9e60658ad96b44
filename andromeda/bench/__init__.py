"""Benchmarks: both sides in one run, interleaved, medians; the result is JSON with the machine, the versions and the command."""
