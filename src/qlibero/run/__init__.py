"""One experiment from its config to its ledger: the arms' policies, the episodes in flight, their noise and videos."""
