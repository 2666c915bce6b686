"""A whole run: prepare, round after round, finish. Between the command line and the round."""
