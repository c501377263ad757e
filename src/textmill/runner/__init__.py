"""One rank's side of a step: slots, key/value pool, execution, warm-up."""
