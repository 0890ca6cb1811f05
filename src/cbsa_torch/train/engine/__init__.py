"""What runs the loop: Accelerate, optimisers, trackers, the console."""
