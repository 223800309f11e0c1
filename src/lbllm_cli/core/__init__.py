"""What everything else stands on: errors, files, signals. Knows nothing of models."""
