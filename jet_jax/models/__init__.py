"""The hybrid language model and its parts."""
