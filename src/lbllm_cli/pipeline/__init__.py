"""What every stage goes through: plan, lineage, checkpoints, streams, the loop over blocks."""
