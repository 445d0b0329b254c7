"""Pages and pictures from plain data: self-contained, readable without a network."""
