"""Batches from random draws and from files."""
