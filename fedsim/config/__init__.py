"""The configuration of a run: its tree, files, command line and help."""
