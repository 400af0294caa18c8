"""The sides of `benchmarks.step`: each trains the same model in a process of its own."""
