"""The measurements of `benchmarks/engine.py`."""
