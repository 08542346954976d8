"""Training, evaluation and prediction: plain functions that read from top to bottom."""
