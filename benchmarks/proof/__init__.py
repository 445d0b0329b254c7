"""The proof: which runs there are, how one is made, and the page and the picture of their results."""
