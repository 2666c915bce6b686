"""What a run will cost, before it starts: memory, operations, bytes, seconds."""
