"""Folders that others load."""
