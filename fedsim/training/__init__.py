"""Local training of clients, pack by pack."""
