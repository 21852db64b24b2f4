"""What may be said in an experiment's YAML (`schema`), and how it is read (`load`)."""
