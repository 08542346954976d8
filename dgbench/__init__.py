"""Benchmark for domain-generalized semantic segmentation: train on one domain, score on domains never seen."""

__version__ = "0.1.0"
