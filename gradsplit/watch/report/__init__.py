"""The account of a recorded run, in words for the terminal and as one page that needs no network."""
