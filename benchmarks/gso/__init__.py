"""GSO's trials and tables: which runs there are, how one is made, and the page and the picture of their results."""
