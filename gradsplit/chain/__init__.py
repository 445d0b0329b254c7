"""The backward chain: joints, the signal at them, its gains, and bounds on both (design.md 4.8)."""
