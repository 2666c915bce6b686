"""LoRA factors, adapters, updates and the server's state: the data that travels."""
