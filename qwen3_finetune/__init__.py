"""A text encoder fine-tuned on log price: Qwen3-Embedding with QLoRA, or any other Hugging Face encoder."""
