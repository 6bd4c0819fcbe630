"""CLIP fine-tuned on pictures and texts, with a price head on the image embedding."""
