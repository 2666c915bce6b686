"""Corpora, token store, length classes, partitions and batches."""
