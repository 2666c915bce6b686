"""The server: cohort, round, checkpoint."""
