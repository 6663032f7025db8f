"""Measurements of speed, memory, bytes on the wire and faults: one command each, and the modules they share."""
