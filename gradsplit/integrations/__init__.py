"""Translations between gradsplit and other packages; no logic of their own."""
