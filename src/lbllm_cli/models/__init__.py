"""Full-precision models as Hugging Face has them: folders, configurations, one block at a time."""
