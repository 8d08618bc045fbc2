"""Prompts and batches."""
