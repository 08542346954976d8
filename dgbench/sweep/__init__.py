"""Sweeps: trainings of several recipes, settings and seeds, here or on a cluster, safe to begin again."""
