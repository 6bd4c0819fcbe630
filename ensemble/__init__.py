"""The best weighted mean of any models that were scored out of fold."""
