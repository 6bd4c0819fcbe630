"""All stages in order, the score table and the report page."""
