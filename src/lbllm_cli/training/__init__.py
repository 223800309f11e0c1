"""What everything that trains has in common."""
