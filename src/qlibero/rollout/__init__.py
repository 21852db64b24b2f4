"""Rolling a policy out in the simulator: the noise of each call, the episodes in flight, the engine that feeds them."""
