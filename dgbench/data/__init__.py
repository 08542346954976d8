"""Domains, their labels, and everything between a file and a training batch."""
