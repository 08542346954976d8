"""What models cost: counts, timings, profiles, and the benches of their kernels."""
