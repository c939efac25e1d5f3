"""A recorded run, trained again step by step."""
