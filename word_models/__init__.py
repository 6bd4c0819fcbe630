"""Price models on word counts: they are cheap, strong on small catalogues, and what an encoder must beat."""
