"""Views of the ledger in other people's dashboards: every tracker is a separate process that replays the ledger."""
