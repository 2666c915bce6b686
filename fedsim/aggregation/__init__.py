"""Federated strategies: pure functions of the server state and the cohort's factors."""
