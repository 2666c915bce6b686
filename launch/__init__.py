"""Start fedsim: from a configuration to the command that runs it."""
