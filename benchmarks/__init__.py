"""Measurements, each a module: `python -m benchmarks.hooks --quick --json FILE`. All of them: `make bench`."""
