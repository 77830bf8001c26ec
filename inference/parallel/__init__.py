"""Ranks: who takes part, their collectives, and what happens when one fails."""
