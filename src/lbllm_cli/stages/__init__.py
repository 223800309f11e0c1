"""One module per stage; each reads a recipe and writes one checkpoint or one result."""
