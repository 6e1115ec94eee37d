"""Configs of tasks that ask for what was read before: copying, induction heads, associative recall, a needle."""
