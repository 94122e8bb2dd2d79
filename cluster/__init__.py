"""Where helio runs: the command line, recipes and profiles, runs, the Ray session, progress."""
