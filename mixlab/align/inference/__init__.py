"""From a traced function to the permutations that act on the axes of its leaves."""
