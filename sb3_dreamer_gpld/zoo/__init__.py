"""The command line ``dreamer-gpld``: rl_zoo3 with this algorithm registered, and what it adds.

==================== ============================================================================
:mod:`.main`         the commands
:mod:`.arguments`    what is read of their arguments, and the hyperparameter file that they name
:mod:`.environments` registering environments, rendering without a display
:mod:`.register`     DreamerGPLD as an algorithm of rl_zoo3
:mod:`.runs`         runs that go on, with :mod:`.evaluations` (what was evaluated), and of several processes
:mod:`.sweep`        ``sweep``: many runs with Ray
:mod:`.enjoy`        ``enjoy --trained``
:mod:`.search`       the search space of ``optimize``, and studies that outlive a failed trial
:mod:`.check`        ``check``: mistakes in hyperparameter files
:mod:`.plot`         ``plot``: learning curves
:mod:`.hub`          ``push-to-hub``
:mod:`.diagnose`     ``diagnose``, with :mod:`.episodes` (collecting) and :mod:`.figures` (drawing)
==================== ============================================================================

Comments that begin with "Inside rl_zoo3" mark what leans on more than its documented options and functions: the places to look
at when a new release of it breaks a command.
"""
