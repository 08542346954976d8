"""The towers: one table of them, their modules, their published weights."""
