"""What `plan_accuracy` reads and fits with."""
