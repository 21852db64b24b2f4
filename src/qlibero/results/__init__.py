"""What happened, kept and judged: records, the ledger, the statistics, the comparison. Imports no other room."""
