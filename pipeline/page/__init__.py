"""The sections of the report page, each a piece of html; pipeline.report puts them together."""
