"""The ground floor: plans, choices, dispatch, ledger, budgets and the small pieces all rooms share."""
