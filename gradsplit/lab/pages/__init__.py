"""The pages and tables that show what the lab has measured."""
