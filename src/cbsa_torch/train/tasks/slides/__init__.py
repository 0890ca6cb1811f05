"""Whole slides: bags of tile features with coordinates, their labels, and the task of classifying them."""
