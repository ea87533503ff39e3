"""What makes the tables and figures of the docs from docs/results."""
