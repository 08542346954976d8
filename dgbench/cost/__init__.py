"""Cost of models: counts, timings, profiles, and benchmarks of their kernels."""
