"""Long texts beside a table: the four fusion designs, trained end to end with the text encoder."""
