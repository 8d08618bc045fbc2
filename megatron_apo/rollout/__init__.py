"""Rollouts and live weights through stock vLLM servers. Importing this package imports nothing heavy."""
