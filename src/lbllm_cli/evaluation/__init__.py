"""Perplexity, agreement, tasks, sizes."""
