"""Ranks: `group` has their collectives, `startup` makes them find each other, `failure` is how a run of them ends."""
