"""The command line: rl_zoo3 with this algorithm registered, and what it adds. ``dreamer-gpld`` runs :mod:`.main`."""
