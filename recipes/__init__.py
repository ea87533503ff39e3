"""What can be run, and what runs need: launch, engine, model, metrics, report."""
