"""Processes: the group, what they exchange, and how they fail together. The only user of torch.distributed."""
