"""The command line: `fisherfn fim` and what it is made of (extras `[app]` and `[lm]`)."""
