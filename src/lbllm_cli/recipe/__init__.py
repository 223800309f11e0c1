"""The recipe: schema, YAML, overrides."""
