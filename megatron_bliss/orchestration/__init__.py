"""Stages by name, inputs and outputs, and what runs them; nothing of models."""
