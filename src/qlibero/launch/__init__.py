"""Where and how the work runs: cells and shards, the engines that run them, and the environments of their processes."""
