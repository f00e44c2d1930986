"""Methods against budgets on tasks: questions, runs, folders, intervals, tables."""
