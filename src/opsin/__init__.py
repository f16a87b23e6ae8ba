"""Opsin: optogenetics for training dynamics."""
