"""`helio runs`: what ran in a workspace, what it found and cost, and what may be deleted."""
