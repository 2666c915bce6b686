"""Base models and tokenizers, and the frozen base with an adapter on it."""
