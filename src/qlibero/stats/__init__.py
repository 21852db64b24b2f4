"""Statistics of paired outcomes: pure functions of numbers, without a ledger."""
