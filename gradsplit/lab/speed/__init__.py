"""What a step costs: pairs timed in turn, figures with their bars, the limit that memory sets."""
