"""Attributes of products from pictures and texts, learned from a few labels and many unlabelled listings."""
