"""Frozen SigLIP towers: pooled picture and text embeddings."""
