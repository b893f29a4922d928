"""Trained models of public packages: a module a model; `case` says what they have in common."""
