"""The ops inside models that other libraries define."""
